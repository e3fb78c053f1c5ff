"""Products of matrices and attention, in the form that a backend is fast at.

The numbers are the same in all forms, but for the order of float32 sums. Only a
CPU has a form of its own, and only where all of a product is on one device.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gkd_jax import partitioning

# A product of few rows with a large matrix: from how many entries and columns of
# the matrix on, and up to how many rows, `_by_rows_of_kernel` was the faster one.
_LARGE, _WIDE, _FEW = 2**19, 2**10, 16
# How it cuts the matrix: rows that are added in one go, columns of a block.
_ROWS_AT_ONCE, _BLOCK = 8, 32
# Attention weights of one head, T · S, from which a head at a time is faster.
_LONG = 2**18


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`[N, D]` times `[D, F]`, `[N, F]`.

  Decoding multiplies a few rows with each matrix of a model, which is then a
  matter of reading the matrix once. XLA's CPU backend copies it into another
  order first; on a Xeon the other form took 0.45 to 0.83 of the time for 4 to
  16 rows and matrices that came from memory, 512 x 1,024 to 5,120 x 2,048.
  """
  (n, d), f = x.shape, kernel.shape[1]
  is_cut = d % _ROWS_AT_ONCE == 0 and f % _BLOCK == 0
  is_large = d * f >= _LARGE and f >= _WIDE
  if _on_one_device() and is_cut and is_large and 2 <= n <= _FEW:
    return jax.lax.platform_dependent(
      x, kernel, cpu=_by_rows_of_kernel, default=jnp.dot
    )
  return jnp.dot(x, kernel)


def _by_rows_of_kernel(x, kernel):
  """Adds a few rows of the kernel at a time to the result, as they lie."""
  (n, d), f = x.shape, kernel.shape[1]
  blocks = kernel.reshape(d, f // _BLOCK, _BLOCK)
  factors = x.T.reshape(d // _ROWS_AT_ONCE, _ROWS_AT_ONCE, n)
  factors = factors.astype(jnp.float32)
  at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)

  def add(i, so_far):
    here = at(factors, i)
    for j in range(_ROWS_AT_ONCE):
      # One row to a slice: what is sliced for several is computed for each.
      row = at(blocks, i * _ROWS_AT_ONCE + j)
      term = here[j][None, :, None] * row[:, None].astype(jnp.float32)
      so_far = so_far + term
    return so_far

  zeros = jnp.zeros((f // _BLOCK, n, _BLOCK), jnp.float32)
  y = jax.lax.fori_loop(0, d // _ROWS_AT_ONCE, add, zeros)
  y = jnp.swapaxes(y, 0, 1).reshape(n, f)
  return y.astype(jnp.result_type(x, kernel))


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array,
  drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """Softmax attention; the softmax is float32.

  Args:
    query: `[B, H, T, K]`, scaled.
    key: `[B, H, S, K]`.
    value: `[B, H, S, K]`.
    bias: float32, broadcastable to `[B, H, T, S]`.
    drop: dropout of the weights, or None.

  Returns:
    `[B, H, T, K]` in the query's type.
  """
  heads, (t, s) = math.prod(query.shape[:2]), (query.shape[2], key.shape[2])
  if drop is None and _on_one_device() and heads > 1 and t * s >= _LONG:
    return jax.lax.platform_dependent(
      query, key, value, bias, cpu=_one_head_at_a_time, default=_attend
    )
  return _attend(query, key, value, bias, drop)


def _attend(query, key, value, bias, drop=None):
  logits = jnp.einsum("bhtk,bhsk->bhts", query, key).astype(jnp.float32)
  weights = jax.nn.softmax(logits + bias, axis=-1).astype(query.dtype)
  if drop is not None:
    weights = drop(weights)
  return jnp.einsum("bhts,bhsk->bhtk", weights, value)


def _attend_by_sum(query, key, value, bias):
  """Divides by the weights' sum last, where there are K numbers and not S.

  On a CPU alone: for 2 rows of 1,024 on each TPU v5e, XL to small, XSum, the
  compiler planned 1.47 GiB of temporaries with it and 1.20 without.
  """
  logits = jnp.einsum("bhtk,bhsk->bhts", query, key).astype(jnp.float32) + bias
  largest = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - jax.lax.stop_gradient(largest))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = jnp.einsum("bhts,bhsk->bhtk", weights.astype(query.dtype), value)
  return (out / total).astype(query.dtype)


def _one_head_at_a_time(query, key, value, bias):
  """One head of one row at a time, whose weights are in a CPU's cache.

  They are computed again for the gradient, which takes no longer than to keep
  them.
  """
  rows, heads, length, _ = query.shape
  bias = jnp.broadcast_to(bias, (rows, heads, length, key.shape[2]))
  alone = [x.reshape(-1, 1, 1, *x.shape[2:]) for x in (query, key, value, bias)]
  of_one = jax.checkpoint(_attend_by_sum)
  out = jax.lax.map(lambda head: of_one(*head), tuple(alone))
  return out.reshape(query.shape)


def _on_one_device():
  """Whether no mesh splits what is being traced."""
  return math.prod(partitioning.auto_axes().values()) == 1
