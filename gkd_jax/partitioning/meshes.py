"""The mesh that a function is traced on, seen from inside."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gkd_jax import types

SLICE_AXIS, DATA_AXIS, MODEL_AXIS = "slice", "data", "model"


def auto_axes() -> dict[str, int]:
  """Sizes of the mesh axes that the compiler splits arrays over; {} without.

  Axes of a pmap or a shard_map are manual: there each device has its own call.
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
  """The mesh axes that rows are split over, and how many parts that makes.

  Slices are the outermost part of data parallelism:

  >>> rows({"data": 4, "model": 2})
  ('data', 4)
  >>> rows({"slice": 2, "data": 2, "model": 2})
  (('slice', 'data'), 4)

  Args:
    sizes: of the axes that there are: `auto_axes()`, or a mesh's shape.
    data_axis: name of the axis within a slice.
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
  """Returns a mesh `("data", "model")`, of several slices `("slice", ...)`.

  A slice is what TPUs call the chips that their own links (ICI) join; slices are
  joined by the data centre's network (DCN), which is slower. TPUs of a slice are
  put in the order of their links.

  Args:
    num_partitions: devices that share one copy of the model (the model axis).
    devices: all of them by default.
    num_slices: length of the slice axis; None is as many as the TPUs are in,
      and 1 of other devices, which are cut in order.

  Raises:
    ValueError: the number of devices, or of those in a slice, is no multiple of
      `num_partitions`, or slices are not as `num_slices` says.
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
  """The devices of each slice."""
  found = {}
  for device in devices:
    # A GPU's `slice_index` is its host's: no reason to keep parameters there.
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
  """Devices of a slice as a grid `[data, model]`: neighbours are near."""
  if _is_tpu(devices[0]):
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return np.array(devices).reshape(shape)


def _is_tpu(device):
  return device.platform == "tpu"


def row_shards(mesh: Mesh) -> int:
  """How many parts a batch's rows are split into."""
  return rows(mesh.shape)[1]


def replicated(mesh: Mesh) -> NamedSharding:
  """One copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over slices and the data axis, copies over the model axis."""
  return NamedSharding(mesh, P(rows(mesh.shape)[0]))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> types.Batch:
  """Global arrays, split by rows, from each process's rows.

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
  """This process's rows of an array that is split by rows, in order."""
  parts = {
    shard.index[0].start or 0: shard.data for shard in x.addressable_shards
  }
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def process_grid(mesh: Mesh) -> np.ndarray:
  """The process of each device of a mesh, `[slices x data, model]`."""
  processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
  return processes.reshape(-1, mesh.shape[MODEL_AXIS])
