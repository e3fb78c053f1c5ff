"""Arrays of a checkpoint that are read lazily, whole or in part.

A reader of a format lists the arrays of its files. Renaming, transposing and
converting them reads nothing; arrays are read one at a time when they are placed
or written. So an import has one array in memory, and a host that needs a slice
reads that slice. The same holds for conversion to a network's dtypes (int8
included, see `network.projections`).

Readers use the names of an unrolled network, one array for each layer:
`t5x.split_scanned` splits stacks, and `joined_stacks` joins them for a scanned
network (see `network.layer_loops`).
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gkd_jax.network import layer_loops, projections

# One slice for each axis.
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class StoredArray:
  """An array that is not read yet.

  Attributes:
    shape: of the whole array.
    dtype: of the array when read.
    fetch: reads the part at an `Index`.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[Index], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Returns the size in bytes when read."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

  def read(self, index: Index | None = None) -> np.ndarray:
    """Reads the array, or the part at `index` (one slice per axis)."""
    whole = (slice(None),) * len(self.shape)
    return self.fetch(whole if index is None else index)

  def transpose(self) -> "StoredArray":
    """Returns the transpose of a matrix."""
    return StoredArray(
      self.shape[::-1], self.dtype, lambda index: self.fetch(index[::-1]).T
    )

  def cast(self, dtype: str | None, name: str) -> "StoredArray":
    """Converts a floating-point array; returns other arrays unchanged.

    Args:
      dtype: "float32", "bfloat16", "float16", or None to change nothing.
      name: of the array, for the message of an overflow.
    """
    if (
      dtype is None
      or self.dtype == dtype
      or not jnp.issubdtype(self.dtype, jnp.floating)
    ):
      return self
    return StoredArray(
      self.shape,
      jnp.dtype(dtype),
      lambda index: _convert(self.fetch(index), jnp.dtype(dtype), name),
    )


def from_array(array: Any) -> StoredArray:
  """Wraps an array in memory."""
  return StoredArray(
    tuple(np.shape(array)),
    np.dtype(getattr(array, "dtype", None) or np.asarray(array).dtype),
    lambda index: np.asarray(array)[index],
  )


def flatten(tree: Mapping[str, Any]) -> dict[str, StoredArray]:
  """Flattens a nested dict of arrays; paths are joined by "/".

  Raises:
    ValueError: if a name contains "/".
  """
  flat = traverse_util.flatten_dict(dict(tree))
  for names in flat:
    if any("/" in name for name in names):
      raise ValueError(
        f"expected parameter names without '/', got {names}; rename it"
      )
  return {
    "/".join(names): x if isinstance(x, StoredArray) else from_array(x)
    for names, x in flat.items()
  }


def unflatten(flat: Mapping[str, StoredArray]) -> dict[str, Any]:
  """Makes a nested dict of paths joined by "/", without reading arrays."""
  return traverse_util.unflatten_dict(dict(flat), sep="/")


def read_tree(
  flat: Mapping[str, StoredArray], dtype: str | None = None
) -> dict[str, Any]:
  """Reads all arrays into a nested dict of numpy.

  The largest are read first: decoding an array takes up to its size once more,
  which is then below the peak at the end.

  Args:
    flat: path to array.
    dtype: see `StoredArray.cast`.
  """
  ordered = sorted(flat.items(), key=lambda item: -item[1].nbytes)
  return traverse_util.unflatten_dict(
    {name: x.cast(dtype, name).read() for name, x in ordered}, sep="/"
  )


def place_tree(
  flat: Mapping[str, StoredArray], shardings: Any
) -> dict[str, Any]:
  """Reads arrays onto devices; each process reads the parts of its devices.

  Args:
    flat: path to array.
    shardings: nested dict of `jax.sharding.Sharding`.

  Returns:
    Nested dict of `jax.Array`.
  """
  placed = {}
  for name, sharding in traverse_util.flatten_dict(shardings, sep="/").items():
    x = flat[name]
    parts: dict[Any, np.ndarray] = {}

    def part(index, x=x, parts=parts):
      # Devices with replicas ask for the same part.
      key = tuple((s.start, s.stop) for s in index)
      if key not in parts:
        parts[key] = x.read(index)
      return parts[key]

    placed[name] = jax.make_array_from_callback(x.shape, sharding, part)
  return traverse_util.unflatten_dict(placed, sep="/")


