"""One step of the toy pair, as an oracle for other ways to take it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toy_models


def gradient(source, *, microbatches=1, run=jax.jit, **kwargs):
  """Gradient (the parameters' change under SGD), metrics."""
  model, student, teacher = toy_models.gkd(
    student_data_fraction=0.5, divergence="jsd", beta=0.5, **kwargs
  )
  step, optimizer = toy_models.sgd_step(
    model, source, num_microbatches=microbatches
  )
  state = toy_models.state(student, optimizer)
  new, metrics = run(step)(state, teacher, toy_models.batch())
  return jax.tree.map(jnp.subtract, state.params, new.params), metrics


def assert_same(a, b, tolerance=1e-5):
  difference = optax.tree.norm(
    jax.tree.map(lambda x, y: np.asarray(x) - y, a, b)
  )
  assert difference <= tolerance * optax.tree.norm(b)


@functools.cache
def reference(source, normalization):
  return gradient(source, length_normalization=normalization)
