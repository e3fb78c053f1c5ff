"""Slots that are refilled: the same samples, and how busy the slots are."""

import functools

import jax
import jax.numpy as jnp
import nightly
import numpy as np
import pytest
import toy_decoder_only
import toy_models
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_jax import decoding, partitioning
from gkd_jax.decoding import loops

ROWS, VOCAB, LENGTH = 11, 6, 7
AXES = {"position": 0, "bias": 1, "table": -1}


def _model(tokens, cache):
  """Logits of the last token, of the row, and of the row's own position."""
  of_row = jnp.swapaxes(cache["bias"], 0, 1)  # [B, T, V]
  here = cache["position"][:, None, None]
  bias = jnp.take_along_axis(of_row, here, axis=1)[:, 0]
  logits = cache["table"][tokens] + bias
  return logits, cache | {"position": cache["position"] + 1}


@functools.partial(
  jax.jit,
  static_argnames=("slots", "temperature"),
  compiler_options={"xla_backend_optimization_level": 0},
)
def _sample(seed, active, row_lengths, slots, temperature):
  keys = jax.random.split(jax.random.key(seed), 3)
  cache = {
    "position": jnp.zeros(ROWS, jnp.int32),
    "bias": jax.random.normal(keys[0], (LENGTH, ROWS, VOCAB)),
    "table": jax.random.normal(keys[1], (VOCAB, VOCAB)),
  }
  return decoding.sample(
    _model,
    cache,
    keys[2],
    batch_size=ROWS,
    max_decode_length=LENGTH,
    temperature=temperature,
    start_tokens=jnp.arange(ROWS) % VOCAB,
    row_ids=7 * jnp.arange(ROWS),
    row_lengths=row_lengths,
    active=active,
    suppress_ids=(0,),
    slots=slots,
    row_axes=AXES,
  )


@settings(max_examples=40, deadline=None)
@given(
  seed=st.integers(0, 2**31 - 1),
  active=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
  lengths=st.lists(st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS),
  slots=st.sampled_from([1, 4, 10]),
  temperature=st.sampled_from([0.0, 1.0]),
)
def test_a_row_is_sampled_alike_in_slots(
  seed, active, lengths, slots, temperature
):
  rows = jnp.array(active), jnp.array(lengths)
  together = _sample(seed, *rows, None, temperature)
  in_slots = _sample(seed, *rows, slots, temperature)
  np.testing.assert_array_equal(in_slots.tokens, together.tokens)
  np.testing.assert_allclose(in_slots.log_probs, together.log_probs, atol=1e-6)


def _says(script):
  """`decode_with_slots`'s arguments for a model whose row b says `script[b]`."""

  def model(tokens, cache):
    del tokens
    here = cache["position"][:, None]
    token = jnp.take_along_axis(cache["script"], here, axis=1)[:, 0]
    logits = jax.nn.one_hot(token, VOCAB)
    return logits, cache | {"position": cache["position"] + 1}

  rows, length = script.shape
  cache = {"position": jnp.zeros(rows, jnp.int32), "script": script}

  def draw(logits, keys, positions):
    del keys, positions
    return jnp.argmax(logits, axis=-1), jnp.max(logits, axis=-1)

  return (model, cache, draw), {
    "row_axes": {"position": 0, "script": 0},
    "row_keys": None,
    "start_tokens": jnp.zeros(rows, jnp.int32),
    "row_lengths": jnp.full(rows, length),
    "active": jnp.full(rows, True),
    "max_decode_length": length,
    "eos_id": 1,
  }


@pytest.mark.parametrize(("place", "steps"), [(0, 72), (20, 80), (31, 88)])
def test_one_long_row_leaves_the_other_slots_busy(place, steps):
  # 63 rows of 8 tokens and one of 64, in 8 slots: 568 tokens.
  script = np.full((64, 64), 5, np.int32)
  script[:, 7] = 1
  script[place, 7] = 5
  arguments, options = _says(jnp.asarray(script))
  done = loops.decode_with_slots(*arguments, slots=8, **options)
  written = script * (np.arange(64) < 8)
  written[place] = 5
  np.testing.assert_array_equal(done.tokens, written)
  np.testing.assert_array_equal(done.log_probs, written > 0)
  # Place 0: eight rows, then 56 in the seven other slots, 8 + 8 * 8 steps. Place
  # 20: it starts in the third turn, at step 16, and is the last to end; so is
  # place 31, from step 24.
  assert int(done.steps) == steps
  assert int(done.busy) == 63 * 8 + 64
  assert int(done.busy) / (8 * int(done.steps)) >= 0.8


