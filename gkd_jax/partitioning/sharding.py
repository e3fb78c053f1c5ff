"""T5X's logical-axis rules, and the shardings of parameters and train states.

Parameters are abstract here: shapes and shardings, nothing allocated.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gkd_jax import types
from gkd_jax.partitioning import meshes

# T5X's standard rules for parameters: logical axis -> mesh axis.
STANDARD_RULES = (
  ("vocab", meshes.MODEL_AXIS),
  ("embed", None),
  ("mlp", meshes.MODEL_AXIS),
  ("heads", meshes.MODEL_AXIS),
  ("kv", None),
  ("joined_kv", meshes.MODEL_AXIS),
  ("relpos_buckets", None),
  ("layers", None),
)
# The same with the other axis of each matrix sharded over the data axis. Each slice
# has all parameters, so that they are gathered within it.
FULLY_SHARDED_RULES = tuple(
  (name, meshes.DATA_AXIS if name == "embed" else axis)
  for name, axis in STANDARD_RULES
)
# Sharding of activations, and of weights while they are used: rows over slices and
# the data axis, heads, MLP and vocabulary over the model axis.
_ROWS = meshes.SLICE_AXIS, meshes.DATA_AXIS
ACTIVATION_RULES = {
  **dict(STANDARD_RULES),
  "batch": _ROWS,
  "length": None,
  # Used by `embed_lookup`.
  "rows_of_slice": meshes.SLICE_AXIS,
  "features": meshes.DATA_AXIS,
}


def jit(function: Callable[..., Any], mesh: Mesh, **options: Any) -> Any:
  """Returns `jax.jit` of a function in which `constrain` knows the mesh.

  Args:
    function: to be compiled.
    mesh: the mesh that its arguments are placed on, see `make_mesh`.
    **options: see `jax.jit`.
  """
  return jax.jit(_traced_on(mesh)(function), **options)


@contextlib.contextmanager
def _traced_on(mesh):
  """Makes `mesh` the one that code is traced on; also a decorator."""
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    yield


def constrain(x: jax.Array, *names: str) -> jax.Array:
  """Shards `x` by `ACTIVATION_RULES`; does nothing without a mesh (see `jit`).

  XLA's own choice follows the parameters: where those are sharded over the data
  axis, it shards activations by features and exchanges them between devices in
  place of gathering the weights.

  Args:
    x: activations, or a weight where it is used.
    names: logical name of each axis. XLA chooses for an axis that the mesh axis
      does not divide.
  """
  sizes = meshes.auto_axes()
  axes = [ACTIVATION_RULES[name] for name in names]
  if all(size == 1 for size in sizes.values()):
    return x
  places = [_mesh_axes_of(axis, sizes) for axis in axes]
  spec = [
    P.UNCONSTRAINED if size % parts else axis
    for (axis, parts), size in zip(places, x.shape, strict=True)
  ]
  return jax.lax.with_sharding_constraint(x, P(*spec))


def embed_lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Looks up rows of a table that may be sharded by features over the data axis.

  Each device looks up its features of its slice's tokens. XLA does so by itself on
  one slice; on several it would exchange rows between slices.

  Args:
    table: `[V, D]`.
    tokens: `[B, S]` int32.

  Returns:
    `[B, S, D]`.
  """
  if meshes.SLICE_AXIS not in meshes.auto_axes():
    return jnp.take(table, tokens, axis=0)
  tokens = constrain(tokens, "rows_of_slice", "length")
  x = jnp.take(table, tokens, axis=0)
  return constrain(x, "rows_of_slice", "length", "features")


def _mesh_axes_of(axis, sizes):
  """Returns the mesh axes of a rule's axis, and the product of their sizes."""
  if axis == _ROWS:
    return meshes.rows(sizes)
  return (axis, sizes[axis]) if axis in sizes else (None, 1)


def gather(params: Any, axes: Callable[[], dict[str, tuple[str, ...]]]) -> Any:
  """Gathers parameters before a loop that uses them in every iteration.

  With `constrain` alone, those sharded over the data axis are gathered in each.

  Args:
    params: tree of arrays.
    axes: returns the logical names by parameter path, as `logical_axes`; called
      only on a mesh.
  """
  if all(size == 1 for size in meshes.auto_axes().values()):
    return params
  names = axes()
  flat = traverse_util.flatten_dict(params, sep="/")
  return traverse_util.unflatten_dict(
    {path: constrain(x, *names[path]) for path, x in flat.items()}, sep="/"
  )


def logical_axes(params_axes: Any) -> dict[str, tuple[str, ...]]:
  """Returns the logical axis names by parameter path, from `params_axes`."""
  flat = traverse_util.flatten_dict(dict(params_axes), sep="/")
  return {k.removesuffix("_axes"): tuple(v.names) for k, v in flat.items()}


def param_shardings(
  params: Any,
  axes: dict[str, tuple[str, ...]],
  mesh: Mesh,
  rules: Sequence[tuple[str, str | None]] = STANDARD_RULES,
) -> Any:
  """Returns the sharding of each parameter, by its logical axes.

  An axis that the mesh axis does not divide is not sharded.

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
  """Returns the shardings of a train state.

  An optimizer slot of its parameter's shape has its sharding; factored slots and
  counts are small and are replicated.

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
    return meshes.replicated(mesh)

  rest = jax.tree_util.tree_map_with_path(slot, state)
  return rest.replace(params=params_shardings)


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes on one device of arrays, or of shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if leaf.sharding is not None
  )


def input_shapes(
  task_feature_lengths: Mapping[str, int],
) -> dict[str, tuple[int, int]]:
  """Returns the input shapes that parameters are initialized with.

  Args:
    task_feature_lengths: seqio feature to length in tokens; a decoder-only model
      needs no `inputs`.

  Raises:
    ValueError: there is no length of `targets`.
  """
  if "targets" not in task_feature_lengths:
    raise ValueError(
      "expected the length of 'targets', got"
      f" {dict(task_feature_lengths)}; set TASK_FEATURE_LENGTHS"
    )
  sides = {"encoder": "inputs", "decoder": "targets"}
  return {
    f"{side}_input_tokens": (1, task_feature_lengths[name])
    for side, name in sides.items()
    if name in task_feature_lengths
  }


def parameter_rules(
  shard_params_over_data: bool,
) -> Sequence[tuple[str, str | None]]:
  """Returns the rules for parameters: sharded over the data axis too, or not."""
  if shard_params_over_data:
    return FULLY_SHARDED_RULES
  return STANDARD_RULES


def host_params(model: types.TransformerModel) -> Any:
  """Shapes and types of a model's parameters, which have no place.

  Args:
    model: student or teacher.
  """
  return _variables(model, input_shapes({"inputs": 1, "targets": 1}))["params"]


def _variables(model, shapes):
  return jax.eval_shape(
    lambda: model.get_initial_variables(jax.random.key(0), shapes)
  )


def abstract_params(
  model: types.TransformerModel,
  shapes: Mapping[str, tuple[int, ...]],
  mesh: Any,
  rules: Sequence[tuple[str, str | None]],
) -> tuple[Any, Any]:
  """Returns the shapes of a model's parameters and their shardings.

  Args:
    model: student or teacher.
    shapes: see `input_shapes`.
    mesh: see `meshes.make_mesh`.
    rules: logical axis to mesh axis.
  """
  variables = _variables(model, shapes)
  axes = logical_axes(variables["params_axes"])
  shardings = param_shardings(variables["params"], axes, mesh, rules)
  return variables["params"], shardings


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """Returns the shapes with their shardings."""
  return jax.tree.map(
    lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h),
    shapes,
    shardings,
  )
