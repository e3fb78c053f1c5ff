"""Beam search: meshes, gradients, caches and wrong settings."""

import functools
import re

import beam_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax import decoding

# --- Mesh, gradients, caches --------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_sharded_batch_gives_the_same_outputs_without_moving_the_cache(shape):
  weights = beam_models.history_weights(8, 5, 6)
  alpha = jnp.float32(0.6)
  alone = beam_models.compiled_search(weights, alpha, num_decodes=3)
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()).reshape(shape), ("data", "model")
  )
  rows = NamedSharding(mesh, PartitionSpec("data"))
  sharded = jax.jit(
    functools.partial(beam_models.search, num_decodes=3),
    in_shardings=(rows, None),
    out_shardings=rows,
  )
  program = sharded.lower(weights, alpha).compile()
  # XLA gathers what top_k reads, on CPUs: float32 matrices, log-probs and scores.
  # The cache (a history of int32, weights of rank 4) and the tokens stay.
  moves = r"all-gather|all-to-all|collective-permute"
  moved = [
    line
    for line in program.as_text().splitlines()
    if re.search(rf" ({moves})(-start)?\(", line)
  ]
  matrix = re.compile(r" = f32\[\d+,\d+\]\S* all-gather\(")
  assert all(matrix.search(line) for line in moved), moved
  result = program(
    jax.device_put(weights, rows),
    jax.device_put(alpha, NamedSharding(mesh, PartitionSpec())),
  )
  assert len(result.tokens.sharding.device_set) == 8
  np.testing.assert_array_equal(result.tokens, alone.tokens)
  np.testing.assert_allclose(result.scores, alone.scores, rtol=1e-6)


def test_no_gradient_flows_through_the_search():
  weights = jnp.asarray(beam_models.history_weights(1, 3, 4))

  def total(weights, alpha):
    # The weights come in both ways, in the cache and closed over.
    def model(tokens, cache):
      logits, changed = beam_models.history_model(tokens, cache[0])
      return logits + weights.sum(), (changed, cache[1] + weights.sum())

    cache = weights, jnp.zeros((1, 3), jnp.int32), jnp.int32(0)
    return decoding.beam_search(
      model,
      (cache, weights.sum()),
      batch_size=1,
      max_decode_length=3,
      num_decodes=1,
      alpha=alpha,
    ).scores.sum()

  gradients = jax.grad(total, argnums=(0, 1))(weights, jnp.float32(0.6))
  assert all(not np.any(g) for g in gradients)


def test_rows_are_reordered_on_the_axis_that_is_given():
  weights = jnp.asarray(beam_models.history_weights(2, 4, 4))
  expected = beam_models.compiled_search(
    weights, jnp.float32(0.6), num_decodes=3
  )

  def rows_last(tokens, cache):
    weights, history, position, table = cache
    logits, (weights, history, position) = beam_models.history_model(
      tokens, (weights, history.T, position)
    )
    # A leaf without rows that changes, and is as long as there are rows.
    return logits, (weights, history.T, position, jnp.roll(table, 1))

  result = decoding.beam_search(
    rows_last,
    (
      jnp.repeat(weights, 3, axis=0),
      jnp.zeros((4, 6), jnp.int32),
      jnp.int32(0),
      jnp.arange(6),
    ),
    batch_size=2,
    max_decode_length=4,
    num_decodes=3,
    row_axes=(0, 1, -1, -1),
  )
  np.testing.assert_array_equal(result.tokens, expected.tokens)
  np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-6)


def test_nan_logits_show_in_the_scores():
  distributions = np.zeros((2, 2, 4))
  distributions[0, 1] = np.nan
  result = beam_models.run_scripted(distributions, num_decodes=2)
  assert np.isnan(result.scores[0]).any()
  assert np.isfinite(result.scores[1]).all()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"max_decode_length": 0}, "got 0; set max_decode_length"),
    ({"num_decodes": 0}, "got 0; set num_decodes"),
    ({"alpha": float("nan")}, "finite alpha, got nan; set alpha"),
    ({"alpha": float("inf")}, "finite alpha, got inf; set alpha"),
    ({"start_tokens": jnp.zeros(3)}, r"start_tokens of shape \[4\], got \[3\]"),
    ({"row_lengths": jnp.zeros(2)}, r"row_lengths of shape \[4\], got \[2\]"),
    ({"batch_size": 3}, r"6 rows on axis 0 of .*got the shape \(4, 4\)"),
    ({"row_axes": [2, -1]}, r"4 rows on axis 2 of .* set row_axes"),
  ],
)
def test_wrong_settings_say_what_to_change(settings, message):
  defaults = {"batch_size": 2, "max_decode_length": 3, "num_decodes": 2}
  with pytest.raises(ValueError, match=message):
    decoding.beam_search(
      lambda tokens, cache: (cache[0], cache),
      [jnp.zeros((4, 4)), jnp.int32(0)],
      **(defaults | settings),
    )
