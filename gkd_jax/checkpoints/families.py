"""Hugging Face's families with rotary positions, as a table.

A decoder-only family is a row of `TABLE`, a side of an encoder-decoder a row of
`SIDES` or `SIDES_2` (see `hf_t5gemma`): what `config.json` means where it is silent,
which of our fields are always the same, and which parameters a layer has. The rest is
common to all, here the names of parameters and in `hf_rotary` the fields.

References: the fields and parameter names of `transformers`, versions 4.57 and
5.24, https://huggingface.co/docs/transformers/model_doc/llama and its siblings.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gkd_jax import network


@dataclasses.dataclass(frozen=True)
class Family:
  """A row of the table.

  Attributes:
    name: their `model_type`.
    architecture: their class; empty for a side.
    defaults: fields that `config.json` leaves out when they have these values.
    constants: our fields that the family has always alike.
    norms: our name of a norm in a layer to theirs.
    tokens: special tokens that `config.json` leaves out when they have these ids.
  """

  name: str
  architecture: str
  defaults: Mapping[str, Any]
  constants: Mapping[str, Any]
  norms: Mapping[str, str]
  tokens: Mapping[str, int]


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
_GEMMA_TOKENS = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}
_LLAMA_TOKENS = {"eos_token_id": 2, "bos_token_id": 1}
_SILU = {"mlp_activations": ("silu", "linear")}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {
  "vocab_size": 256000,
  "rope_theta": 10_000.0,
  "sliding_window_pattern": 2,
  "attn_logit_softcapping": 50.0,
  "final_logit_softcapping": 30.0,
}
_GEMMA3_DEFAULTS = _GEMMA_DEFAULTS | {
  "vocab_size": 262208,
  "rope_theta": 1_000_000.0,
  "rope_local_base_freq": 10_000.0,
  "sliding_window_pattern": 6,
  "final_logit_softcapping": None,
}
_ROWS = (
  Family(
    "llama",
    "LlamaForCausalLM",
    _LLAMA_DEFAULTS,
    _SILU,
    _LLAMA_NORMS,
    _LLAMA_TOKENS,
  ),
  Family(
    "mistral",
    "MistralForCausalLM",
    _LLAMA_DEFAULTS
    | {
      "intermediate_size": 14336,
      "num_key_value_heads": 8,
      "sliding_window": 4096,
    },
    _SILU,
    _LLAMA_NORMS,
    _LLAMA_TOKENS,
  ),
  Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _QWEN_DEFAULTS,
    _SILU | {"qkv_bias": True},
    _LLAMA_NORMS,
    {},
  ),
  Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _QWEN_DEFAULTS | {"head_dim": 128},
    _SILU | {"qk_norm": True},
    _LLAMA_NORMS | _QK_NORMS,
    {},
  ),
  Family(
    "gemma2",
    "Gemma2ForCausalLM",
    _GEMMA2_DEFAULTS,
    _GEMMA,
    _GEMMA_NORMS,
    _GEMMA_TOKENS,
  ),
  Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _GEMMA3_DEFAULTS,
    # The cap on attention logits in its configuration is never applied.
    _GEMMA | {"qk_norm": True},
    _GEMMA_NORMS | _QK_NORMS,
    _GEMMA_TOKENS,
  ),
)
TABLE = {row.name: row for row in _ROWS}
_MLP_NORMS = {
  "pre_mlp_layer_norm": "pre_feedforward_layernorm",
  "post_mlp_layer_norm": "post_feedforward_layernorm",
}
SIDES = {
  "encoder": Family(
    "t5_gemma_module",
    "",
    _GEMMA2_DEFAULTS,
    # Its embedding is no head.
    _GEMMA | {"logits_via_embedding": False},
    _MLP_NORMS
    | {
      "pre_attention_layer_norm": "pre_self_attn_layernorm",
      "post_attention_layer_norm": "post_self_attn_layernorm",
    },
    _GEMMA_TOKENS,
  ),
  "decoder": Family(
    "t5_gemma_module",
    "",
    _GEMMA2_DEFAULTS,
    _GEMMA,
    _MLP_NORMS
    | {
      "pre_self_attention_layer_norm": "pre_self_attn_layernorm",
      "post_self_attention_layer_norm": "post_self_attn_layernorm",
      "pre_cross_attention_layer_norm": "pre_cross_attn_layernorm",
      "post_cross_attention_layer_norm": "post_cross_attn_layernorm",
    },
    _GEMMA_TOKENS,
  ),
}
# Of T5Gemma 2.
SIDES_2 = {
  "encoder": dataclasses.replace(
    SIDES["encoder"],
    name="t5gemma2_text",
    defaults=_GEMMA3_DEFAULTS,
    constants={
      **SIDES["encoder"].constants,
      "qk_norm": True,
      "centred_window": True,
    },
    norms={
      **SIDES["encoder"].norms,
      **{k.removeprefix("self_"): v for k, v in _QK_NORMS.items()},
    },
  ),
  "decoder": dataclasses.replace(
    SIDES["decoder"],
    name="t5gemma2_decoder",
    defaults=_GEMMA3_DEFAULTS,
    constants=_GEMMA | {"qk_norm": True, "merged_attention": True},
    norms=_QK_NORMS
    | {k: v for k, v in SIDES["decoder"].norms.items() if "cross" not in k},
  ),
}


def layer_names(
  config: network.RotaryConfig,
  family: Family,
  side: str,
  prefix: str,
  attentions: Mapping[str, str] = {"self_attention": "self_attn"},
) -> dict[str, tuple[str, bool]]:
  """Returns the part of `name_table` that is below the layers.

  Args:
    config: of the stack.
    family: of the stack.
    side: our name of the stack, "encoder" or "decoder".
    prefix: theirs.
    attentions: our name of an attention to theirs.
  """
  table = {}
  for i in range(config.num_layers):
    here, there = f"{side}/layers_{i}", f"{prefix}.layers.{i}"
    for ours, theirs in family.norms.items():
      table[f"{here}/{ours}/scale"] = (f"{there}.{theirs}.weight", False)
    for ours, theirs in _MLP.items():
      table[f"{here}/mlp/{ours}/kernel"] = (
        f"{there}.mlp.{theirs}.weight",
        True,
      )
    for attention, their_attention in attentions.items():
      of, theirs_of = f"{here}/{attention}", f"{there}.{their_attention}"
      for ours, theirs in _ATTENTION.items():
        table[f"{of}/{ours}/kernel"] = (f"{theirs_of}.{theirs}.weight", True)
        if config.qkv_bias and ours != "out":
          table[f"{of}/{ours}/bias"] = (f"{theirs_of}.{theirs}.bias", False)
  return table


_ATTENTION = {
  "query": "q_proj",
  "key": "k_proj",
  "value": "v_proj",
  "out": "o_proj",
}
_MLP = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
