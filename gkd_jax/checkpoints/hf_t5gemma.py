"""Hugging Face's folders of T5Gemma and T5Gemma 2: two sides of `families`.

Of T5Gemma 2 what reads texts; what reads images is left aside.

References: the fields and parameter names of `transformers.T5GemmaConfig` and
`T5GemmaForConditionalGeneration`, versions 4.57 and 5.24, and of `T5Gemma2Config`
and `T5Gemma2ForConditionalGeneration`, version 5.24.
"""

import os
from collections.abc import Mapping
from typing import Any

from gkd_jax import network
from gkd_jax.checkpoints import families, hf_rotary

CONFIG = network.T5GemmaConfig
KINDS = ("t5gemma", "t5gemma2")
EMBEDDING = "model.decoder.embed_tokens.weight"
HEAD = "lm_head.out_proj.weight"
START = "bos_token_id"
COPIES = ()
UNUSED = r"model\.encoder\.(vision_tower|multi_modal_projector)\..*"
# If `config.json` does not say.
_VOCAB_SIZE = {"t5gemma": 256000, "t5gemma2": 262208}
_END_OF_IMAGE = 256000
# In exports, which have no images: as small as may be.
_NO_IMAGES = {
  "mm_tokens_per_image": 1,
  "vision_config": {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 4,
    "patch_size": 4,
  },
}
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
  of_encoder = f"{encoder}.embed_tokens.weight", False
  table = {"token_embedder/embedding": (EMBEDDING, False)}
  if config.decoder.merged_attention:
    table["token_embedder/embedding"] = of_encoder
  else:
    table["encoder/token_embedder/embedding"] = of_encoder
  if config.end_of_image is not None:
    vector = f"{encoder}.embed_tokens.eoi_embedding"
    table["token_embedder/vector"] = (vector, False)
  table |= {
    "encoder/encoder_norm/scale": (f"{encoder}.norm.weight", False),
    "decoder/decoder_norm/scale": ("model.decoder.norm.weight", False),
  }
  if not config.logits_via_embedding:
    table["decoder/logits_dense/kernel"] = (HEAD, True)
  for side, family in _sides(config.decoder.merged_attention).items():
    attentions = dict(_ATTENTIONS[side])
    if config.decoder.merged_attention:
      attentions.pop("encoder_decoder_attention", None)
    table |= families.layer_names(
      getattr(config, side), family, side, f"model.{side}", attentions
    )
  return table


def _sides(second):
  return families.SIDES_2 if second else families.SIDES


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
  kind = text["model_type"]
  shared = {"vocab_size": text.get("vocab_size", _VOCAB_SIZE[kind])}
  fields = {side: text.get(side, {}) for side in _ATTENTIONS}
  end_of_image = None
  if kind == "t5gemma2":
    end_of_image = fields["encoder"].get("eoi_token_index", _END_OF_IMAGE)
    fields["encoder"] = fields["encoder"].get("text_config", {})
  sides = {
    side: hf_rotary.read_fields(
      {**fields[side], **shared}, family, setting=setting, path=path
    )
    for side, family in _sides(kind == "t5gemma2").items()
  }
  return network.T5GemmaConfig(**sides, end_of_image=end_of_image)


def write_config(config: network.T5GemmaConfig, dtype: str) -> dict[str, Any]:
  """Returns the content of `config.json`, without special tokens.

  Args:
    config: our configuration.
    dtype: of the parameters.

  Raises:
    ValueError: if T5Gemma does not compute what a side says.
  """
  sides = {}
  second = config.decoder.merged_attention
  for side, family in _sides(second).items():
    of_side = getattr(config, side)
    if not hf_rotary.computes(family, of_side):
      raise ValueError(
        f"expected a configuration of T5Gemma for the {side}, got {of_side}; set"
        " --format=gkd"
      )
    sides[side] = hf_rotary.write_fields(of_side, family)
  sides["encoder"]["tie_word_embeddings"] = True
  if second:
    sides["encoder"] = {
      "model_type": "t5gemma2_encoder",
      "text_config": sides["encoder"],
      "eoi_token_index": config.end_of_image,
      "tie_word_embeddings": True,
      **_NO_IMAGES,
    }
  else:
    sides["decoder"] |= {
      "is_decoder": True,
      "cross_attention_hidden_size": config.encoder.emb_dim,
    }
  return {
    "architectures": [f"T5Gemma{'2' * second}ForConditionalGeneration"],
    "model_type": KINDS[second],
    "is_encoder_decoder": True,
    "vocab_size": config.vocab_size,
    "tie_word_embeddings": config.logits_via_embedding,
    "dropout_rate": config.dropout_rate,
    **sides,
    "torch_dtype": dtype,
    "use_cache": True,
  }
