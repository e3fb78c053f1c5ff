"""Work on a chunk's logits, a few rows at a time on a CPU."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax.kernels import dispatch

# Numbers of a block of rows: about ten arrays of this size fit a CPU's cache.
_BLOCK = 2**17
# Least and most columns of a sum that a part of a product is added to.
_NARROW, _WIDE = 512, 4096


def rows_gradient(
  losses_of: Callable[..., tuple[jax.Array, Any]],
  teacher_logits: jax.Array,
  student_logits: jax.Array,
  shares: jax.Array,
  others: Mapping[str, Any] | None = None,
  *,
  block: int | None = None,
) -> tuple[jax.Array, Any, jax.Array]:
  """Computes losses of rows, and the gradient of Σ share · loss by the student.

  XLA's CPU backend writes each intermediate array of a softmax or a divergence
  to memory. A few rows at a time, these stay in the cache, and no array but
  arguments and results has the size of all rows.

  Args:
    losses_of: a function of the teacher's and the student's logits and of
      `others` that treats every row by itself; returns losses, and a tree of
      auxiliary arrays.
    teacher_logits: `[N, V]`.
    student_logits: `[N, V]`.
    shares: `[N]`.
    others: trees of arrays `[N, ...]`, by keyword of `losses_of`.
    block: most rows at a time on a CPU; by default as fit into its cache.

  Returns:
    The losses `[N]`, the auxiliary arrays `[N, ...]`, and the gradient `[N, V]`.
  """
  rows = math.prod(student_logits.shape[:-1])
  if block is None:
    block = max(1, _BLOCK // student_logits.shape[-1])
  if rows > block:
    plain = functools.partial(rows_gradient, losses_of, block=rows)
    kernel = lambda *arrays: jax.lax.map(
      lambda row: plain(*row), arrays, batch_size=block
    )
    return dispatch.on_cpu(
      kernel, plain, teacher_logits, student_logits, shares, others
    )
  of_student = functools.partial(losses_of, teacher_logits, **others or {})
  losses, pull, aux = jax.vjp(of_student, student_logits, has_aux=True)
  return losses, aux, *pull(shares)


def add_product(total: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  """Computes total + xᵀ y.

  XLA's CPU backend writes a product to memory before it is added. A few columns
  at a time, no second array of the sum's size is needed.

  Args:
    total: `[D, V]` float32.
    x: `[N, D]` float32.
    y: `[N, V]` float32.

  Returns:
    `[D, V]` float32.
  """
  size = total.shape[1]
  width = next(w for w in range(min(size, _WIDE), 0, -1) if size % w == 0)
  if not _NARROW <= width < size:
    return _add_product(total, x, y)
  kernel = functools.partial(_add_product_by_columns, width)
  return dispatch.on_cpu(kernel, _add_product, total, x, y)


def _add_product(total, x, y):
  return total + jnp.einsum("nd,nv->dv", x, y)


def _add_product_by_columns(width, total, x, y):
  def add(i, total):
    columns = functools.partial(
      jax.lax.dynamic_slice_in_dim,
      start_index=i * width,
      slice_size=width,
      axis=1,
    )
    part = _add_product(columns(total), x, columns(y))
    return jax.lax.dynamic_update_slice_in_dim(total, part, i * width, axis=1)

  return jax.lax.fori_loop(0, total.shape[1] // width, add, total)
