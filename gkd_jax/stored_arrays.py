"""Arrays of a checkpoint, read when they are needed, whole or in part.

A reader of a format lists what its files hold without reading it; what is
renamed, transposed or converted stays unread; whoever places or writes the
arrays reads them one at a time. So an import holds one array in memory, and a
host that needs a slice reads that slice.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

# One slice for each axis.
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class StoredArray:
  """One array that has not been read.

  Attributes:
    shape: of the whole array.
    dtype: of what is read.
    fetch: reads the part that an `Index` means.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[Index], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Size when read."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

  def read(self, index: Index | None = None) -> np.ndarray:
    """Reads all of it, or the part that `index` (one slice per axis) means."""
    whole = (slice(None),) * len(self.shape)
    return self.fetch(whole if index is None else index)

  def transpose(self) -> "StoredArray":
    """A matrix's transpose."""
    return StoredArray(
      self.shape[::-1], self.dtype, lambda index: self.fetch(index[::-1]).T
    )

  def cast(self, dtype: str | None, name: str) -> "StoredArray":
    """Converts a floating-point array; any other, and for None, is itself.

    Args:
      dtype: name of a floating-point type, "float32", "bfloat16", "float16".
      name: for the message of an overflow.
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
  """Wraps an array that is in memory."""
  return StoredArray(
    tuple(np.shape(array)),
    np.dtype(getattr(array, "dtype", None) or np.asarray(array).dtype),
    lambda index: np.asarray(array)[index],
  )


def flatten(tree: Mapping[str, Any]) -> dict[str, StoredArray]:
  """Nested dict of arrays or stored arrays -> path, joined by "/", to them.

  Raises:
    ValueError: if a name holds "/".
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
  """Path, joined by "/", to array -> nested dict of them, unread."""
  return traverse_util.unflatten_dict(dict(flat), sep="/")


def read_tree(
  flat: Mapping[str, StoredArray], dtype: str | None = None
) -> dict[str, Any]:
  """Reads all arrays into a nested dict of numpy.

  The largest come first: decoding one takes up to its size again, which then
  lies below the end's peak. Equal ones keep the order of `flat`.

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
  """Reads arrays onto devices; each process reads what its devices hold.

  Args:
    flat: path to array.
    shardings: nested dict of `jax.sharding.Sharding`, of the same structure.

  Returns:
    Nested dict of `jax.Array`.
  """
  placed = {}
  for name, sharding in traverse_util.flatten_dict(shardings, sep="/").items():
    x = flat[name]
    parts: dict[Any, np.ndarray] = {}

    def part(index, x=x, parts=parts):
      # Devices that hold copies ask for the same part.
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
