"""On-policy steps of networks with rotary positions, split in any way."""

import functools

import jax
import nightly
import numpy as np
import pytest
import toy_decoder_only
import toy_models
from checkpoint_states import assert_identical, opened
from toy_steps import assert_same

from gkd_jax import losses, models, network, partitioning, training


def config(width, depth, **fields):
  """A windowed layer, then a full one, with two key heads for four heads."""
  return network.RotaryConfig(
    vocab_size=toy_models.VOCAB,
    emb_dim=width,
    num_heads=4,
    num_kv_heads=2,
    num_layers=depth,
    head_dim=4,
    mlp_dim=8,
    window=3,
    window_pattern=(True, False),
    **fields,
  )


def causal(width):
  module = network.CausalTransformer(
    config(width, 2, qkv_bias=True, qk_norm=True)
  )
  return models.DecoderOnlyModel(module)


def t5gemma2(width):
  module = network.T5GemmaConfig(
    config(width, 1, qk_norm=True, centred_window=True),
    config(width, 2, qk_norm=True, merged_attention=True),
    end_of_image=3,
  )
  return models.EncoderDecoderModel(network.T5Gemma(module))


def t5gemma(width):
  fields = {"norm_unit_offset": True, "post_norms": True}
  fields |= {"attention_softcap": 3.0, "final_softcap": width / 2}
  sides = config(width + 4, 1, **fields), config(width, 1, **fields)
  return models.EncoderDecoderModel(
    network.T5Gemma(network.T5GemmaConfig(*sides))
  )


MODELS = {"causal": causal, "t5gemma": t5gemma, "t5gemma2": t5gemma2}
SHAPES = toy_models.SHAPES | toy_decoder_only.SHAPES


def batch(name):
  toys = toy_decoder_only if name == "causal" else toy_models
  return toys.batch()


def drawn(model, seed):
  """Random parameters."""
  shapes = jax.eval_shape(
    lambda: model.get_initial_variables(jax.random.key(0), SHAPES)
  )["params"]
  rng = np.random.default_rng(seed)
  normal = lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32)
  return jax.tree.map(normal, shapes)


def place(model, tree, mesh):
  """The parameters on a mesh, and their shardings."""
  axes = partitioning.logical_axes(
    jax.eval_shape(
      lambda: model.get_initial_variables(jax.random.key(0), SHAPES)
    )["params_axes"]
  )
  shardings = partitioning.param_shardings(tree, axes, mesh)
  return jax.tree.map(jax.device_put, tree, shardings), shardings


@functools.cache
def jitted(name, microbatches=1, chunk=0):
  """A compiled step on samples, its first state, and the teacher's parameters."""
  student, teacher = MODELS[name](8), MODELS[name](12)
  model = models.GKDModel(
    student, teacher, divergence="jsd", beta=0.5, loss_chunk_size=chunk
  )
  step, optimizer = toy_models.sgd_step(
    model, "student", num_microbatches=microbatches
  )
  state = toy_models.state(drawn(student, 1), optimizer)
  return jax.jit(step), state, drawn(teacher, 2)


def on_a_mesh(name, partitions, chunk):
  student, teacher = MODELS[name](8), MODELS[name](12)
  model = models.GKDModel(
    student, teacher, divergence="jsd", beta=0.5, loss_chunk_size=chunk
  )
  step, optimizer = toy_models.sgd_step(model, "student")
  mesh = partitioning.make_mesh(partitions)
  params, shardings = place(student, drawn(student, 1), mesh)
  state = toy_models.state(params, optimizer)
  places = partitioning.state_shardings(state, shardings, mesh)
  return training.jit_step(step, mesh, places)(
    jax.tree.map(jax.device_put, state, places),
    place(teacher, drawn(teacher, 2), mesh)[0],
    partitioning.put_batch(batch(name), mesh),
    source="student",
  )