def test_no_step_where_nothing_is_active():
  arguments, options = _says(jnp.full((5, 3), 4))
  options["active"] = jnp.full(5, False)
  done = loops.decode_with_slots(*arguments, slots=2, **options)
  assert int(done.steps) == 0
  np.testing.assert_array_equal(done.tokens, 0)


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_models_sample_alike_in_slots(kind):
  if kind == "encoder-decoder":
    model = toy_models.model(8)
    params, batch = toy_models.params(model, 6), toy_models.batch(7)
    params = jax.tree.map(lambda x: 2 * x, params)  # rows end sooner
  else:
    model = toy_decoder_only.model(8)
    params, batch = toy_decoder_only.params(model, 3), toy_decoder_only.batch(7)

  def run(slots):
    return jax.jit(
      lambda key: model.predict_batch_with_aux(
        params,
        batch,
        key,
        {"temperature": 1.0, "slots": slots, "suppress_ids": (0,)},
        return_all_decodes=True,
        num_decodes=2,
      )
    )(jax.random.key(5))

  tokens, aux = run(None)
  # Rows end at different steps, or the test would say nothing.
  assert len(np.unique(np.count_nonzero(tokens, axis=-1))) > 2
  in_slots, aux_in_slots = run(3)
  np.testing.assert_array_equal(in_slots, tokens)
  np.testing.assert_allclose(aux_in_slots["scores"], aux["scores"], atol=1e-5)


def test_a_step_in_slots_is_the_step():
  losses = []
  for slots in (None, 3):
    model, params, teacher_params = toy_models.gkd(decode_slots=slots)
    inputs = toy_models.inputs("student", key=jax.random.key(2))
    loss, metrics = jax.jit(
      lambda p, t, b, model=model, inputs=inputs: model.train_loss(
        p, t, b, inputs
      )
    )(params, teacher_params, toy_models.batch())
    losses.append([loss, metrics["loss"][1], metrics["sampled_length"][0]])
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_wrong_slots_say_what_to_set():
  sample = functools.partial(
    decoding.sample,
    _model,
    {},
    jax.random.key(0),
    batch_size=4,
    max_decode_length=2,
  )
  with pytest.raises(ValueError, match="at least 1 slot, got 0; set DECODE_SL"):
    sample(slots=0, row_axes={})
  with pytest.raises(
    ValueError, match="expected row_axes with slots, got None"
  ):
    sample(slots=2)
  model, params, _ = toy_models.gkd(decode_slots=3)
  step = partitioning.jit(model.sample_batch, partitioning.make_mesh())
  with pytest.raises(
    ValueError, match="8 shards of data divide, got 7; set BA"
  ):
    step(params, toy_models.batch(7), jax.random.key(0))


@pytest.mark.parametrize("partitions", nightly.of([1, 2], [2]))
def test_each_shard_has_a_queue_of_its_own(partitions):
  samples = []
  for slots, mesh in (
    (None, partitioning.make_mesh(devices=jax.devices()[:1])),
    (2, partitioning.make_mesh(partitions)),
  ):
    model, params, _ = toy_models.gkd(decode_slots=slots)
    sample = partitioning.jit(model.sample_batch, mesh)
    batch = partitioning.put_batch(toy_models.batch(24), mesh)
    params = jax.tree.map(lambda x: 2 * x, params)
    params = jax.device_put(params, partitioning.replicated(mesh))
    samples.append(np.asarray(sample(params, batch, jax.random.key(0))))
  assert len(np.unique(np.count_nonzero(samples[0], axis=1))) > 2
  np.testing.assert_array_equal(samples[1], samples[0])
