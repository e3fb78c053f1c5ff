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


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
  """Returns parameter path, joined by "/", to shape."""
  params = traverse_util.flatten_dict(_variables(config)["params"], sep="/")
  return {name: leaf.shape for name, leaf in params.items()}


def logical_axes(config: Any) -> dict[str, tuple[str, ...]]:
  """Returns parameter path, joined by "/", to the names of its axes."""
  return partitioning.logical_axes(_variables(config)["params_axes"])


def count(config: Any) -> int:
  """Counts the parameters of a configuration."""
  return count_array_elements(_variables(config)["params"])


def check(
  arrays: Mapping[str, Any],
  config: Any,
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


def network_config(
  fields: Mapping[str, Any], *, setting: str, path: os.PathLike[str] | str
) -> Any:
  """Makes a configuration from its saved fields, which say of which network.

  Args:
    fields: of one of our configurations.
    setting: what to change, for the message.
    path: of the checkpoint, for the message.

  Raises:
    ValueError: no configuration has all of the fields.
  """
  # JSON has no tuples; a dictionary is a side's configuration.
  nested = functools.partial(network_config, setting=setting, path=path)
  kinds = {list: tuple, dict: nested}
  given = {k: kinds.get(type(v), lambda x: x)(v) for k, v in fields.items()}
  for config in _NETWORKS:
    known = {field.name for field in dataclasses.fields(config)}
    needed = {"encoder", "decoder"} & known or {"vocab_size"}
    if known.issuperset(given) and needed <= given.keys():
      return config(**given)
  names = " or ".join(f"network.{config.__name__}" for config in _NETWORKS)
  raise ValueError(
    f"expected the fields of {names}, got {sorted(fields)} in"
    f" {os.fspath(path)}; set {setting}"
  )


# A configuration to its network, and to the arrays of tokens that it reads.
_NETWORKS = {
  network.T5Config: (network.Transformer, 3),
  network.TransformerConfig: (network.DecoderWrapper, 2),
  network.RotaryConfig: (network.CausalTransformer, 2),
  network.T5GemmaConfig: (network.T5Gemma, 3),
}


def _variables(config: Any) -> Any:
  # A configuration from JSON or gin may hold a list, which has no hash.
  lists = {k: tuple(v) for k, v in vars(config).items() if type(v) is list}
  return _traced(dataclasses.replace(config, **lists))


@functools.lru_cache(maxsize=8)
def _traced(config: Any) -> Any:
  module, inputs = _NETWORKS[type(config)]
  tokens = [jnp.zeros((1, 1), jnp.int32)] * inputs
  return jax.eval_shape(
    lambda: module(config).init(
      jax.random.key(0), *tokens, enable_dropout=False
    )
  )
