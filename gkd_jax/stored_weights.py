"""A checkpoint's matrices, converted as they are read to the types of a network.

See `projections` for the types. One matrix is in memory in float32 at a time, of
which a network keeps a quarter in int8.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gkd_jax import layer_stacks, projections, stored_arrays

_BLOCK = 2**22  # numbers that are rounded at a time


def converted(
  flat: Mapping[str, stored_arrays.StoredArray], like: Mapping[str, Any]
) -> dict[str, stored_arrays.StoredArray]:
  """Arrays in the types of a network, unread; scales come beside what has them.

  Those that the network does not have stay as they are.

  Args:
    flat: path, of an unrolled network, to array.
    like: path that the network has, scanned or not, to anything with a `dtype`.
  """
  result = {}
  for name, array in flat.items():
    target = layer_stacks.place(name, like)
    if target + projections.SCALE in like:
      axis = projections.SCALED_AXIS[target.rpartition("/")[2]]
      matrix = _Int8(array.cast("float32", name), axis, name)
      result[name], result[name + projections.SCALE] = matrix.arrays()
    elif target in like:
      result[name] = array.cast(jnp.dtype(like[target].dtype).name, name)
    else:
      result[name] = array
  return result


class _Int8:
  """One matrix in steps of 1/127 of the largest number of each column, or row.

  As `fused_loss.quantize_head`. A part of it needs the largest number of whole
  columns: those are read first, once for each range of columns that is asked
  for, and with the part itself where that has them whole.

  Args:
    array: float32, unread.
    axis: that has scales.
    name: for the message.
  """

  def __init__(self, array: stored_arrays.StoredArray, axis: int, name: str):
    self._array, self._axis, self._name = array, axis, name
    self._scales: dict[tuple[int, int], np.ndarray] = {}

  def arrays(
    self,
  ) -> tuple[stored_arrays.StoredArray, stored_arrays.StoredArray]:
    """The int8 matrix and its float32 scales."""
    if len(self._array.shape) != 2:  # of another model, as the reader will say
      return self._array, self._array
    shape = self._array.shape
    of_scales = (shape[self._axis],)
    return (
      stored_arrays.StoredArray(shape, np.dtype(np.int8), self._values),
      stored_arrays.StoredArray(
        of_scales, np.dtype(np.float32), lambda index: self._of(index[0])
      ),
    )

  def _values(self, index):
    part = self._array.fetch(index)
    columns, rows = index[self._axis], index[1 - self._axis]
    length = self._array.shape[1 - self._axis]
    whole = part if rows.indices(length) == (0, length, 1) else None
    scales = np.expand_dims(self._of(columns, whole), 1 - self._axis)
    steps = np.where(scales > 0, scales, np.float32(1))
    values = np.empty(part.shape, np.int8)
    # By blocks of rows: no second float32 copy.
    size = max(1, _BLOCK // max(1, part.shape[1]))
    for i in range(0, part.shape[0], size):
      of_block = steps if self._axis else steps[i : i + size]
      values[i : i + size] = np.rint(part[i : i + size] / of_block)
    return values

  def _of(self, columns, whole=None):
    """Scales of a range of columns; `whole` is what was read of them, if it was."""
    start, stop, _ = columns.indices(self._array.shape[self._axis])
    if (start, stop) not in self._scales:
      if whole is None:
        every = slice(None), columns
        whole = self._array.fetch(every if self._axis else every[::-1])
      over = 1 - self._axis
      largest = np.maximum(whole.max(axis=over), -whole.min(axis=over))
      if not np.all(np.isfinite(largest)):
        raise ValueError(
          f"expected finite numbers to round to int8, got others in"
          f" {self._name}; set TEACHER_WEIGHTS to 'auto', or another checkpoint"
        )
      self._scales[start, stop] = largest / np.float32(127)
    return self._scales[start, stop]
