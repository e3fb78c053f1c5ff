"""Hugging Face's T5: T5, T5 1.1, FLAN-T5, T0, mT5, ByT5, umT5.

References: the fields of `transformers.T5Config` and the parameter names of
`transformers.T5ForConditionalGeneration`, versions 4.57 and 5.17,
https://huggingface.co/docs/transformers/model_doc/t5
"""

import os
from collections.abc import Mapping
from typing import Any

from gkd_jax import network

# Fields that `config.json` leaves out when they have these values.
_T5_DEFAULTS = {
  "vocab_size": 32128,
  "d_model": 512,
  "d_kv": 64,
  "d_ff": 2048,
  "num_layers": 6,
  "num_heads": 8,
  "dropout_rate": 0.1,
  "feed_forward_proj": "relu",
  "tie_word_embeddings": True,
}
_MT5_DEFAULTS = _T5_DEFAULTS | {
  "vocab_size": 250112,
  "d_ff": 1024,
  "num_layers": 8,
  "num_heads": 6,
  "feed_forward_proj": "gated-gelu",
  "tie_word_embeddings": False,
}
DEFAULTS = {
  "t5": _T5_DEFAULTS,
  "mt5": _MT5_DEFAULTS,
  "umt5": _MT5_DEFAULTS | {"tie_word_embeddings": True},
}
CONFIG = network.T5Config
KINDS = tuple(DEFAULTS)
EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# In the first T5 checkpoints.
UNUSED = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
START = "decoder_start_token_id"
# Our fields to theirs, beside the activations and the head.
_FIELDS = {
  "vocab_size": "vocab_size",
  "emb_dim": "d_model",
  "head_dim": "d_kv",
  "mlp_dim": "d_ff",
  "num_encoder_layers": "num_layers",
  "num_decoder_layers": "num_decoder_layers",
  "num_heads": "num_heads",
  "dropout_rate": "dropout_rate",
}
# Fixed in our network.
_FIXED = {
  "relative_attention_num_buckets": 32,
  "relative_attention_max_distance": 128,
  "layer_norm_epsilon": 1e-6,
  "is_encoder_decoder": True,
}
# Their name of the feed-forward block to ours; "gelu" is the tanh formula in
# both, and "gelu_new" their name for it.
_ACTIVATIONS = {
  "relu": ("relu",),
  "gated-gelu": ("gelu", "linear"),
  "gated-gelu_new": ("gelu", "linear"),
  "gated-silu": ("silu", "linear"),
  "gated-relu": ("relu", "linear"),
}
_ATTENTION = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
# Our sub-layer: norm, name; their layer number and name, for each side.
_SUBLAYERS = {
  "encoder": (
    ("pre_attention_layer_norm", "attention", "SelfAttention"),
    ("pre_mlp_layer_norm", "mlp", "DenseReluDense"),
  ),
  "decoder": (
    ("pre_self_attention_layer_norm", "self_attention", "SelfAttention"),
    (
      "pre_cross_attention_layer_norm",
      "encoder_decoder_attention",
      "EncDecAttention",
    ),
    ("pre_mlp_layer_norm", "mlp", "DenseReluDense"),
  ),
}


