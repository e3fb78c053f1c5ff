"""A tiny student and teacher, and a batch of very different lengths."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import models, network, optimizers, training, types

VOCAB = 16
SHAPES = {"encoder_input_tokens": (1, 6), "decoder_input_tokens": (1, 7)}


def model(emb_dim, dropout_rate=0.0, **kwargs):
  """A T5 1.1 of one layer on each side."""
  config = network.T5Config(
    vocab_size=VOCAB,
    emb_dim=emb_dim,
    num_heads=2,
    head_dim=4,
    mlp_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_activations=("gelu", "linear"),
    dropout_rate=dropout_rate,
  )
  return models.EncoderDecoderModel(network.Transformer(config), **kwargs)


def params(a_model, seed):
  """Random parameters; the head is enlarged so that samples end early."""
  return draw_params(a_model, seed, SHAPES, 1.5)


_DRAWN = {}


def draw_params(a_model, seed, shapes, scale=1.0):
  """Parameters spread as initial ones, times `scale`; copied for each caller.

  Drawn by numpy: the program of all initial distributions takes seconds to
  compile.
  """
  key = repr((a_model.config, seed, shapes, scale))
  if key not in _DRAWN:
    _DRAWN[key] = initial_params(a_model, seed, shapes, scale)
  return jax.tree.map(jnp.array, _DRAWN[key])


def initial_params(a_model, seed, shapes, scale=1.0):
  """As `draw_params`, arrays of numpy, drawn anew."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    values = np.ones(x.shape)
    if path[-1].key != "scale":
      fan_in = 1 if path[-1].key == "embedding" else x.shape[-2]
      values = rng.normal(0, fan_in**-0.5, x.shape)
    return (scale * values).astype(x.dtype)

  return jax.tree_util.tree_map_with_path(draw, _abstract(a_model, shapes))


def _abstract(a_model, shapes):
  return jax.eval_shape(
    lambda: a_model.get_initial_variables(jax.random.key(0), shapes)
  )["params"]


def gkd(dropout_rate=0.0, **kwargs):
  """`GKDModel`, student's and teacher's parameters."""
  student, teacher = model(8, dropout_rate), model(12)
  wrapped = models.GKDModel(student, teacher, **kwargs)
  return wrapped, params(student, 1), params(teacher, 2)


def batch(rows=8, seed=0):
  """T5X's features; target lengths run from 1 to 7."""
  rng = np.random.default_rng(seed)
  features = {}
  for name, length in (("encoder_input", 6), ("decoder_target", 7)):
    tokens = rng.integers(2, VOCAB, (rows, length)).astype(np.int32)
    for row in range(rows):
      end = row % length
      tokens[row, end] = 1
      tokens[row, end + 1 :] = 0
    features[f"{name}_tokens"] = tokens
  targets = features["decoder_target_tokens"]
  features["decoder_input_tokens"] = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  features["decoder_loss_weights"] = (targets > 0).astype(np.int32)
  return features


def sgd_step(a_model, source, **kwargs):
  """(step function, optimizer): plain SGD, so that updates are gradients."""
  import optax

  from gkd_jax import schedules

  optimizer = optimizers.Optimizer(schedules.constant(1.0), optax.sgd(1.0))

  step = functools.partial(
    training.train_step,
    model=a_model,
    optimizer=optimizer,
    seed=0,
    source=source,
    **kwargs,
  )
  return step, optimizer


def state(student_params, optimizer):
  """The state before the first step."""
  return training.create(student_params, optimizer.transform)


def stack_layers(params):
  """An unrolled network's parameters with each side's layers stacked, by hand."""
  result = {}
  for side, tree in params.items():
    layers = sorted(k for k in tree if k.startswith("layers_"))
    result[side] = {k: v for k, v in tree.items() if k not in layers}
    if layers:
      result[side]["layers"] = jax.tree.map(
        lambda *x: np.stack(x), *(tree[k] for k in layers)
      )
  return result


def deep(width, depth=2):
  """A toy T5 1.1 of several layers."""
  config = dataclasses.replace(
    model(width).config, num_encoder_layers=depth, num_decoder_layers=depth
  )
  return models.EncoderDecoderModel(network.Transformer(config))


def normal_params(model, seed):
  """Parameters of a toy, all as N(0, 0.4), the norms' scales too."""
  rng = np.random.default_rng(seed)
  normal = lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32)
  return jax.tree.map(normal, _abstract(model, SHAPES))


def inputs(source, rows=8, key=None):
  """`types.StepInputs` of step 0 for the first rows of a batch."""
  key = jax.random.key(0) if key is None else key
  return types.StepInputs(source, jnp.int32(0), key, jnp.arange(rows))


def train_loss(model, params, teacher, batch, *args, **kwargs):
  """`model.train_loss` of step 0, compiled; further arguments as of `inputs`."""
  loss = lambda *arrays: model.train_loss(*arrays, inputs(*args, **kwargs))
  return jax.jit(loss)(params, teacher, batch)


def sample(model, params, batch, key, **options):
  """`model.sample` after `encode`, compiled."""
  run = lambda params, batch, key: model.sample(
    params, model.encode(params, batch), batch, key, **options
  )
  return jax.jit(run)(params, batch, key)


def settings(batch_size, **partitioner):
  """Groups of settings of a run on toy batches, which reads no data."""
  lengths = {"inputs": 6, "targets": 7}
  return {
    "dataset": training.DatasetConfig("toy", lengths, batch_size),
    "partitioner": training.PartitionerConfig(**partitioner),
  }
