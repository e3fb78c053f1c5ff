"""A network's layers, one after the other: unrolled, or as the turns of a loop.

Unrolled, each layer is compiled by itself, and has its parameters under a name of
its own: `layers_0/mlp/wo/kernel [F, D]`, `layers_1/...`. Scanned, one layer is
compiled, and the parameters of all lie in one array, `layers/mlp/wo/kernel
[layers, F, D]`, whose first axis is never split.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning

# The name of the scanned layers' parameters, and that of their first axis.
NAME = "layers"

# By T5X's names, what of a layer is kept for the backward pass, which computes the
# rest again: all, products with weights, nothing but its input.
REMAT_POLICIES = {
  "none": None,
  "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


def layer_class(cls: Any, config: Any) -> Any:
  """A layer's class, or one that computes some again in the backward pass."""
  policy = REMAT_POLICIES[config.remat_policy]
  return nn.remat(cls, policy=policy) if policy else cls


def apply(
  cls: Any,
  fields: Sequence[Any],
  length: int,
  scan: bool,
  x: jax.Array,
  *shared: Any,
) -> jax.Array:
  """Sends `x` through all layers of a stack; called in a compact method.

  Args:
    cls: class of a layer, called as `layer(x, *shared)`.
    fields: its fields, the first a network's configuration.
    length: number of layers.
    scan: by a loop.
    x: `[B, T, D]`.
    *shared: what all layers are given.
  """
  cls = layer_class(cls, fields[0])
  if not scan:
    for i in range(length):
      x = cls(*fields, name=f"{NAME}_{i}")(x, *shared)
    return x
  loop = flax_partitioning.scan_with_axes(
    lambda layer, x, shared: (layer(x, *shared), None),
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=nn.broadcast,
    length=length,
    axis_name=NAME,
  )
  return loop(cls(*fields, name=NAME), x, shared)[0]


def check_unrolled(scan: bool) -> None:
  """Raises ValueError for a scanned network that is to decode with a cache."""
  if scan:
    raise ValueError(
      "expected an unrolled network for decoding, got one with scan_layers;"
      " decode by its model's methods, or set scan_layers = False"
    )


def unrolled(module: Any) -> Any:
  """A network without a loop over its layers; see `unstacked`."""
  return module.clone(scan_layers=False) if is_scanned(module) else module


def is_scanned(module: Any) -> bool:
  """Whether a network, ours or a user's own, loops over its layers."""
  return getattr(module, "scan_layers", False)


def unstacked(params: Any) -> Any:
  """The parameters of a scanned network under the names of an unrolled one.

  Args:
    params: tree of arrays, with or without stacks.
  """
  flat: dict[str, Any] = {}
  for path, x in traverse_util.flatten_dict(params, sep="/").items():
    side, found, rest = path.partition(f"/{NAME}/")
    if not found:
      flat[path] = x
      continue
    for i in range(x.shape[0]):
      layer = jax.lax.index_in_dim(x, i, keepdims=False)
      flat[f"{side}/{NAME}_{i}/{rest}"] = layer
  return traverse_util.unflatten_dict(flat, sep="/")
