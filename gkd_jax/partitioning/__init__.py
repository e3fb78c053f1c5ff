"""The device mesh, and what is sharded over it.

meshes: axes of the mesh, slices, a process's rows, `put_batch`.
sharding: logical-axis rules, `constrain`, shardings of parameters and states.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.partitioning.meshes import (
    DATA_AXIS,
    MODEL_AXIS,
    SLICE_AXIS,
    auto_axes,
    batch_sharding,
    local_rows,
    make_mesh,
    of_processes,
    process_grid,
    put_batch,
    replicated,
    row_shards,
  )
  from gkd_jax.partitioning.sharding import (
    ACTIVATION_RULES,
    FULLY_SHARDED_RULES,
    STANDARD_RULES,
    abstract_params,
    bytes_per_device,
    constrain,
    embed_lookup,
    gather,
    host_params,
    input_shapes,
    jit,
    logical_axes,
    param_shardings,
    parameter_rules,
    state_shardings,
    with_shardings,
  )
