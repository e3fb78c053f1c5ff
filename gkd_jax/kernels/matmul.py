"""Matrix products of a few rows, in the form that a CPU is fast at."""

import functools

import jax
import jax.numpy as jnp

from gkd_jax.kernels import dispatch

# From how many entries and columns of the matrix on, and up to how many rows,
# `_by_rows_of_kernel` was the faster form.
_LARGE, _WIDE, _FEW = 2**19, 2**10, 16
# How it cuts the matrix: rows that are added in one step, columns of a block.
_ROWS_AT_ONCE, _BLOCK = 8, 32


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Computes the matrix product x @ kernel.

  Decoding multiplies a few rows with each matrix of a model, and its speed is
  that of reading the matrix once. XLA's CPU backend first copies the matrix
  into another order; on a Xeon the other form took 0.45 to 0.83 of the time for
  4 to 16 rows and matrices read from memory, 512 x 1,024 to 5,120 x 2,048.

  Args:
    x: `[N, D]`.
    kernel: `[D, F]`.

  Returns:
    `[N, F]`; the forms differ by the order of float32 sums.
  """
  (n, d), f = x.shape, kernel.shape[1]
  is_cut = d % _ROWS_AT_ONCE == 0 and f % _BLOCK == 0
  is_large = d * f >= _LARGE and f >= _WIDE
  if is_cut and is_large and 2 <= n <= _FEW:
    return dispatch.on_cpu(_by_rows_of_kernel, jnp.dot, x, kernel)
  return jnp.dot(x, kernel)


def _by_rows_of_kernel(x, kernel):
  """Adds a few rows of the kernel at a time to the result."""
  (n, d), f = x.shape, kernel.shape[1]
  blocks = kernel.reshape(d, f // _BLOCK, _BLOCK)
  factors = x.T.reshape(d // _ROWS_AT_ONCE, _ROWS_AT_ONCE, n)
  factors = factors.astype(jnp.float32)
  at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)

  def add(i, so_far):
    here = at(factors, i)
    for j in range(_ROWS_AT_ONCE):
      # One row per slice: XLA recomputes a slice for each row taken of it.
      row = at(blocks, i * _ROWS_AT_ONCE + j)
      term = here[j][None, :, None] * row[:, None].astype(jnp.float32)
      so_far = so_far + term
    return so_far

  zeros = jnp.zeros((f // _BLOCK, n, _BLOCK), jnp.float32)
  y = jax.lax.fori_loop(0, d // _ROWS_AT_ONCE, add, zeros)
  y = jnp.swapaxes(y, 0, 1).reshape(n, f)
  return y.astype(jnp.result_type(x, kernel))


def times_transposed(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """Computes x @ matrixᵀ.

  XLA's CPU backend is faster at matrix @ xᵀ, in five sixths of the time at the
  size of T5's output head.

  Args:
    x: `[N, V]`.
    matrix: `[D, V]`.

  Returns:
    `[N, D]`.
  """
  return dispatch.on_cpu(_matrix_first, _x_first, x, matrix)


def _x_first(x, matrix):
  return jnp.einsum("nv,dv->nd", x, matrix)


def _matrix_first(x, matrix):
  product = jnp.einsum("nv,dv->dn", x, matrix)
  # The barrier keeps XLA from turning it into the other form.
  return jax.lax.optimization_barrier(product).T
