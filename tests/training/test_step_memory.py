"""Memory of the training step as XLA's CPU backend plans it."""

import functools

import jax
import jax.numpy as jnp

from gkd_jax import optimizers, training

ROWS, WIDTH = 4096, 256


class _TwoTables:
  """A look-up and a head: two gradients, nearly nothing beside them."""

  def train_loss(self, params, teacher_params, batch, inputs):
    del teacher_params, inputs
    x = jnp.take(params["embedding"], batch["ids"], axis=0)
    logits = jnp.tanh(x @ params["head"])
    # A weight that is not known before the step runs, as that of a real batch.
    loss = jnp.sum(logits**2)
    return loss, {"loss": (loss, jnp.sum(batch["ids"] + 1.0))}


def _temporaries(model, params):
  """Planned temporary bytes of a step, in tables."""
  optimizer = optimizers.adamw(1e-3, weight_decay=0.1)
  state = jax.eval_shape(
    lambda p: training.create(p, optimizer.transform), params
  )
  batch = {
    "ids": jax.ShapeDtypeStruct((4,), jnp.int32),
    "decoder_target_tokens": jax.ShapeDtypeStruct((4, 1), jnp.int32),
  }
  step = functools.partial(
    training.train_step, model=model, optimizer=optimizer, seed=0, source="data"
  )
  compiled = (
    jax.jit(step, donate_argnums=(0,)).lower(state, {}, batch).compile()
  )
  table = ROWS * WIDTH * 4
  return compiled.memory_analysis().temp_size_in_bytes / table


def test_gradients_are_held_once():
  params = {
    "embedding": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
    "head": jax.ShapeDtypeStruct((WIDTH, ROWS), jnp.float32),
  }
  # Quotients, and squares for the norm, took one or two tables more.
  assert 2 <= _temporaries(_TwoTables(), params) < 4.5
