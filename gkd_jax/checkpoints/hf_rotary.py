"""Configurations of the families in `families`, both ways.

References: the fields of `config.json` of `transformers`, versions 4.57 and 5.24,
https://huggingface.co/docs/transformers/model_doc/llama and its siblings.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from gkd_jax import network
from gkd_jax.checkpoints import families
from gkd_jax.network import rotary

CONFIG = network.RotaryConfig
KINDS = tuple(families.TABLE)
EMBEDDING, HEAD, COPIES = "model.embed_tokens.weight", "lm_head.weight", ()
# In the first Llama files.
UNUSED = r".*\.rotary_emb\.inv_freq"
START = "bos_token_id"
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Their field to ours, of the same value.
_FIELDS = {
  "vocab_size": "vocab_size",
  "hidden_size": "emb_dim",
  "intermediate_size": "mlp_dim",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "num_key_value_heads": "num_kv_heads",
  "head_dim": "head_dim",
  "rms_norm_eps": "norm_epsilon",
  "tie_word_embeddings": "logits_via_embedding",
  "query_pre_attn_scalar": "query_pre_attn_scalar",
  "attn_logit_softcapping": "attention_softcap",
  "final_logit_softcapping": "final_softcap",
  "max_position_embeddings": "max_positions",
}
# In exports of models of which no longest row is known: there is none, since
# there are no tables of positions.
_MAX_POSITIONS = 131072
# Fixed in our network, in all families that have the field.
_FIXED = {
  "attention_bias": False,
  "mlp_bias": False,
  "partial_rotary_factor": 1.0,
  "use_bidirectional_attention": False,
}
_ACTIVATIONS = {
  "silu": ("silu", "linear"),
  "gelu_pytorch_tanh": ("gelu", "linear"),
}


def name_table(config: network.RotaryConfig) -> dict[str, tuple[str, bool]]:
  """Returns our parameter path to (their name, whether it is transposed)."""
  table = {
    "decoder/token_embedder/embedding": (EMBEDDING, False),
    "decoder/decoder_norm/scale": ("model.norm.weight", False),
  }
  if not config.logits_via_embedding:
    table["decoder/logits_dense/kernel"] = (HEAD, True)
  family = families.TABLE[family_of(config)]
  return table | families.layer_names(config, family, "decoder", "model")


def special_tokens(text: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of special tokens that `config.json` may leave out."""
  return dict(families.TABLE[text["model_type"]].tokens)


def read_config(
  text: Mapping[str, Any], *, setting: str, path: os.PathLike[str] | str
) -> network.RotaryConfig:
  """Makes our configuration from their fields.

  Args:
    text: the content of `config.json`.
    setting: what to change, for the message.
    path: of the file, for the message.

  Raises:
    ValueError: if it is not a model that our network computes.
  """
  family = families.TABLE[text["model_type"]]
  return read_fields(text, family, setting=setting, path=path)


def read_fields(
  text: Mapping[str, Any],
  family: families.Family,
  *,
  setting: str,
  path: os.PathLike[str] | str,
) -> network.RotaryConfig:
  """Makes our configuration from the fields of a stack; see `read_config`."""
  given = {**family.defaults, **text}
  _check(given, family, setting, path)
  ours = {
    name: given.get(field)
    for field, name in _FIELDS.items()
    if field in _known(family)
  }
  heads = given["num_attention_heads"]
  if ours.get("num_kv_heads") is None:
    ours["num_kv_heads"] = heads
  if ours.get("head_dim") is None:
    ours["head_dim"] = given["hidden_size"] // heads
  windowed = _windowed(given)
  rope, local = _rope(given, setting, path)
  return network.RotaryConfig(
    **ours
    | {
      **rope,
      "local_rope_theta": local if any(windowed) else None,
      "window": given["sliding_window"] if any(windowed) else None,
      "window_pattern": rotary.shortest_period(windowed)
      if any(windowed)
      else (),
      "family": family.name if family.architecture else "",
      **family.constants,
    }
  )


def _known(family):
  """Returns the fields that a family has in `config.json`."""
  common = "num_key_value_heads", "head_dim", "max_position_embeddings"
  return {*family.defaults, *common}


def _activation(family):
  return next(name for name in family.defaults if name.startswith("hidden_act"))


def _check(given, family, setting, path):
  activation = _activation(family)
  wanted = {k: v for k, v in _FIXED.items() if given.get(k) is not None}
  wanted[activation] = family.defaults[activation]
  if given.get("layer_types") is not None:
    given = given | {"layers": len(given["layer_types"])}
    wanted["layers"] = given["num_hidden_layers"]
  other = {k: given[k] for k, v in wanted.items() if given[k] != v}
  if other:
    raise ValueError(
      f"expected {dict((k, wanted[k]) for k in other)}, got {other} in"
      f" {os.fspath(path)}; set {setting} to a {family.name} with them"
    )


def _windowed(given) -> tuple[bool, ...]:
  """Returns which layers are windowed."""
  depth, kinds = given["num_hidden_layers"], given.get("layer_types")
  if given.get("sliding_window") is None or not given.get(
    "use_sliding_window", True
  ):
    return (False,) * depth
  if kinds is not None:
    return tuple(kind == _SLIDING for kind in kinds)
  every = given.get("sliding_window_pattern")
  first = given.get("max_window_layers", 0)
  return tuple(
    i >= first and not (every and (i + 1) % every == 0) for i in range(depth)
  )


