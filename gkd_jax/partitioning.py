"""The device mesh, T5X's logical-axis rules, and shardings of trees."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gkd_jax import mesh_axes, types

SLICE_AXIS = mesh_axes.SLICE_AXIS
DATA_AXIS, MODEL_AXIS = mesh_axes.DATA_AXIS, mesh_axes.MODEL_AXIS

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

# The same with the free axis of each matrix split over the data axis as well. Each
# slice has all parameters: they are gathered within it.
FULLY_SHARDED_RULES = tuple(
  (name, DATA_AXIS if name == "embed" else axis)
  for name, axis in STANDARD_RULES
)

# Where activations lie, and weights while they are used: rows on the data axis
# (and that of slices); on the model axis what it computes apart.
_ROWS = SLICE_AXIS, DATA_AXIS
ACTIVATION_RULES = {
  "batch": _ROWS,
  "length": None,
  "embed": None,
  "mlp": MODEL_AXIS,
  "heads": MODEL_AXIS,
  "joined_kv": MODEL_AXIS,
  "kv": None,
  "vocab": MODEL_AXIS,
  "relpos_buckets": None,
  "layers": None,
  # Of what is looked up in a table, see `look_up`.
  "rows_of_slice": SLICE_AXIS,
  "features": DATA_AXIS,
}


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
  return mesh_axes.rows(mesh.shape)[1]


def replicated(mesh: Mesh) -> NamedSharding:
  """One copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over slices and the data axis, copies over the model axis."""
  return NamedSharding(mesh, P(mesh_axes.rows(mesh.shape)[0]))


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
  if all(size == 1 for size in sizes.values()):
    return x
  places = [_place(axis, sizes) for axis in axes]
  spec = [
    P.UNCONSTRAINED if size % parts else axis
    for (axis, parts), size in zip(places, x.shape, strict=True)
  ]
  return jax.lax.with_sharding_constraint(x, P(*spec))


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Rows of a table that may be split by features over the data axis.

  Each device looks up its features of its slice's tokens. With one slice XLA does
  so by itself; of several it would exchange rows between slices.

  Args:
    table: `[V, D]`.
    tokens: `[B, S]` int32.

  Returns:
    `[B, S, D]`.
  """
  if SLICE_AXIS not in mesh_axes.auto_axes():
    return jnp.take(table, tokens, axis=0)
  tokens = constrain(tokens, "rows_of_slice", "length")
  x = jnp.take(table, tokens, axis=0)
  return constrain(x, "rows_of_slice", "length", "features")


def _place(axis, sizes):
  """Mesh axes of a rule's one, where they are there, and how many parts they make."""
  if axis == _ROWS:
    return mesh_axes.rows(sizes)
  return (axis, sizes[axis]) if axis in sizes else (None, 1)


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