def _convert(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  with np.errstate(over="ignore"):
    y = x.astype(dtype)
  if dtype.itemsize < x.dtype.itemsize and not np.array_equal(
    np.isfinite(x), np.isfinite(y)
  ):
    largest = np.abs(x[np.isfinite(x)]).max()
    raise ValueError(
      f"expected numbers that {dtype} can hold, got {largest:.3g} in {name}; set"
      " --dtype to bfloat16 or float32"
    )
  return y


_BLOCK = 2**22  # numbers rounded at a time


def converted(
  flat: Mapping[str, StoredArray], like: Mapping[str, Any]
) -> dict[str, StoredArray]:
  """Converts arrays to the dtypes of a network, lazily; adds scales of int8.

  Arrays that the network does not have are not changed.

  Args:
    flat: path, of an unrolled network, to array.
    like: path of the network, scanned or not, to anything with a `dtype`.
  """
  result = {}
  for name, array in flat.items():
    target = place_in_stack(name, like)
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
  """A matrix in int8 with one scale per column, or row: its maximum / 127.

  Equal to `network.projections.quantize`. A part of it needs the maxima of whole
  columns: these are read first, once for each range of columns, unless the part
  itself has whole columns.

  Args:
    array: float32, not read yet.
    axis: the axis with scales.
    name: of the array, for the message.
  """

  def __init__(self, array: StoredArray, axis: int, name: str):
    self._array, self._axis, self._name = array, axis, name
    self._scales: dict[tuple[int, int], np.ndarray] = {}

  def arrays(
    self,
  ) -> tuple[StoredArray, StoredArray]:
    """Returns the int8 matrix and its float32 scales."""
    if len(self._array.shape) != 2:  # another model's; `check_matches` raises
      return self._array, self._array
    shape = self._array.shape
    of_scales = (shape[self._axis],)
    return (
      StoredArray(shape, np.dtype(np.int8), self._values),
      StoredArray(
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
    # By blocks of rows, to avoid a second float32 copy.
    size = max(1, _BLOCK // max(1, part.shape[1]))
    for i in range(0, part.shape[0], size):
      of_block = steps if self._axis else steps[i : i + size]
      values[i : i + size] = np.rint(part[i : i + size] / of_block)
    return values

  def _of(self, columns, whole=None):
    """Returns scales of a range of columns; `whole` is their content, if read."""
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


_LAYER = re.compile(rf"(.+)/{layer_loops.NAME}_(\d+)/(.+)")


def place_in_stack(name: str, names: Collection[str]) -> str:
  """Returns the path of a layer's stack, or `name` if there is none.

  Args:
    name: path in an unrolled network.
    names: paths of the network.
  """
  match = _LAYER.fullmatch(name)
  stack = match and f"{match[1]}/{layer_loops.NAME}/{match[3]}"
  return stack if stack in names else name


def joined_stacks(
  flat: Mapping[str, StoredArray], names: Collection[str]
) -> dict[str, StoredArray]:
  """Joins the layers' arrays for which a network has stacks, lazily.

  Layers are not joined if one is missing or has another shape.

  Args:
    flat: path, of an unrolled network, to array.
    names: paths of the network.
  """
  result, stacks = {}, {}
  for name, array in flat.items():
    match, stack = _LAYER.fullmatch(name), place_in_stack(name, names)
    if match and stack != name:
      stacks.setdefault(stack, {})[int(match[2])] = name
    else:
      result[name] = array
  for stack, layers in stacks.items():
    arrays = {name: flat[name] for _, name in sorted(layers.items())}
    alike = len({array.shape for array in arrays.values()}) == 1
    if alike and sorted(layers) == list(range(len(layers))):
      result[stack] = _stack(list(arrays.values()))
    else:
      result |= arrays
  return result


def _stack(layers) -> StoredArray:
  """Stacks layers along a first axis; a part reads only its layers."""

  def fetch(index):
    return np.stack([layer.fetch(index[1:]) for layer in layers[index[0]]])

  return StoredArray((len(layers), *layers[0].shape), layers[0].dtype, fetch)
