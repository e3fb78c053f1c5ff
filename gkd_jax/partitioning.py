"""The device mesh, T5X's logical-axis rules, and shardings of trees."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gkd_jax import mesh_axes, types

DATA_AXIS, MODEL_AXIS = "data", "model"

# How XLA's CPU backend is to order a program's operations.
_LEAST_MEMORY = {
  "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
}

# T5X's standard rules for parameters: logical axis -> mesh axis.
STANDARD_RULES = (
  ("vocab", MODEL_AXIS),
  ("embed", None),
  ("mlp", MODEL_AXIS),
  ("heads", MODEL_AXIS),
  ("kv", None),
  ("joined_kv", MODEL_AXIS),
  ("relpos_buckets", None),
  ("layers", None),
)

# The same with the free axis of each matrix split over the data axis as well.
FULLY_SHARDED_RULES = tuple(
  (name, DATA_AXIS if name == "embed" else axis)
  for name, axis in STANDARD_RULES
)

# Where activations lie, and weights while they are used: rows on the data axis;
# on the model axis what it computes apart.
ACTIVATION_RULES = {
  "batch": DATA_AXIS,
  "length": None,
  "embed": None,
  "mlp": MODEL_AXIS,
  "heads": MODEL_AXIS,
  "joined_kv": MODEL_AXIS,
  "kv": None,
  "vocab": MODEL_AXIS,
  "relpos_buckets": None,
  "layers": None,
}


def make_mesh(
  num_partitions: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """Returns a mesh `("data", "model")`.

  Args:
    num_partitions: devices that share one copy of the model (the model axis).
    devices: all of them by default.

  Raises:
    ValueError: the number of devices is no multiple of `num_partitions`.
  """
  devices = list(jax.devices() if devices is None else devices)
  if num_partitions < 1 or len(devices) % num_partitions:
    raise ValueError(
      f"expected NUM_PARTITIONS to divide the {len(devices)} devices, got"
      f" {num_partitions}; set NUM_PARTITIONS"
    )
  grid = np.array(devices).reshape(-1, num_partitions)
  return Mesh(grid, (DATA_AXIS, MODEL_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
  """One copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the data axis, copies over the model axis."""
  return NamedSharding(mesh, P(DATA_AXIS))


def jit(function: Callable[..., Any], mesh: Mesh, **options: Any) -> Any:
  """`jax.jit` of a function in which `constrain` knows the mesh.

  For a CPU the order of operations is the one that needs the least memory: by
  default gradients are begun before the forward pass, as zeros.

  Args:
    function: to be compiled; its arguments lie on the mesh.
    mesh: see `make_mesh`.
    **options: see `jax.jit`.
  """

  @functools.wraps(function)
  def on_mesh(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **kwargs)

  if mesh.devices.flat[0].platform == "cpu" and _knows_least_memory():
    options["compiler_options"] = _LEAST_MEMORY
  return jax.jit(on_mesh, **options)


@functools.cache
def _knows_least_memory() -> bool:
  """Whether this version of XLA has the option; the smallest program tells."""
  try:
    with jax.default_device(jax.devices("cpu")[0]):
      jax.jit(lambda: 0).lower().compile(_LEAST_MEMORY)
  except jax.errors.JaxRuntimeError:
    return False
  return True


def constrain(x: jax.Array, *names: str) -> jax.Array:
  """`x`, laid out by `ACTIVATION_RULES`; as it is without a mesh (see `jit`).

  What XLA chooses by itself follows the parameters: with those split over the
  data axis it splits activations by features, and exchanges activations where
  it should gather weights.

  Args:
    x: activations, or a weight where it is used.
    names: logical name of each axis. One that the mesh axis does not divide
      lies as XLA likes.
  """
  sizes = mesh_axes.auto_axes()
  axes = [ACTIVATION_RULES[name] for name in names]
  axes = [axis if axis in sizes else None for axis in axes]
  if all(size == 1 for size in sizes.values()):
    return x
  spec = [
    P.UNCONSTRAINED if axis and size % sizes.get(axis, 1) else axis
    for axis, size in zip(axes, x.shape, strict=True)
  ]
  return jax.lax.with_sharding_constraint(x, P(*spec))


def gather(params: Any, axes: Callable[[], dict[str, tuple[str, ...]]]) -> Any:
  """Parameters as they are used, for a loop that uses them again and again.

  `constrain` alone would gather those split over the data axis once a turn.

  Args:
    params: tree of arrays.
    axes: returns parameter path to logical names, as `logical_axes`; called
      only on a mesh.
  """
  if all(size == 1 for size in mesh_axes.auto_axes().values()):
    return params
  names = axes()
  flat = traverse_util.flatten_dict(params, sep="/")
  return traverse_util.unflatten_dict(
    {path: constrain(x, *names[path]) for path, x in flat.items()}, sep="/"
  )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> types.Batch:
  """Global arrays, rows over the data axis, from each process's rows.

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