def name_table(config: network.T5Config) -> dict[str, tuple[str, bool]]:
  """Returns our parameter path to (their name, whether it is transposed)."""
  table = {"token_embedder/embedding": (EMBEDDING, False)}
  depths = {
    "encoder": config.num_encoder_layers,
    "decoder": config.num_decoder_layers,
  }
  branches = range(len(config.mlp_activations))
  inner = ["wi"] if len(branches) == 1 else [f"wi_{i}" for i in branches]
  mlp = [(name, name) for name in (*inner, "wo")]
  for side, depth in depths.items():
    # umT5 has relative positions in each layer, the others in the first alone.
    own = config.relative_bias_per_layer
    for i in range(depth if own else 1):
      here = f"{side}/layers_{i}" if own else side
      attention = f"{side}.block.{i}.layer.0.SelfAttention"
      table[f"{here}/relpos_bias/rel_embedding"] = (
        f"{attention}.relative_attention_bias.weight",
        True,
      )
    final_norm = f"{side}.final_layer_norm.weight"
    table[f"{side}/{side}_norm/scale"] = (final_norm, False)
    for i in range(depth):
      for j, (norm, ours, theirs) in enumerate(_SUBLAYERS[side]):
        here, there = f"{side}/layers_{i}", f"{side}.block.{i}.layer.{j}"
        table[f"{here}/{norm}/scale"] = (f"{there}.layer_norm.weight", False)
        for a, b in mlp if ours == "mlp" else _ATTENTION:
          name = f"{there}.{theirs}.{b}.weight"
          table[f"{here}/{ours}/{a}/kernel"] = (name, True)
  if not config.logits_via_embedding:
    table["decoder/logits_dense/kernel"] = (HEAD, True)
  return table


def special_tokens(text: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of special tokens that `config.json` may leave out."""
  del text
  return {"eos_token_id": 1, "pad_token_id": 0}


def read_config(
  text: Mapping[str, Any], *, setting: str, path: os.PathLike[str] | str
) -> network.T5Config:
  """Makes our configuration from their fields.

  Args:
    text: the content of `config.json`.
    setting: what to change, for the message.
    path: of the file, for the message.

  Raises:
    ValueError: if it is not a T5 that our network computes.
  """
  fields = {**DEFAULTS[text["model_type"]], **text}
  other = {k: fields[k] for k, v in _FIXED.items() if fields.get(k, v) != v}
  if other or fields["feed_forward_proj"] not in _ACTIVATIONS:
    raise ValueError(
      f"expected {_FIXED} and feed_forward_proj of {list(_ACTIVATIONS)}, got"
      f" {other or fields['feed_forward_proj']} in {os.fspath(path)}; set"
      f" {setting} to a T5, FLAN-T5, T0, mT5 or ByT5"
    )
  if fields.get("num_decoder_layers") is None:
    fields = fields | {"num_decoder_layers": fields["num_layers"]}
  return network.T5Config(
    **{ours: fields[theirs] for ours, theirs in _FIELDS.items()},
    mlp_activations=_ACTIVATIONS[fields["feed_forward_proj"]],
    logits_via_embedding=_scales_logits(fields),
    relative_bias_per_layer=fields["model_type"] == "umt5",
  )


def _scales_logits(fields):
  """Returns whether logits are divided by sqrt(D), as with T5 1.0's tied head.

  Up to version 4 `tie_word_embeddings` means that. Version 5 always sets it, for
  an `lm_head` that is absent or equal to the embedding; it has another field for
  the division, and never divides in mT5.
  """
  if "scale_decoder_outputs" in fields:
    return bool(fields["scale_decoder_outputs"])
  major = str(fields.get("transformers_version", "4")).partition(".")[0]
  if fields["model_type"] == "mt5" and major.isdigit() and int(major) > 4:
    return False
  return bool(fields["tie_word_embeddings"])


def write_config(config: network.T5Config, dtype: str) -> dict[str, Any]:
  """Returns the content of `config.json`, without special tokens.

  Args:
    config: our configuration.
    dtype: of the parameters.

  Raises:
    ValueError: if Hugging Face's T5 does not have this feed-forward block.
  """
  name = "umt5" if config.relative_bias_per_layer else "t5"
  names = {ours: name for name, ours in reversed(_ACTIVATIONS.items())}
  activations = tuple(config.mlp_activations)
  if activations not in names:
    raise ValueError(
      f"expected mlp_activations of {list(names)}, which Hugging Face's T5 has,"
      f" got {activations}; set --format=gkd or --format=t5x"
    )
  return {
    "architectures": [f"{name.upper()}ForConditionalGeneration"],
    "model_type": name,
    **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
    "feed_forward_proj": names[activations],
    "tie_word_embeddings": config.logits_via_embedding,
    **_FIXED,
    "initializer_factor": 1.0,
    "use_cache": True,
    "torch_dtype": dtype,
  }
