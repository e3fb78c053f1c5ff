"""Hugging Face's folders of T5Gemma: two sides of `families`.

Reference: the fields and parameter names of `transformers.T5GemmaConfig` and
`T5GemmaForConditionalGeneration`, versions 4.57 and 5.24.
"""

import os
from collections.abc import Mapping
from typing import Any

from gkd_jax import network
from gkd_jax.checkpoints import families, hf_rotary

CONFIG = network.T5GemmaConfig
KINDS = ("t5gemma",)
EMBEDDING = "model.decoder.embed_tokens.weight"
HEAD = "lm_head.out_proj.weight"
START = "bos_token_id"
COPIES, UNUSED = (), ".^"  # nothing
_VOCAB_SIZE = 256000  # if `config.json` does not say
_ATTENTIONS = {
  "encoder": {"attention": "self_attn"},
  "decoder": {
    "self_attention": "self_attn",
    "encoder_decoder_attention": "cross_attn",
  },
}


def name_table(config: network.T5GemmaConfig) -> dict[str, tuple[str, bool]]:
  """Returns our parameter path to (their name, whether it is transposed)."""
  encoder = "model.encoder"
  table = {
    "token_embedder/embedding": (EMBEDDING, False),
    "encoder/token_embedder/embedding": (
      f"{encoder}.embed_tokens.weight",
      False,
    ),
    "encoder/encoder_norm/scale": (f"{encoder}.norm.weight", False),
    "decoder/decoder_norm/scale": ("model.decoder.norm.weight", False),
  }
  if not config.logits_via_embedding:
    table["decoder/logits_dense/kernel"] = (HEAD, True)
  for side, attentions in _ATTENTIONS.items():
    table |= families.layer_names(
      getattr(config, side),
      families.SIDES[side],
      side,
      f"model.{side}",
      attentions,
    )
  return table


def special_tokens(text: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of special tokens that `config.json` may leave out."""
  del text
  return dict(families.SIDES["decoder"].tokens)


def read_config(
  text: Mapping[str, Any], *, setting: str, path: os.PathLike[str] | str
) -> network.T5GemmaConfig:
  """Makes our configuration from their fields.

  The vocabulary's size at the top is that of both sides.

  Args:
    text: the content of `config.json`.
    setting: what to change, for the message.
    path: of the file, for the message.

  Raises:
    ValueError: if it is not a model that our network computes.
  """
  tie = "tie_word_embeddings"
  ties = text.get(tie, True), text.get("decoder", {}).get(tie, True)
  if ties[0] != ties[1]:
    # transformers ties such a head to the encoder's table.
    raise ValueError(
      f"expected one {tie} at the top and in 'decoder', got {ties[0]} and"
      f" {ties[1]} in {os.fspath(path)}; set both alike, or {setting}"
    )
  shared = {"vocab_size": text.get("vocab_size", _VOCAB_SIZE)}
  sides = {
    side: hf_rotary.read_fields(
      {**text.get(side, {}), **shared}, family, setting=setting, path=path
    )
    for side, family in families.SIDES.items()
  }
  return network.T5GemmaConfig(**sides)


def write_config(config: network.T5GemmaConfig, dtype: str) -> dict[str, Any]:
  """Returns the content of `config.json`, without special tokens.

  Args:
    config: our configuration.
    dtype: of the parameters.

  Raises:
    ValueError: if T5Gemma does not compute what a side says.
  """
  sides = {}
  for side, family in families.SIDES.items():
    of_side = getattr(config, side)
    if not hf_rotary.computes(family, of_side):
      raise ValueError(
        f"expected a configuration of T5Gemma for the {side}, got {of_side}; set"
        " --format=gkd"
      )
    sides[side] = hf_rotary.write_fields(of_side, family)
  sides["encoder"]["tie_word_embeddings"] = True
  sides["decoder"] |= {
    "is_decoder": True,
    "cross_attention_hidden_size": config.encoder.emb_dim,
  }
  return {
    "architectures": ["T5GemmaForConditionalGeneration"],
    "model_type": KINDS[0],
    "is_encoder_decoder": True,
    "vocab_size": config.vocab_size,
    "tie_word_embeddings": config.logits_via_embedding,
    "dropout_rate": config.dropout_rate,
    **sides,
    "torch_dtype": dtype,
    "use_cache": True,
  }
