"""A loss computed over as many positions as the longest output of a batch needs.

A compiled program has one length, T, and most batches end before it. Here the
program holds the loss at several lengths, and each run takes one branch. Its
compilation and its text grow with the number of lengths; memory is that of the
longest.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import types

# (length, trained, fixed) -> (loss, aux); a gradient is taken of `trained` alone.
LossOfLength = Callable[[int, Any, Any], tuple[jax.Array, Any]]


def check(buckets: Sequence[int], setting: str) -> None:
  """Raises a ValueError unless the lengths are at least 1 and ascend."""
  ascending = [*buckets] == sorted({*buckets})
  if not ascending or any(length < 1 for length in buckets):
    raise ValueError(
      f"expected ascending lengths of at least 1, got {tuple(buckets)};"
      f" set {setting}"
    )


def lengths(buckets: Sequence[int], longest: int) -> tuple[int, ...]:
  """The buckets that are shorter than the longest length, and that.

  >>> lengths((64, 128, 256), 128)
  (64, 128)

  Args:
    buckets: ascending.
    longest: of an array that is to be cut.
  """
  return (*(length for length in buckets if length < longest), longest)


def used_length(weights: jax.Array) -> jax.Array:
  """Positions up to the last one that counts in any row, `[]` int32.

  >>> int(used_length(jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])))
  2

  Args:
    weights: `[B, T]`, 0 at what does not count.
  """
  counts = jnp.any(weights > 0, axis=0)
  return jnp.max(jnp.where(counts, jnp.arange(1, counts.size + 1), 0))


def cut(
  batch: types.Batch, length: int, prefixes: tuple[str, ...]
) -> dict[str, jax.Array]:
  """A batch with the first positions of some features `[B, T, ...]`.

  Args:
    batch: features.
    length: how many positions are kept.
    prefixes: of the names of the features that are cut.
  """
  return {
    name: x[:, :length] if name.startswith(prefixes) else x
    for name, x in batch.items()
  }


def loss(
  loss_of: LossOfLength,
  lengths: tuple[int, ...],
  used: jax.Array,
  trained: types.PyTree,
  fixed: types.PyTree,
) -> tuple[jax.Array, Any]:
  """The loss at the shortest length that suffices; one length is computed.

  Value and gradient are formed together in one branch, and the backward pass
  scales the gradient. (A gradient taken through the branches would keep what each
  of them would need for it.)

  Args:
    loss_of: the loss of its arguments cut to a length, and auxiliary results of
      the same shapes at every length, which get no gradient.
    lengths: ascending.
    used: `[]` int32, see `used_length`; on a mesh the same on all devices.
    trained: what the gradient is of.
    fixed: what else the loss reads: arrays, keys included.

  Returns:
    The loss `[]`, and the auxiliary results.
  """
  return _loss(loss_of, lengths, used, trained, fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(loss_of, lengths, used, trained, fixed):
  of = [functools.partial(loss_of, length) for length in lengths]
  return jax.lax.switch(_place(lengths, used), of, trained, fixed)


def _loss_forward(loss_of, lengths, used, trained, fixed):
  of = [
    jax.value_and_grad(functools.partial(loss_of, length), has_aux=True)
    for length in lengths
  ]
  return jax.lax.switch(_place(lengths, used), of, trained, fixed)


def _loss_backward(loss_of, lengths, gradient, d_results):
  del loss_of, lengths
  scale = d_results[0]
  scaled = jax.tree.map(lambda g: scale.astype(g.dtype) * g, gradient)
  return None, scaled, None


_loss.defvjp(_loss_forward, _loss_backward)


def _place(lengths, used):
  """Of the shortest length that is at least `used`; the last one serves all."""
  return jnp.sum(used > jnp.array(lengths[:-1], jnp.int32))
