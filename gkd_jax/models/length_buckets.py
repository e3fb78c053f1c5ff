"""The loss at the shortest of a few lengths that holds a batch's longest output.

A compiled program has one length T, but most batches end before it. Here the
program contains the loss at several lengths and each step runs one of them.
Compilation time grows with the number of lengths; memory is that of the longest.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import types


def lengths(buckets: Sequence[int], longest: int) -> tuple[int, ...]:
  """Returns the buckets below the longest length, and that length.

  >>> lengths((64, 128, 256), 128)
  (64, 128)

  Args:
    buckets: ascending.
    longest: of an array that is to be cut.
  """
  return (*(length for length in buckets if length < longest), longest)


def used_length(weights: jax.Array) -> jax.Array:
  """Returns the position after the last one that counts in any row, `[]` int32.

  >>> int(used_length(jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])))
  2

  Args:
    weights: `[B, T]`, 0 at what does not count.
  """
  counts = jnp.any(weights > 0, axis=0)
  return jnp.max(jnp.where(counts, jnp.arange(1, counts.size + 1), 0))


def cut(batch: types.Batch, length: int) -> dict[str, jax.Array]:
  """Returns a batch with the first positions of each target-length feature.

  Args:
    batch: features; those of the encoder and those of shape `[B]` stay whole.
    length: number of positions that are kept.
  """
  return {
    name: x if name.startswith("encoder_") or x.ndim == 1 else x[:, :length]
    for name, x in batch.items()
  }


def bucketed(
  outputs_loss: Callable[..., tuple[jax.Array, types.Metrics]],
  buckets: Sequence[int],
  student: types.TransformerModel,
) -> Callable[..., tuple[jax.Array, types.Metrics]]:
  """Wraps `DistillationModel.outputs_loss` to run at the shortest length that suffices.

  Results are those of the full length to rounding, except for dropout on the
  decoder's self-attention weights, whose masks have another shape.

  Args:
    outputs_loss: the loss at the batch's length.
    buckets: ascending lengths; the batch's own is added.
    student: says which positions count.
  """

  def loss(student_side, teacher_side, batch, step, dropout_key=None):
    weights = student.loss_weights(batch)
    fixed = teacher_side, batch, step, dropout_key

    def at_length(length, trained, fixed):
      teacher_side, batch, *rest = fixed
      return outputs_loss(trained, teacher_side, cut(batch, length), *rest)

    return shortest_loss(
      at_length,
      lengths(buckets, weights.shape[1]),
      used_length(weights),
      student_side,
      fixed,
    )

  return loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def shortest_loss(
  loss_of: Callable[[int, Any, Any], tuple[jax.Array, Any]],
  lengths: tuple[int, ...],
  used: jax.Array,
  trained: types.PyTree,
  fixed: types.PyTree,
) -> tuple[jax.Array, Any]:
  """Computes a loss at the first length that is at least `used`.

  Args:
    loss_of: `(length, trained, fixed) -> (loss, aux)`, of the same shapes at every
      length; `aux` gets no gradient.
    lengths: ascending; the last one serves all that is longer.
    used: `[]` int32, see `used_length`; on a mesh the same on all devices.
    trained: what the gradient is of.
    fixed: what else the loss reads.

  Returns:
    The loss `[]` and `aux`.
  """
  branches = [functools.partial(loss_of, length) for length in lengths]
  return jax.lax.switch(_bucket(lengths, used), branches, trained, fixed)


def _loss_forward(loss_of, lengths, used, trained, fixed):
  # Value and gradient in one branch: a gradient taken through the switch would
  # keep the residuals of every branch.
  branches = [
    jax.value_and_grad(functools.partial(loss_of, length), has_aux=True)
    for length in lengths
  ]
  return jax.lax.switch(_bucket(lengths, used), branches, trained, fixed)


def _loss_backward(loss_of, lengths, gradient, d_results):
  del loss_of, lengths
  scale = d_results[0]
  scaled = jax.tree.map(lambda g: scale.astype(g.dtype) * g, gradient)
  return None, scaled, None


shortest_loss.defvjp(_loss_forward, _loss_backward)


def _bucket(lengths, used):
  """Returns the index of the shortest length that is at least `used`."""
  return jnp.sum(used > jnp.array(lengths[:-1], jnp.int32))
