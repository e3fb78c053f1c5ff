"""The mesh that a function is traced on, seen from inside."""

from collections.abc import Mapping

import jax

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
