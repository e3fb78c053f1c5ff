"""Names, shapes, logical axes and counts of a configuration's parameters.

They come from the network itself, traced abstractly (no array is allocated).
Readers and writers of other programs' checkpoints compare with them.
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
from gkd_jax.checkpoints import errors
from gkd_jax.network import projections


def count_array_elements(params: Any) -> int:
  """Counts the parameters of a tree of arrays or shapes, but no int8 scales."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return sum(
    int(np.prod(x.shape))
    for path, x in leaves
    if not jax.tree_util.keystr(path, simple=True, separator="/").endswith(
      projections.SCALE
    )
  )


def shapes(config: network.T5Config) -> dict[str, tuple[int, ...]]:
  """Returns parameter path, joined by "/", to shape."""
  params = traverse_util.flatten_dict(_variables(config)["params"], sep="/")
  return {name: leaf.shape for name, leaf in params.items()}


def logical_axes(config: network.T5Config) -> dict[str, tuple[str, ...]]:
  """Returns parameter path, joined by "/", to the names of its axes."""
  return partitioning.logical_axes(_variables(config)["params_axes"])


def count(config: network.T5Config) -> int:
  """Counts the parameters of a configuration."""
  return count_array_elements(_variables(config)["params"])


def check(
  arrays: Mapping[str, Any],
  config: network.T5Config,
  *,
  setting: str,
  path: os.PathLike[str] | str,
) -> None:
  """Checks names and shapes against those of a configuration.

  Args:
    arrays: path to anything with a `shape`.
    config: the configuration.
    setting: what to change, for the message.
    path: of the checkpoint, for the message.

  Raises:
    ValueError: with all missing, unexpected and wrong-shaped names.
  """
  expected = shapes(config)
  got = {name: tuple(array.shape) for name, array in arrays.items()}
  errors.raise_if_any(
    errors.differences(got, expected),
    expected=f"the {len(expected)} parameters of its configuration",
    setting=setting,
    path=path,
  )


def infer_config(
  arrays: Mapping[str, Any], *, setting: str, path: os.PathLike[str] | str
) -> network.T5Config:
  """Infers a configuration from the names and shapes of its parameters.

  They determine all sizes but not the activations: one input projection is taken
  for T5 1.0's ReLU, two for T5 1.1's gated GELU, as in every published T5.

  Args:
    arrays: path to anything with a `shape`.
    setting: what to change, for the message.
    path: of the checkpoint, for the message.

  Raises:
    ValueError: if they are not the parameters of a T5.
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
