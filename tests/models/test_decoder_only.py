"""The decoder-only network and model: values, cache, samples, loss, data."""

import itertools

import beam_oracle
import golden_t5x
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy_decoder_only as toy
from flax import traverse_util

from gkd_jax import decoding

both_ways = pytest.mark.parametrize("prefix_lm", [False, True])


# --- Against T5X ----------------------------------------------------------------


def test_names_shapes_and_axes_are_t5x():
  _, info = golden_t5x.load("decoder_only_tiny")
  model, _, batch, _ = golden_t5x.decoder_only(False)
  shapes = {k: v.shape for k, v in batch.items()}
  variables = jax.eval_shape(
    lambda: model.get_initial_variables(jax.random.key(0), shapes)
  )
  assert set(variables) == {"params", "params_axes"}
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  assert {k: list(v.shape) for k, v in flat.items()} == info["params"]
  axes = traverse_util.flatten_dict(variables["params_axes"], sep="/")
  assert {k: str(v) for k, v in axes.items()} == info["params_axes"]


def test_untied_head_is_named_as_t5x_names_it():
  model = toy.model(config={"logits_via_embedding": False})
  variables = jax.eval_shape(
    lambda: model.get_initial_variables(jax.random.key(0), toy.SHAPES)
  )
  head = variables["params"]["decoder"]["logits_dense"]["kernel"]
  axes = variables["params_axes"]["decoder"]["logits_dense"]["kernel_axes"]
  assert (head.shape, axes.names) == ((8, toy.VOCAB), ("embed", "vocab"))


@both_ways
def test_logits_loss_and_scores_equal_t5x(prefix_lm):
  model, params, batch, expected = golden_t5x.decoder_only(prefix_lm)
  logits = jax.jit(model.logits)(params, batch)
  np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=1e-5)
  loss, _ = jax.jit(model.loss_fn)(params, batch, None)
  np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
  scores = jax.jit(model.score_batch)(params, batch)
  np.testing.assert_allclose(scores, expected["scores"], rtol=1e-6)


@both_ways
def test_greedy_continuations_equal_t5x(prefix_lm):
  model, params, batch, expected = golden_t5x.decoder_only(prefix_lm)
  tokens = jax.jit(model.predict_batch)(params, batch)
  np.testing.assert_array_equal(tokens, expected["greedy"])


# --- The network ------------------------------------------------------------------


@both_ways
def test_logits_equal_float64(prefix_lm):
  model = toy.model(
    config={"num_layers": 2}, inputs_bidirectional_attention=prefix_lm
  )
  params = toy.params(model, 0)
  pairs = toy.pairs(8)
  long = (list(range(2, 16)) * 2, [*range(3, 16), 1])  # far buckets
  batch = toy.packed([[long, pairs[0]], pairs[1:5], pairs[5:8]], 48)
  expected = toy.oracle(model.config, params, batch, prefix_lm)
  kept = batch["decoder_target_tokens"] > 0
  assert kept.sum() == 42 + sum(len(p) + len(o) for p, o in pairs)
  logits = np.asarray(jax.jit(model.logits)(params, batch))
  np.testing.assert_allclose(logits[kept], expected[kept], rtol=1e-4, atol=1e-4)
  other = toy.oracle(model.config, params, batch, not prefix_lm)
  assert np.abs(other[kept] - expected[kept]).max() > 0.1


@both_ways
def test_packed_logits_equal_unpacked(prefix_lm):
  model = toy.model(inputs_bidirectional_attention=prefix_lm)
  params, pairs = toy.params(model, 0), toy.pairs(4)
  forward = jax.jit(model.logits)
  packed = np.asarray(forward(params, toy.packed([pairs], 30)))[0]
  apart = np.asarray(forward(params, toy.rows(pairs)))
  start = 0
  for i, (prompt, output) in enumerate(pairs):
    size = len(prompt) + len(output)
    np.testing.assert_allclose(
      packed[start : start + size], apart[i, :size], rtol=1e-5, atol=1e-5
    )
    start += size
  assert start > 20


