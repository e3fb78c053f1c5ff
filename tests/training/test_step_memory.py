"""Memory of the training step as XLA's CPU backend plans it."""

import functools

import jax
import jax.numpy as jnp

from gkd_jax import optimizers, partitioning, training
from gkd_jax.partitioning import sharding

ROWS, WIDTH = 4096, 256


class _TwoTables:
  """A look-up and a head: two gradients, nearly nothing beside them."""

  def train_loss(self, params, teacher_params, batch, **kwargs):
    del teacher_params, kwargs
    x = jnp.take(params["embedding"], batch["ids"], axis=0)
    logits = jnp.tanh(x @ params["head"])
    # A weight that is not known before the step runs, as that of a real batch.
    return jnp.sum(logits**2), jnp.sum(batch["ids"] + 1.0), {}


class _LookUpAndWork(_TwoTables):
  """A look-up, and work without a gradient that needs two tables' bytes."""

  def train_loss(self, params, teacher_params, batch, **kwargs):
    del teacher_params, kwargs
    x = jnp.take(params["embedding"], batch["ids"], axis=0)
    wide = batch["x"] @ batch["x"].T  # as large as a table
    wide = jnp.sort(jnp.tanh(wide), axis=0)
    work = jnp.sum(jnp.sort(wide @ wide, axis=1))
    return jnp.sum(jnp.tanh(x)) * work, jnp.ones(()), {}


def _temporaries(model, params, jit):
  """Planned temporary bytes of a step, in tables."""
  optimizer = optimizers.adamw(1e-3, weight_decay=0.1)
  state = jax.eval_shape(
    lambda p: training.create(p, optimizer.transform), params
  )
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  batch = {
    "ids": jax.ShapeDtypeStruct((4,), jnp.int32),
    "x": shape((1024, 8)),
    "decoder_target_tokens": jax.ShapeDtypeStruct((4, 1), jnp.int32),
  }
  step = functools.partial(
    training.train_step, model=model, optimizer=optimizer, seed=0, source="data"
  )
  compiled = jit(step, donate_argnums=(0,)).lower(state, {}, batch).compile()
  table = ROWS * WIDTH * 4
  return compiled.memory_analysis().temp_size_in_bytes / table


def test_gradients_are_held_once():
  params = {
    "embedding": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
    "head": jax.ShapeDtypeStruct((WIDTH, ROWS), jnp.float32),
  }
  # Quotients, and squares for the norm, took one or two tables more.
  assert 2 <= _temporaries(_TwoTables(), params, jax.jit) < 4.5


def test_a_cpus_program_begins_no_gradient_before_the_work():
  params = {"embedding": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)}
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  jit = functools.partial(partitioning.jit, mesh=mesh)
  assert 2 <= _temporaries(_LookUpAndWork(), params, jit) < 2.1
  # What the order is for: by default the gradient's zeros lie there meanwhile.
  assert _temporaries(_LookUpAndWork(), params, jax.jit) >= 3


def test_an_unknown_option_of_the_compiler_is_left_out(monkeypatch):
  option = {"xla_cpu_of_another_version": "1"}
  monkeypatch.setattr(sharding, "_LEAST_MEMORY", option)
  sharding._knows_least_memory.cache_clear()
  try:
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    assert partitioning.jit(lambda x: 2 * x, mesh)(3.0) == 6
  finally:
    sharding._knows_least_memory.cache_clear()
