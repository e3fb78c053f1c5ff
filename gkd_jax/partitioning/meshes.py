"""Device meshes: axes, slices, and the rows of each process."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gkd_jax import types

SLICE_AXIS, DATA_AXIS, MODEL_AXIS = "slice", "data", "model"


def auto_axes() -> dict[str, int]:
  """Returns the sizes of the axes that the compiler shards over; {} without a mesh.

  Axes of a pmap or a shard_map are manual and do not count.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return {
    name: size
    for name, size, kind in zip(
      mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True
    )
    if kind == jax.sharding.AxisType.Auto
  }


def rows(
  sizes: Mapping[str, int], data_axis: str = DATA_AXIS
) -> tuple[str | tuple[str, ...] | None, int]:
  """Returns the mesh axes that rows are sharded over, and the number of shards.

  Slices are the outermost level of data parallelism:

  >>> rows({"data": 4, "model": 2})
  ('data', 4)
  >>> rows({"slice": 2, "data": 2, "model": 2})
  (('slice', 'data'), 4)

  Args:
    sizes: axis name to size: `auto_axes()`, or a mesh's shape.
    data_axis: name of the data axis within a slice.
  """
  axes = tuple(name for name in (SLICE_AXIS, data_axis) if name in sizes)
  parts = 1
  for name in axes:
    parts *= sizes[name]
  return (axes if len(axes) > 1 else axes[0] if axes else None), parts


def make_mesh(
  num_partitions: int = 1,
  devices: Sequence[Any] | None = None,
  num_slices: int | None = None,
) -> Mesh:
  """Returns a mesh `("data", "model")`, with several slices `("slice", ...)`.

  A slice is a set of TPU chips joined by their own links (ICI); slices are joined by
  the slower data-center network (DCN). Chips of a slice are ordered by their links.

  Args:
    num_partitions: devices that share one copy of the model (the model axis).
    devices: all of them by default.
    num_slices: length of the slice axis; None takes the TPUs' own number of
      slices, and 1 for other devices, which are divided in order.

  Raises:
    ValueError: `num_partitions` does not divide the devices of a slice, or
      `num_slices` does not match the devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  slices = _slices(devices, num_slices)
  of_slice = len(slices[0])
  if num_partitions < 1 or of_slice % num_partitions:
    where = " of a slice" if len(slices) > 1 else ""
    raise ValueError(
      f"expected NUM_PARTITIONS to divide the {of_slice} devices{where}, got"
      f" {num_partitions}; set NUM_PARTITIONS"
    )
  shape = of_slice // num_partitions, num_partitions
  grid = np.stack([_in_order(part, shape) for part in slices])
  if num_slices == 1 or len(slices) == 1:
    return Mesh(grid.reshape(-1, num_partitions), (DATA_AXIS, MODEL_AXIS))
  return Mesh(grid, (SLICE_AXIS, DATA_AXIS, MODEL_AXIS))


def _slices(devices, number):
  """Returns the devices of each slice."""
  found = {}
  for device in devices:
    # A GPU's `slice_index` is that of its host, which is no unit of parallelism.
    index = getattr(device, "slice_index", 0) if _is_tpu(device) else 0
    found.setdefault(index, []).append(device)
  slices = [found[index] for index in sorted(found)]
  sizes = {len(part) for part in slices}
  if len(sizes) > 1:
    raise ValueError(
      f"expected slices of one size, got sizes {sorted(sizes)}; start the run on"
      " whole slices of one shape"
    )
  if len(slices) > 1:
    if number not in (None, 1, len(slices)):
      raise ValueError(
        f"expected NUM_SLICES of {len(slices)}, which the devices are in, or 1,"
        f" got {number}; set NUM_SLICES"
      )
    return slices
  number = 1 if number is None else number
  if number < 1 or len(devices) % number:
    raise ValueError(
      f"expected NUM_SLICES to divide the {len(devices)} devices, got {number};"
      " set NUM_SLICES"
    )
  size = len(devices) // number
  return [devices[i * size : (i + 1) * size] for i in range(number)]


def _in_order(devices, shape):
  """Returns the devices of a slice as a grid `[data, model]`, neighbors close."""
  if _is_tpu(devices[0]):
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return np.array(devices).reshape(shape)


def _is_tpu(device):
  return device.platform == "tpu"


def row_shards(mesh: Mesh) -> int:
  """Returns the number of shards of a batch's rows."""
  return rows(mesh.shape)[1]


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding with one copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of rows over slices and data axis, replicated over model."""
  return NamedSharding(mesh, P(rows(mesh.shape)[0]))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> types.Batch:
  """Makes global arrays, sharded by rows, from each process's rows.

  Args:
    batch: features `[B / processes, ...]`.
    mesh: see `make_mesh`.

  Returns:
    Features `[B, ...]`.
  """
  sharding = batch_sharding(mesh)
  return {
    k: jax.make_array_from_process_local_data(sharding, v)
    for k, v in batch.items()
  }


def local_rows(x: jax.Array) -> np.ndarray:
  """Returns this process's rows of an array that is sharded by rows, in order."""
  parts = {
    shard.index[0].start or 0: shard.data for shard in x.addressable_shards
  }
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def process_grid(mesh: Mesh) -> np.ndarray:
  """Returns the process of each device of a mesh, `[slices x data, model]`."""
  processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
  return processes.reshape(-1, mesh.shape[MODEL_AXIS])


def of_processes(text: str) -> list[str]:
  """Returns the texts of all processes, in their order; each waits for all.

  Args:
    text: of this process.
  """
  if jax.process_count() == 1:
    return [text]
  content = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(content.size))
  padded = np.pad(content, (0, int(sizes.max()) - content.size))
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
  ]