@both_ways
def test_prefilled_decoding_equals_the_full_forward_pass(prefix_lm):
  model = toy.model(inputs_bidirectional_attention=prefix_lm)
  params, pairs = toy.params(model, 3), toy.pairs(8)
  # Outputs of the batch are not read: these are taken out.
  batch = toy.rows([(prompt, []) for prompt, _ in pairs])
  result = toy.sampler(model)(params, batch, jax.random.key(4))
  tokens, log_probs = map(np.asarray, result)
  outputs = [row[: np.count_nonzero(row)].tolist() for row in tokens]
  prompts = [prompt for prompt, _ in pairs]
  ends = [o[-1] == 1 for o in outputs]
  full = [
    len(p) + len(o) == toy.WIDTH for p, o in zip(prompts, outputs, strict=True)
  ]
  assert all(np.logical_or(ends, full)) and any(ends) and not all(ends)
  forced = toy.rows(list(zip(prompts, outputs, strict=True)))
  logits = jax.jit(model.logits)(params, forced).at[:, :, 0].set(-jnp.inf)
  distribution = np.asarray(jax.nn.log_softmax(logits))
  for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
    at = len(prompt) + np.arange(len(output))
    np.testing.assert_allclose(
      log_probs[i, : len(output)],
      distribution[i, at, output],
      rtol=1e-4,
      atol=1e-5,
    )
    assert not log_probs[i, len(output) :].any()
    assert not tokens[i, len(output) :].any()


