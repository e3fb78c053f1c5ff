"""A network's layers, unrolled or scanned.

Unrolled, each layer is compiled and has parameters under its own name:
`layers_0/mlp/wo/kernel [F, D]`, `layers_1/...`. Scanned, one layer is compiled,
and the parameters of all are stacked: `layers/mlp/wo/kernel [layers, F, D]`,
whose first axis is never sharded.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning

# Name of the scanned layers' parameters, and of their first axis.
NAME = "layers"

# T5X's name to what is kept of a layer for the backward pass, which computes the
# rest again: everything, products with weights, only the layer's input.
REMAT_POLICIES = {
  "none": None,
  "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


def apply(
  cls: Any,
  fields: Sequence[Any],
  length: int,
  scan: bool,
  x: jax.Array,
  *shared: Any,
  of_layers: Sequence[int] | None = None,
) -> jax.Array:
  """Applies all layers to `x`; called in a compact method.

  Args:
    cls: class of a layer, called as `layer(x, *shared)`, or with its own of
      `of_layers` as a last argument.
    fields: its fields, the first a network's configuration.
    length: number of layers.
    scan: whether to scan over the layers.
    x: `[B, T, D]`.
    *shared: further arguments of all layers.
    of_layers: one number for each layer, or None.
  """
  policy = REMAT_POLICIES[fields[0].remat_policy]
  cls = nn.remat(cls, policy=policy) if policy else cls
  if not scan:
    for i in range(length):
      own = () if of_layers is None else (of_layers[i],)
      x = cls(*fields, name=f"{NAME}_{i}")(x, *shared, *own)
    return x
  loop = flax_partitioning.scan_with_axes(
    lambda layer, x, shared, own: (layer(x, *shared, *own), None),
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(nn.broadcast, 0),
    length=length,
    axis_name=NAME,
  )
  own = () if of_layers is None else (jnp.asarray(of_layers),)
  return loop(cls(*fields, name=NAME), x, shared, own)[0]


def check_unrolled(scan: bool) -> None:
  """Raises ValueError for a scanned network, which cannot use a cache."""
  if scan:
    raise ValueError(
      "expected an unrolled network for decoding, got one with scan_layers;"
      " decode by its model's methods, or set scan_layers = False"
    )


def unrolled(module: Any) -> Any:
  """Returns a network without a scan over its layers; see `unstacked`."""
  return module.clone(scan_layers=False) if is_scanned(module) else module


def is_scanned(module: Any) -> bool:
  """Returns whether a network, perhaps a user's own, scans over its layers."""
  return getattr(module, "scan_layers", False)


def unstacked(params: Any) -> Any:
  """Renames the parameters of a scanned network to those of an unrolled one.

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
