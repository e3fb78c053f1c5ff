"""The mesh that a function is traced on, seen from inside."""

import jax


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