def under_pmap(name, microbatches):
  student, teacher = MODELS[name](8), MODELS[name](12)
  model = models.GKDModel(student, teacher, divergence="jsd", beta=0.5)
  step, optimizer = toy_models.sgd_step(
    model, "student", num_microbatches=microbatches, axis_name="data"
  )
  state = toy_models.state(drawn(student, 1), optimizer)
  run = training.pmap_step(step, jax.devices()[:4])
  return run(state, drawn(teacher, 2), batch(name), source="student")


def in_microbatches(name, number, chunk):
  run, state, teacher = jitted(name, number, chunk)
  return run(state, teacher, batch(name))


SPLITS = {
  "microbatches": (in_microbatches, 2, 0),
  "chunks": (in_microbatches, 1, 5),
  "mesh 8x1": (on_a_mesh, 1, 2),
  "mesh 4x2": (on_a_mesh, 2, 0),
  "mesh 2x4": (on_a_mesh, 4, 5),
  "pmap": (under_pmap, 2),
}


@pytest.mark.parametrize(
  ("name", "split"),
  nightly.besides(
    [("causal", "mesh 4x2")],
    MODELS,
    SPLITS,
  ),
)
def test_an_on_policy_step_is_the_same_when_it_is_split(name, split):
  run, state, teacher = jitted(name)
  expected, metrics = run(state, teacher, batch(name))
  how, *options = SPLITS[split]
  got, got_metrics = how(name, *options)
  # Under SGD at rate 1 the change is the gradient.
  change = lambda new: jax.tree.map(
    lambda a, b: np.asarray(a) - np.asarray(b), state.params, new.params
  )
  assert_same(change(got), change(expected))
  for key in ("loss", "sampled_length"):
    np.testing.assert_allclose(got_metrics[key], metrics[key], rtol=1e-5)
  # Rows end at different places, and some do not end.
  ended, rows = metrics["sampled_eos"]
  assert 0 < ended < rows == 8


# test_trainer has an uneven end.
@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
def test_rows_without_a_prompt_change_nothing(name):
  """The end of a dataset: the last three rows, a microbatch's most, are empty."""
  run, state, teacher = jitted(name, 2)
  junk = batch(name)
  last = {k: np.where(np.arange(8)[:, None] < 5, x, 0) for k, x in junk.items()}
  new, metrics = run(state, teacher, last)
  assert metrics["loss"][1] == metrics["on_policy_share"][1] == 5
  five = {k: x[:5] for k, x in last.items()}
  expected, _ = jitted(name)[0](state, teacher, five)
  change = lambda new: jax.tree.map(
    lambda a, b: np.asarray(a) - np.asarray(b), state.params, new.params
  )
  assert_same(change(new), change(expected))


@pytest.mark.parametrize("name", nightly.of(MODELS, ["causal"]))
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
  run, state, teacher = jitted(name)
  given = batch(name)
  states = [state]
  for _ in range(3):
    states.append(run(states[-1], teacher, given)[0])
  with opened(tmp_path) as checkpointer:
    checkpointer.save(1, states[1])
    new = checkpointer.restore(1, jax.eval_shape(lambda: states[1]))
  for _ in range(2):
    new, _ = run(new, teacher, given)
  assert_identical(new, states[3])


def test_the_fused_loss_caps_each_models_logits_by_its_own_cap():
  student, teacher = t5gemma(8), t5gemma(12)
  assert (student.final_softcap, teacher.final_softcap) == (4, 6)
  values = []
  for chunk in (0, 5):
    model = models.GKDModel(student, teacher, loss_chunk_size=chunk)
    loss, metrics = toy_models.train_loss(
      model, drawn(student, 1), drawn(teacher, 2), batch("t5gemma"), "data"
    )
    values.append([loss, *(metrics[name] for name in losses.TOKEN_METRICS)])
  dense, fused = values
  for got, expected in zip(fused, dense, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5)