def process_grid(mesh: Mesh) -> np.ndarray:
  """The process of each device of a mesh, `[data, model]`."""
  return np.vectorize(lambda device: device.process_index)(mesh.devices)


def logical_axes(params_axes: Any) -> dict[str, tuple[str, ...]]:
  """Parameter path to logical axis names, from flax's `params_axes`."""
  flat = traverse_util.flatten_dict(dict(params_axes), sep="/")
  return {k.removesuffix("_axes"): tuple(v.names) for k, v in flat.items()}


def param_shardings(
  params: Any,
  axes: dict[str, tuple[str, ...]],
  mesh: Mesh,
  rules: Sequence[tuple[str, str | None]] = STANDARD_RULES,
) -> Any:
  """Returns the sharding of each parameter, by its logical axes.

  An axis that the mesh axis does not divide stays whole.

  Args:
    params: tree of arrays or shapes.
    axes: parameter path to logical names, from `logical_axes`.
    mesh: see `make_mesh`.
    rules: logical name to mesh axis.

  Raises:
    ValueError: a logical axis has no rule.
  """
  table = dict(rules)

  def sharding(path, leaf):
    names = axes["/".join(path)]
    missing = [name for name in names if name not in table]
    if missing:
      raise ValueError(
        f"expected a rule for each logical axis, got none for {missing};"
        " set partitioning rules"
      )
    spec, used = [], set()
    for name, size in zip(names, leaf.shape, strict=True):
      axis = table[name]
      if axis in used or (axis and size % mesh.shape[axis]):
        axis = None
      used.add(axis)
      spec.append(axis)
    return NamedSharding(mesh, P(*spec))

  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict(
    {path: sharding(path, leaf) for path, leaf in flat.items()}
  )


def state_shardings(state: Any, params_shardings: Any, mesh: Mesh) -> Any:
  """Shardings of a train state: optimizer slots lie as their parameters do.

  A slot of the parameter's shape takes its sharding; factored slots and counts
  are small and are copied.

  Args:
    state: `TrainState` of arrays or shapes.
    params_shardings: from `param_shardings`.
    mesh: see `make_mesh`.
  """
  by_path = traverse_util.flatten_dict(params_shardings)
  shapes = {
    path: leaf.shape
    for path, leaf in traverse_util.flatten_dict(state.params).items()
  }

  def slot(path, leaf):
    keys = tuple(p.key for p in path if isinstance(p, jax.tree_util.DictKey))
    if keys in by_path and shapes[keys] == leaf.shape:
      return by_path[keys]
    return replicated(mesh)

  rest = jax.tree_util.tree_map_with_path(slot, state)
  return rest.replace(params=params_shardings)


def bytes_per_device(tree: Any, shardings: Any) -> int:
  """Bytes that one device holds of a tree of arrays or shapes."""
  sizes = jax.tree.map(
    lambda leaf, s: math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
    tree,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))
