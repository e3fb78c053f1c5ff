"""On-policy steps of networks with rotary positions, split in any way."""

import functools

import jax
import nightly
import numpy as np
import pytest
import toy_decoder_only
import toy_models
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


def t5gemma(width):
  fields = {"norm_unit_offset": True, "post_norms": True}
  fields |= {"attention_softcap": 3.0, "final_softcap": width / 2}
  sides = config(width + 4, 1, **fields), config(width, 1, **fields)
  return models.EncoderDecoderModel(
    network.T5Gemma(network.T5GemmaConfig(*sides))
  )


MODELS = {"causal": causal, "t5gemma": t5gemma}
SHAPES = toy_models.SHAPES | toy_decoder_only.SHAPES


def batch(name):
  toys = {"causal": toy_decoder_only, "t5gemma": toy_models}
  return toys[name].batch()


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
def gradient(name, microbatches=1, partitions=None, chunk=0):
  """Gradient (the parameters' change under SGD) of a step on samples, metrics."""
  student, teacher = MODELS[name](8), MODELS[name](12)
  model = models.GKDModel(
    student, teacher, divergence="jsd", beta=0.5, loss_chunk_size=chunk
  )
  before = drawn(student, 1)
  step, optimizer = toy_models.sgd_step(
    model, "student", num_microbatches=microbatches
  )
  if partitions is None:
    state = toy_models.state(before, optimizer)
    new, metrics = jax.jit(step)(state, drawn(teacher, 2), batch(name))
  else:
    mesh = partitioning.make_mesh(partitions)
    params, shardings = place(student, before, mesh)
    state = toy_models.state(params, optimizer)
    places = partitioning.state_shardings(state, shardings, mesh)
    new, metrics = training.jit_step(step, mesh, places)(
      jax.tree.map(jax.device_put, state, places),
      place(teacher, drawn(teacher, 2), mesh)[0],
      partitioning.put_batch(batch(name), mesh),
      source="student",
    )
  change = lambda a, b: np.asarray(a) - np.asarray(b)
  return jax.tree.map(change, before, new.params), jax.device_get(metrics)


SPLITS = {
  "microbatches": {"microbatches": 2},
  "chunks": {"chunk": 5},
  "mesh 8x1": {"partitions": 1, "chunk": 2},
  "mesh 4x2": {"partitions": 2},
  "mesh 2x4": {"partitions": 4, "chunk": 5},
}


@pytest.mark.parametrize(
  ("name", "split"),
  nightly.besides(
    [
      ("causal", "microbatches"),
      ("causal", "mesh 4x2"),
    ],
    MODELS,
    SPLITS,
  ),
)
def test_an_on_policy_step_is_the_same_when_it_is_split(name, split):
  expected, metrics = gradient(name)
  got, got_metrics = gradient(name, **SPLITS[split])
  assert_same(got, expected)
  for key in ("loss", "sampled_length"):
    np.testing.assert_allclose(got_metrics[key], metrics[key], rtol=1e-5)
  ended, rows = metrics["sampled_eos"]
  assert 0 < ended <= rows == 8


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