def _rope(given, setting, path):
  """Returns our fields of the rotation, and the base in windowed layers or None.

  Version 5 has `rope_parameters`, by kind of layer where kinds differ; before,
  there were `rope_theta`, `rope_scaling` and `rope_local_base_freq`.
  """
  local = given.get("rope_local_base_freq")
  rope = given.get("rope_parameters")
  if rope is None:
    rope = {
      **(given.get("rope_scaling") or {}),
      "rope_theta": given["rope_theta"],
    }
  elif _FULL in rope:
    sliding = rope.get(_SLIDING, {})
    if sliding.get("rope_type", "default") != "default":
      _refuse_rope(_SLIDING, sliding, setting, path)
    local = sliding.get("rope_theta", local)
    rope = rope[_FULL]
  kind = rope.get("rope_type", rope.get("type", "default"))
  fields = {"rope_theta": rope.get("rope_theta", given["rope_theta"])}
  if kind in ("linear", "llama3"):
    fields["rope_factor"] = rope["factor"]
  if kind == "llama3":
    fields["rope_bands"] = tuple(rope[name] for name in _BANDS)
  if kind not in ("default", "linear", "llama3"):
    _refuse_rope(_FULL, rope, setting, path)
  return fields, local


_BANDS = (
  "low_freq_factor",
  "high_freq_factor",
  "original_max_position_embeddings",
)


def _refuse_rope(kind, rope, setting, path):
  raise ValueError(
    "expected rotary positions of type 'default', 'linear' or 'llama3', got"
    f" {rope} for {kind} in {os.fspath(path)}; set {setting} to a model with them"
  )


def family_of(config: network.RotaryConfig) -> str:
  """Returns the family of a configuration: its own, or the first that fits.

  Raises:
    ValueError: if its family does not compute what the configuration says.
  """
  names = [config.family] if config.family else [*families.TABLE]
  for name in names:
    if name in families.TABLE and computes(families.TABLE[name], config):
      return name
  raise ValueError(
    f"expected a configuration of {' or '.join(map(repr, families.TABLE))}, got"
    f" {config}; set --format=gkd, or network.RotaryConfig.family"
  )


def computes(family: families.Family, config: network.RotaryConfig) -> bool:
  """Returns whether a family's networks compute what a configuration says."""
  fields = write_fields(config, family)
  again = read_fields(fields, family, setting="", path="")
  return _computation(again) == _computation(config)


def _computation(config):
  """Returns the fields that decide what the network computes, in one form."""
  scalar = config.query_pre_attn_scalar or config.head_dim
  return dataclasses.replace(
    config,
    family="",
    max_positions=None,
    query_pre_attn_scalar=scalar,
    window_pattern=config.layer_kinds,
    # How it is trained.
    dtype="float32",
    remat_policy="none",
    dropout_rate=0.0,
  )


def write_config(config: network.RotaryConfig, dtype: str) -> dict[str, Any]:
  """Returns the content of `config.json`, without special tokens.

  Args:
    config: our configuration.
    dtype: of the parameters.

  Raises:
    ValueError: as `family_of`.
  """
  family = families.TABLE[family_of(config)]
  return write_fields(config, family) | {
    "architectures": [family.architecture],
    "torch_dtype": dtype,
    "use_cache": True,
  }


def write_fields(
  config: network.RotaryConfig, family: families.Family
) -> dict[str, Any]:
  """Returns the fields of `config.json`, or of a side's part of it."""
  known = _known(family)
  windowed = any(config.layer_kinds)
  fields = {
    theirs: getattr(config, ours)
    for theirs, ours in _FIELDS.items()
    if theirs in known
  }
  if "query_pre_attn_scalar" in known:
    fields["query_pre_attn_scalar"] = (
      config.query_pre_attn_scalar or config.head_dim
    )
  if "sliding_window" in known:
    fields["sliding_window"] = config.window if windowed else None
  if "use_sliding_window" in known:
    fields["use_sliding_window"] = windowed
  if "sliding_window_pattern" in known or "use_sliding_window" in known:
    fields["layer_types"] = [
      _SLIDING if kind else _FULL for kind in config.layer_kinds
    ]
  if "max_window_layers" in known:
    # Of the layers before it none is windowed.
    fields["max_window_layers"] = [*config.layer_kinds, 1].index(1)
  if "rope_local_base_freq" in known:
    fields["rope_local_base_freq"] = (
      config.local_rope_theta or config.rope_theta
    )
  names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  return fields | {
    "model_type": family.name,
    _activation(family): names.get(config.mlp_activations),
    "rope_theta": config.rope_theta,
    "rope_scaling": _rope_scaling(config),
    "max_position_embeddings": config.max_positions or _MAX_POSITIONS,
  }


def _rope_scaling(config):
  if config.rope_factor == 1:
    return None
  if not config.rope_bands:
    return {"rope_type": "linear", "factor": config.rope_factor}
  return {
    "rope_type": "llama3",
    "factor": config.rope_factor,
    **dict(zip(_BANDS, config.rope_bands, strict=True)),
  }
