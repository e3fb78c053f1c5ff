"""Reductions over the vocabulary."""

import functools

import jax
import jax.numpy as jnp

from gkd_jax.kernels import dispatch


def argmax(x: jax.Array) -> jax.Array:
  """Computes `jnp.argmax(x, axis=-1)`, the lowest index of equal ones.

  A CPU takes two sweeps, which it vectorises: `jnp.argmax` took ten times as
  long for 8 rows of 32,128. Indices are compared as float32, which is exact up
  to 2^24 and again faster.

  >>> argmax(jnp.array([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])).tolist()
  [1, 0]

  Args:
    x: `[..., V]` float, without NaN.

  Returns:
    `[...]` int32.
  """
  plain = functools.partial(jnp.argmax, axis=-1)
  return dispatch.on_cpu(_two_sweeps, plain, jax.lax.stop_gradient(x))


def _two_sweeps(x):
  largest = jnp.max(x, axis=-1, keepdims=True)
  ids = jax.lax.broadcasted_iota(jnp.float32, x.shape, x.ndim - 1)
  first = jnp.min(jnp.where(x < largest, x.shape[-1], ids), axis=-1)
  return first.astype(jnp.int32)