def test_a_cache_from_nothing_decodes_as_t5x_calls_it():
  model = toy.model()
  params, batch = toy.params(model, 0), toy.batch(2)
  tokens, targets = (
    jnp.asarray(batch[f"decoder_{n}_tokens"]) for n in ("input", "target")
  )
  apply = lambda variables, *args: model.module.apply(
    {"params": params} | variables,
    *args,
    enable_dropout=False,
    decode=True,
    mutable=["cache"],
  )
  _, variables = apply({}, jnp.ones_like(tokens), jnp.ones_like(tokens))
  step = jax.jit(apply)
  expected = jax.jit(model.logits)(params, batch)
  for t in range(4):
    logits, variables = step(variables, tokens[:, t, None], tokens[:, t, None])
    kept = np.asarray(targets[:, t] > 0)
    np.testing.assert_allclose(
      logits[kept, 0], expected[kept, t], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("policy", ["minimal", "full"])
def test_remat_changes_nothing(policy):
  def gradient(policy):
    model = toy.model(config={"remat_policy": policy})
    loss = lambda p: model.loss_fn(p, toy.batch(), None)[0]
    return jax.jit(jax.grad(loss))(toy.params(model, 0))

  for a, b in zip(
    jax.tree.leaves(gradient("none")),
    jax.tree.leaves(gradient(policy)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- Samples ------------------------------------------------------------------------


@both_ways
def test_sampled_frequencies_follow_the_softmax(prefix_lm):
  model = toy.model(vocab_size=4, inputs_bidirectional_attention=prefix_lm)
  params = toy.params(model, 5, scale=1.0)
  draws = 4000
  prompts = [[1], [3, 2]]
  batch = toy.rows([(p, []) for p in prompts for _ in range(draws)], width=4)
  tokens = np.asarray(
    toy.sampler(model)(params, batch, jax.random.key(8)).tokens
  )
  for i, prompt in enumerate(prompts):
    outputs = _possible_outputs(4 - len(prompt))
    rows = toy.rows([(prompt, o) for o in outputs], width=4)
    logits = np.asarray(jax.jit(model.logits)(params, rows), np.float64)
    logits[:, :, 0] = -np.inf
    distribution = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    expected = [
      np.exp(
        sum(
          distribution[r, len(prompt) + t, token] for t, token in enumerate(o)
        )
      )
      for r, o in enumerate(outputs)
    ]
    np.testing.assert_allclose(sum(expected), 1, rtol=1e-6)
    drawn = [tuple(row[row > 0]) for row in tokens[i * draws : (i + 1) * draws]]
    counts = np.array([drawn.count(o) for o in outputs])
    assert counts.sum() == draws
    p = scipy.stats.chisquare(counts, draws * np.array(expected)).pvalue
    assert p > 1e-3, (prompt, counts, expected)


def _possible_outputs(room):
  """All outputs of the tokens 1 (EOS), 2 and 3 that end, or fill the room."""
  outputs = []
  for length in range(1, room + 1):
    for start in itertools.product((2, 3), repeat=length - 1):
      ends = (1, 2, 3) if length == room else (1,)
      outputs += [(*start, end) for end in ends]
  return outputs


def test_rows_end_where_they_are_full():
  fed = []

  def model(tokens, cache):
    jax.debug.callback(lambda tokens: fed.append(tokens.tolist()), tokens)
    return jnp.tile(jnp.array([[0.0, 0.0, 9.0]]), (4, 1)), cache

  result = decoding.sample(
    model,
    jnp.zeros(()),
    None,
    batch_size=4,
    max_decode_length=5,
    temperature=0,
    row_lengths=jnp.array([2, 0, 3, 1]),
  )
  jax.effects_barrier()
  np.testing.assert_array_equal(
    result.tokens,
    [[2, 2, 0, 0, 0], [0, 0, 0, 0, 0], [2, 2, 2, 0, 0], [2, 0, 0, 0, 0]],
  )
  assert len(fed) == 3  # no step for the sake of rows that are full
  with pytest.raises(
    ValueError, match=r"row_lengths of shape \[4\], got \[1\]"
  ):
    decoding.sample(
      model,
      jnp.zeros(()),
      None,
      batch_size=4,
      max_decode_length=5,
      temperature=0,
      row_lengths=jnp.array([2]),
    )


def test_a_longest_output_cuts_and_changes_nothing_before():
  model, short = toy.model(), toy.model(max_output_length=2)
  params, batch = toy.params(model, 3), toy.batch()
  whole, cut = (
    np.asarray(toy.sampler(m)(params, batch, jax.random.key(4)).tokens)
    for m in (model, short)
  )
  np.testing.assert_array_equal(cut[:, :2], whole[:, :2])
  assert not cut[:, 2:].any() and whole[:, 2:].any()


def test_the_best_of_several_decodes_of_each_prompt():
  model = toy.model(vocab_size=16, num_real_tokens=12)
  params, batch = toy.params(model, 3), toy.batch(4)
  options = {"temperature": 1.0, "suppress_ids": (0,)}
  decode = jax.jit(
    lambda *args: model.predict_batch_with_aux(
      *args, options, return_all_decodes=True, num_decodes=3
    )
  )
  tokens, aux = decode(params, batch, jax.random.key(1))
  tokens, scores = np.asarray(tokens), np.asarray(aux["scores"])
  assert tokens.shape == (4, 3, toy.WIDTH) and tokens.max() == 11
  assert (np.diff(scores, axis=1) >= 0).all() and np.diff(scores).max() > 0.1
  prompts = [prompt for prompt, _ in toy.pairs(4)]
  for n in range(3):
    outputs = [row[row > 0].tolist() for row in tokens[:, n]]
    rows = toy.rows(list(zip(prompts, outputs, strict=True)))
    logits = np.array(jax.jit(model.logits)(params, rows))
    logits[:, :, [0, 12, 13, 14, 15]] = -np.inf
    distribution = np.asarray(jax.nn.log_softmax(logits))
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
      at = len(prompt) + np.arange(len(output))
      expected = distribution[i, at, output].sum()
      np.testing.assert_allclose(scores[i, n], expected, rtol=1e-4)


@pytest.mark.parametrize("prefix_lm", [False, True])
def test_beams_go_on_from_each_prompt_and_end_with_its_row(prefix_lm):
  model = toy.model(
    decode_fn=decoding.beam_search,
    inputs_bidirectional_attention=prefix_lm,
    default_decoder_params={"alpha": 0.6, "num_decodes": 3},
  )
  params = toy.params(model, 2)
  # Rooms of 2, 7 and 9 tokens.
  prompts = [[*range(2, 11), 1], [5, 7, 3, 9, 1], [6, 4, 1]]
  batch = toy.rows([(prompt, []) for prompt in prompts])
  decode = jax.jit(
    lambda *args: model.predict_batch_with_aux(*args, return_all_decodes=True)
  )
  tokens, aux = decode(params, batch)
  logits = jax.jit(model.logits)
  ended = set()
  for i, prompt in enumerate(prompts):

    def distribution(output, prompt=prompt):
      row = toy.rows([(prompt, [*output, 2])])
      # As targets they only mark what counts, a token 0 of the output too.
      row["decoder_target_tokens"][0, : len(prompt) + len(output) + 1] = 2
      return np.asarray(
        jax.nn.log_softmax(logits(params, row)[0, len(prompt) + len(output)]),
        np.float64,
      )

    expected = beam_oracle.best_outputs(
      distribution, toy.WIDTH - len(prompt), 0.6, 3
    )
    empty = 3 - len(expected)
    np.testing.assert_array_equal(tokens[i, :empty], 0)
    for n, (output, score) in enumerate(expected, start=empty):
      padded = [*output] + [0] * (toy.WIDTH - len(output))
      np.testing.assert_array_equal(tokens[i, n], padded)
      np.testing.assert_allclose(aux["scores"][i, n], score, rtol=1e-4)
      ended.add(output[-1] == 1)
  assert ended == {True, False}
