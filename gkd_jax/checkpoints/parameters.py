"""The parameters that a configuration has: names, shapes, logical axes.

Everything that reads or writes a checkpoint of another program compares with
this table, which is the network's own, traced without allocating anything.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gkd_jax import network, partitioning
from gkd_jax.network import projections


def count_array_elements(params: Any) -> int:
  """Number of parameters of a tree of arrays or shapes, without scales of int8."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return sum(
    int(np.prod(x.shape))
    for path, x in leaves
    if not jax.tree_util.keystr(path, simple=True, separator="/").endswith(
      projections.SCALE
    )
  )


def held_bytes_per_device(params: Any) -> int:
  """Bytes that one device holds of a tree of placed arrays."""
  return sum(
    x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params)
  )


def shapes(config: network.T5Config) -> dict[str, tuple[int, ...]]:
  """Parameter path, joined by "/", to shape."""
  params = traverse_util.flatten_dict(_variables(config)["params"], sep="/")
  return {name: leaf.shape for name, leaf in params.items()}


def logical_axes(config: network.T5Config) -> dict[str, tuple[str, ...]]:
  """Parameter path, joined by "/", to the logical names of its axes."""
  return partitioning.logical_axes(_variables(config)["params_axes"])


def count(config: network.T5Config) -> int:
  """Number of parameters."""
  return sum(
    leaf.size for leaf in jax.tree.leaves(_variables(config)["params"])
  )


def check(
  arrays: Mapping[str, Any],
  config: network.T5Config,
  *,
  setting: str,
  path: os.PathLike[str] | str,
) -> None:
  """Compares names and shapes with those of a configuration.

  Args:
    arrays: path to anything with a `shape`.
    config: what the parameters have to fit.
    setting: what to change, for the message.
    path: where the arrays come from, for the message.

  Raises:
    ValueError: that lists every missing, unexpected and wrong-shaped name.
  """
  expected = shapes(config)
  raise_if_any(
    {
      "missing": [name for name in expected if name not in arrays],
      "unexpected": [name for name in arrays if name not in expected],
      "wrong shape": [
        f"{name} (expected {shape}, got {tuple(arrays[name].shape)})"
        for name, shape in expected.items()
        if name in arrays and tuple(arrays[name].shape) != shape
      ],
    },
    expected=f"the {len(expected)} parameters of its configuration",
    setting=setting,
    path=path,
  )


def raise_if_any(
  problems: Mapping[str, list[str]],
  *,
  expected: str,
  setting: str,
  path: os.PathLike[str] | str,
) -> None:
  """Raises a ValueError with all names, if there are any.

  Args:
    problems: kind of problem to the names that have it.
    expected: for the message.
    setting: what to change, for the message.
    path: where the names come from, for the message.
  """
  if not any(problems.values()):
    return
  listing = "; ".join(
    f"{len(names)} {kind}: {', '.join(names)}"
    for kind, names in problems.items()
    if names
  )
  raise ValueError(
    f"expected {expected}, got {listing} in {os.fspath(path)}; set {setting} to"
    " a whole checkpoint of a T5"
  )


def infer_config(
  arrays: Mapping[str, Any], *, setting: str, path: os.PathLike[str] | str
) -> network.T5Config:
  """The configuration whose parameters these are, from names and shapes.

  All sizes follow. The activations do not: one input projection means T5 1.0's
  ReLU, two mean T5 1.1's gated GELU, as in every published T5.

  Args:
    arrays: path to anything with a `shape`.
    setting: what to change, for the message.
    path: where the arrays come from, for the message.

  Raises:
    ValueError: if they are not a T5's parameters.
  """
  try:
    embedding = arrays["token_embedder/embedding"].shape
    heads = arrays["encoder/relpos_bias/rel_embedding"].shape[0]
    gated = "encoder/layers_0/mlp/wi_0/kernel" in arrays
    wi = "wi_0" if gated else "wi"
    joined = arrays["encoder/layers_0/attention/query/kernel"].shape[1]
    config = network.T5Config(
      vocab_size=embedding[0],
      emb_dim=embedding[1],
      num_heads=heads,
      num_encoder_layers=_depth(arrays, "encoder"),
      num_decoder_layers=_depth(arrays, "decoder"),
      head_dim=joined // heads,
      mlp_dim=arrays[f"encoder/layers_0/mlp/{wi}/kernel"].shape[1],
      mlp_activations=("gelu", "linear") if gated else ("relu",),
      logits_via_embedding="decoder/logits_dense/kernel" not in arrays,
    )
  except KeyError as error:
    raise ValueError(
      f"expected the parameters of a T5, got none named {error} in"
      f" {os.fspath(path)}; set {setting}"
    ) from error
  check(arrays, config, setting=setting, path=path)
  return config


def _depth(arrays: Mapping[str, Any], side: str) -> int:
  layers = {
    name.split("/")[1] for name in arrays if name.startswith(f"{side}/layers_")
  }
  return len(layers)


def _variables(config: network.T5Config) -> Any:
  # A configuration from JSON or gin may hold a list, which has no hash.
  return _traced(
    dataclasses.replace(config, mlp_activations=tuple(config.mlp_activations))
  )


@functools.lru_cache(maxsize=8)
def _traced(config: network.T5Config) -> Any:
  tokens = jnp.zeros((1, 1), jnp.int32)
  return jax.eval_shape(
    lambda: network.Transformer(config).init(
      jax.random.key(0), tokens, tokens, tokens, enable_dropout=False
    )
  )
