"""Hugging Face's decoder-only families with rotary positions, as a table.

A family is a row of `TABLE`: what `config.json` means where it is silent, which
of our fields are always the same, and which parameters a layer has. The rest is
common to all: fields of `config.json` and names of parameters, theirs and ours.

References: the fields and parameter names of `transformers`, versions 4.57 and
5.24, https://huggingface.co/docs/transformers/model_doc/llama and its siblings.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from gkd_jax import network

SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Family:
  """A row of the table.

  Attributes:
    architecture: their class.
    defaults: fields that `config.json` leaves out when they have these values.
    constants: our fields that the family has always alike.
    norms: our name of a norm in a layer to theirs.
  """

  architecture: str
  defaults: Mapping[str, Any]
  constants: Mapping[str, Any]
  norms: Mapping[str, str]


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
}
# Fixed in our network, in all families that have the field.
_FIXED = {
  "attention_bias": False,
  "mlp_bias": False,
  "partial_rotary_factor": 1.0,
  "use_bidirectional_attention": False,
}
_LLAMA_DEFAULTS = {
  "vocab_size": 32000,
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000.0,
  "tie_word_embeddings": False,
  "hidden_act": "silu",
}
_QWEN_DEFAULTS = _LLAMA_DEFAULTS | {
  "vocab_size": 151936,
  "intermediate_size": 22016,
  "num_key_value_heads": 32,
  "sliding_window": 4096,
  "use_sliding_window": False,
  "max_window_layers": 28,
}
_GEMMA_DEFAULTS = {
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": True,
  "hidden_activation": "gelu_pytorch_tanh",
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
}
_LLAMA_NORMS = {
  "pre_self_attention_layer_norm": "input_layernorm",
  "pre_mlp_layer_norm": "post_attention_layernorm",
}
_GEMMA_NORMS = {
  "pre_self_attention_layer_norm": "input_layernorm",
  "post_self_attention_layer_norm": "post_attention_layernorm",
  "pre_mlp_layer_norm": "pre_feedforward_layernorm",
  "post_mlp_layer_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {
  "self_attention/query_norm": "self_attn.q_norm",
  "self_attention/key_norm": "self_attn.k_norm",
}
_GEMMA = {
  "mlp_activations": ("gelu", "linear"),
  "norm_unit_offset": True,
  "post_norms": True,
  "scale_embedding": True,
}
_SILU = {"mlp_activations": ("silu", "linear")}
TABLE = {
  "llama": Family("LlamaForCausalLM", _LLAMA_DEFAULTS, _SILU, _LLAMA_NORMS),
  "mistral": Family(
    "MistralForCausalLM",
    _LLAMA_DEFAULTS
    | {
      "intermediate_size": 14336,
      "num_key_value_heads": 8,
      "sliding_window": 4096,
    },
    _SILU,
    _LLAMA_NORMS,
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    _QWEN_DEFAULTS,
    _SILU | {"qkv_bias": True},
    _LLAMA_NORMS,
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    _QWEN_DEFAULTS | {"head_dim": 128},
    _SILU | {"qk_norm": True},
    _LLAMA_NORMS | _QK_NORMS,
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    _GEMMA_DEFAULTS
    | {
      "vocab_size": 256000,
      "rope_theta": 10_000.0,
      "sliding_window_pattern": 2,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
    _GEMMA,
    _GEMMA_NORMS,
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    _GEMMA_DEFAULTS
    | {
      "vocab_size": 262208,
      "rope_theta": 1_000_000.0,
      "rope_local_base_freq": 10_000.0,
      "sliding_window_pattern": 6,
      "final_logit_softcapping": None,
    },
    # The cap on attention logits in its configuration is never applied.
    _GEMMA | {"qk_norm": True},
    _GEMMA_NORMS | _QK_NORMS,
  ),
}
_ACTIVATIONS = {
  "silu": ("silu", "linear"),
  "gelu_pytorch_tanh": ("gelu", "linear"),
}


def name_table(config: network.RotaryConfig) -> dict[str, tuple[str, bool]]:
  """Returns our parameter path to (their name, whether it is transposed)."""
  norms = TABLE[family_of(config)].norms
  table = {
    "decoder/token_embedder/embedding": ("model.embed_tokens.weight", False),
    "decoder/decoder_norm/scale": ("model.norm.weight", False),
  }
  if not config.logits_via_embedding:
    table["decoder/logits_dense/kernel"] = ("lm_head.weight", True)
  for i in range(config.num_layers):
    here, there = f"decoder/layers_{i}", f"model.layers.{i}"
    for ours, theirs in norms.items():
      table[f"{here}/{ours}/scale"] = (f"{there}.{theirs}.weight", False)
    for ours, theirs in _MATRICES.items():
      table[f"{here}/{ours}/kernel"] = (f"{there}.{theirs}.weight", True)
    for ours, theirs in _BIASED.items() if config.qkv_bias else ():
      table[f"{here}/{ours}/bias"] = (f"{there}.{theirs}.bias", False)
  return table


_BIASED = {
  "self_attention/query": "self_attn.q_proj",
  "self_attention/key": "self_attn.k_proj",
  "self_attention/value": "self_attn.v_proj",
}
_MATRICES = _BIASED | {
  "self_attention/out": "self_attn.o_proj",
  "mlp/wi_0": "mlp.gate_proj",
  "mlp/wi_1": "mlp.up_proj",
  "mlp/wo": "mlp.down_proj",
}


def read_config(
  text: Mapping[str, Any], *, setting: str, path: os.PathLike[str] | str
) -> network.RotaryConfig:
  """Makes our configuration from their fields.

  Args:
    text: the content of `config.json`, whose `model_type` is in `TABLE`.
    setting: what to change, for the message.
    path: of the file, for the message.

  Raises:
    ValueError: if it is not a model that our network computes.
  """
  family = TABLE[text["model_type"]]
  given = {**family.defaults, **text}
  _check(given, setting, path)
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
      "window_pattern": _shortest_period(windowed) if any(windowed) else (),
      "family": text["model_type"],
      **family.constants,
    }
  )


def _known(family):
  """Returns the fields that a family has in `config.json`."""
  return {*family.defaults, "num_key_value_heads", "head_dim"}


def _activation(family):
  return next(name for name in family.defaults if name.startswith("hidden_act"))


def _check(given, setting, path):
  family = TABLE[given["model_type"]]
  activation = _activation(family)
  wanted = {k: v for k, v in _FIXED.items() if given.get(k) is not None}
  wanted[activation] = family.defaults[activation]
  other = {k: given[k] for k, v in wanted.items() if given[k] != v}
  if other:
    raise ValueError(
      f"expected { ({k: wanted[k] for k in other}) }, got {other} in"
      f" {os.fspath(path)}; set {setting} to a {given['model_type']} with"
      " them"
    )


def _windowed(given) -> tuple[bool, ...]:
  """Returns which layers are windowed."""
  depth, kinds = given["num_hidden_layers"], given.get("layer_types")
  if given.get("sliding_window") is None or not given.get(
    "use_sliding_window", True
  ):
    return (False,) * depth
  if kinds is not None:
    return tuple(kind == SLIDING for kind in kinds)
  every, first = (
    given.get("sliding_window_pattern"),
    given.get("max_window_layers", 0),
  )
  return tuple(
    i >= first and not (every and (i + 1) % every == 0) for i in range(depth)
  )


def _shortest_period(pattern):
  """Returns the shortest pattern whose repetition begins with this one."""
  return next(
    pattern[:n]
    for n in range(1, len(pattern) + 1)
    if all(x == pattern[i % n] for i, x in enumerate(pattern))
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
    sliding = rope.get(SLIDING, {})
    if sliding.get("rope_type", "default") != "default":
      _refuse_rope(SLIDING, sliding, setting, path)
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
  for name in [config.family] if config.family else TABLE:
    if name not in TABLE:
      break
    written = _written(config, name)
    again = read_config(written, setting="", path="")
    if _computation(again) == _computation(config):
      return name
  raise ValueError(
    f"expected a configuration of {' or '.join(map(repr, TABLE))}, got {config};"
    " set --format=gkd, or network.RotaryConfig.family"
  )


def _computation(config):
  """Returns the fields that decide what the network computes, in one form."""
  scalar = config.query_pre_attn_scalar or config.head_dim
  return dataclasses.replace(
    config,
    family="",
    query_pre_attn_scalar=scalar,
    mlp_activations=tuple(config.mlp_activations),
    rope_bands=tuple(config.rope_bands),
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
  return _written(config, family_of(config)) | {
    "torch_dtype": dtype,
    "use_cache": True,
  }


def _written(config, name):
  family = TABLE[name]
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
      SLIDING if kind else _FULL for kind in config.layer_kinds
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
    "architectures": [family.architecture],
    "model_type": name,
    _activation(family): names.get(tuple(config.mlp_activations)),
    "rope_theta": config.rope_theta,
    "rope_scaling": _rope_scaling(config),
    # No tables of positions: there is no longest row.
    "max_position_embeddings": 131072,
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
