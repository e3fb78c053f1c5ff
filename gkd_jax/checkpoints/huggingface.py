"""Hugging Face's T5 folders, both ways: T5, T5 1.1, FLAN-T5, T0, mT5, ByT5.

One table of names serves both directions: ours on the left, theirs on the
right, and whether the matrix is transposed (PyTorch's linear layers store
`[out, in]`). A folder is `config.json` and `model.safetensors`, or several
safetensors files with `model.safetensors.index.json`.

References: the fields of `transformers.T5Config` and the parameter names of
`transformers.T5ForConditionalGeneration`, versions 4.57 and 5.17,
https://huggingface.co/docs/transformers/model_doc/t5
"""

import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from gkd_jax import network, types
from gkd_jax.checkpoints import (
  errors,
  parameters,
  safetensors_io,
  stored_arrays,
)

GENERATION_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
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
_DEFAULTS = {
  "t5": _T5_DEFAULTS,
  "mt5": _T5_DEFAULTS
  | {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
  },
}
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
# Copies of the embedding that some files have besides it, or instead of it.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"
# In the first T5 checkpoints; nothing ever read it.
_UNUSED = (
  "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
)


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
    first = f"{side}.block.0.layer.0.SelfAttention"
    bias = "relative_attention_bias.weight"
    table[f"{side}/relpos_bias/rel_embedding"] = (f"{first}.{bias}", True)
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
    table["decoder/logits_dense/kernel"] = (_HEAD, True)
  return table


def read_config(folder: epath.Path, *, setting: str) -> network.T5Config:
  """Reads `config.json`.

  Raises:
    ValueError: if it is not a T5 that our network computes.
  """
  return _read_config(folder, setting)[1]


def _read_config(folder, setting):
  """Returns the fields of `config.json`, defaults filled in, and our form of them."""
  file = folder / safetensors_io.CONFIG_FILE
  fields = safetensors_io.read_json(file, setting=setting)
  kind = fields.get("model_type")
  if kind not in _DEFAULTS:
    raise ValueError(
      f"expected model_type {' or '.join(map(repr, _DEFAULTS))}, got {kind!r} in"
      f" {os.fspath(file)}; set {setting} to a T5, FLAN-T5, T0, mT5 or ByT5"
    )
  fields = _DEFAULTS[kind] | fields
  other = {k: fields[k] for k, v in _FIXED.items() if fields.get(k, v) != v}
  if other or fields["feed_forward_proj"] not in _ACTIVATIONS:
    raise ValueError(
      f"expected {_FIXED} and feed_forward_proj of {list(_ACTIVATIONS)}, got"
      f" {other or fields['feed_forward_proj']} in {os.fspath(file)}; set"
      f" {setting} to a T5, FLAN-T5, T0, mT5 or ByT5"
    )
  if fields.get("num_decoder_layers") is None:
    fields["num_decoder_layers"] = fields["num_layers"]
  config = network.T5Config(
    **{ours: fields[theirs] for ours, theirs in _FIELDS.items()},
    mlp_activations=_ACTIVATIONS[fields["feed_forward_proj"]],
    logits_via_embedding=_scales_logits(fields),
  )
  return fields, config


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


def read_special_tokens(
  folder: epath.Path, *, setting: str
) -> types.SpecialTokens:
  """Returns what a folder says of EOS, PAD and the decoder's start.

  As in transformers, `generation_config.json` comes before `config.json`.

  Args:
    folder: with `config.json`.
    setting: what the user set the path with, for the messages.
  """
  said = {"eos_token_id": 1, "pad_token_id": 0}  # of transformers' T5Config
  for name in (safetensors_io.CONFIG_FILE, GENERATION_FILE):
    if (folder / name).exists():
      text = safetensors_io.read_json(folder / name, setting=setting)
      said |= {k: v for k, v in text.items() if v is not None}
  eos, pad = said["eos_token_id"], said["pad_token_id"]
  return types.SpecialTokens(
    tuple(eos) if isinstance(eos, list) else (eos,),
    pad,
    said.get("decoder_start_token_id", pad),
  )


def generation_fields(tokens: types.SpecialTokens) -> dict[str, Any]:
  """Returns the fields of `generation_config.json`.

  Where a vocabulary has no PAD, what follows an output is EOS.
  """
  eos = list(tokens.eos)
  pad = tokens.pad
  if pad is None and eos:
    pad = eos[0]
  return {
    "decoder_start_token_id": tokens.start,
    "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    "pad_token_id": pad,
  }


def write_config(
  config: network.T5Config,
  dtype: str,
  tokens: types.SpecialTokens = types.T5_TOKENS,
) -> dict[str, Any]:
  """Returns the content of `config.json`.

  Args:
    config: our configuration.
    dtype: of the parameters.
    tokens: of the model.

  Raises:
    ValueError: if Hugging Face's T5 does not have this feed-forward block.
  """
  names = {ours: name for name, ours in reversed(_ACTIVATIONS.items())}
  activations = tuple(config.mlp_activations)
  if activations not in names:
    raise ValueError(
      f"expected mlp_activations of {list(names)}, which Hugging Face's T5 has,"
      f" got {activations}; set --format=gkd or --format=t5x"
    )
  return {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
    "feed_forward_proj": names[activations],
    "tie_word_embeddings": config.logits_via_embedding,
    **_FIXED,
    "initializer_factor": 1.0,
    "use_cache": True,
    **generation_fields(tokens),
    "torch_dtype": dtype,
  }


def open_folder(
  folder: epath.Path, *, setting: str
) -> dict[str, stored_arrays.StoredArray]:
  """Lists a folder's parameters under our names, without reading them.

  Args:
    folder: with `config.json` and safetensors.
    setting: what the user set the path with, for the messages.

  Raises:
    ValueError: if the folder has no safetensors or lacks a file, or lists all
      parameters that are unmapped, missing, duplicated or of a wrong shape.
  """
  fields, config = _read_config(folder, setting)
  theirs = _open_files(folder, setting)
  table = name_table(config)
  copies = [n for n in (EMBEDDING, *_COPIES) if n in theirs]
  if config.logits_via_embedding and _HEAD in theirs:
    copies.append(_HEAD)
  if copies and EMBEDDING not in theirs:
    theirs[EMBEDDING] = theirs[copies[0]]
  ties_undivided = (
    fields["tie_word_embeddings"] and not config.logits_via_embedding
  )
  if ties_undivided and EMBEDDING in theirs:
    # Tied logits without the division: our network has a separate head.
    theirs.setdefault(_HEAD, theirs[EMBEDDING])
  wanted = {name: ours for ours, (name, _) in table.items()}
  known = {*wanted, *copies, _UNUSED}
  found = {
    ours: theirs[name].transpose() if transposed else theirs[name]
    for ours, (name, transposed) in table.items()
    if name in theirs
  }
  shapes = parameters.shapes(config)
  errors.raise_if_any(
    {
      "missing": [name for name in wanted if name not in theirs],
      "unmapped": [name for name in theirs if name not in known],
      "duplicated with other values": _different(theirs, copies),
      "wrong shape": [
        f"{table[ours][0]} (expected {_theirs(shapes[ours], table[ours])}, got"
        f" {_theirs(x.shape, table[ours])})"
        for ours, x in found.items()
        if x.shape != shapes[ours]
      ],
    },
    expected=f"the {len(table)} parameters of its configuration",
    setting=setting,
    path=folder,
  )
  return found


def rename(
  flat: Mapping[str, stored_arrays.StoredArray], config: network.T5Config
) -> dict[str, stored_arrays.StoredArray]:
  """Renames and transposes parameters for Hugging Face.

  Args:
    flat: our path to array; must fit `config`.
    config: of the network.
  """
  return {
    name: flat[ours].transpose() if transposed else flat[ours]
    for ours, (name, transposed) in name_table(config).items()
  }


def _theirs(shape, entry):
  return shape[::-1] if entry[1] else shape


def _open_files(folder, setting) -> dict[str, stored_arrays.StoredArray]:
  """Opens the arrays of one file, or of all files in the index."""
  whole = folder / safetensors_io.WEIGHTS_FILE
  index = folder / INDEX_FILE
  if not index.exists():
    if not whole.exists():
      raise ValueError(
        f"expected {whole.name} or {index.name}, got"
        f" {errors.listing(folder)} in {os.fspath(folder)} (a"
        " pytorch_model.bin is a pickle, which is never read: convert it with"
        f" transformers' save_pretrained); set {setting}"
      )
    return safetensors_io.open_file(whole, setting=setting)
  places = safetensors_io.read_json(index, setting=setting).get("weight_map")
  if not isinstance(places, dict):
    raise ValueError(
      f"expected a weight_map, got none in {os.fspath(index)}; copy it again, or"
      f" set {setting}"
    )
  files = sorted(set(places.values()))
  absent = [
    name
    for name in files
    if os.path.basename(name) != name or not (folder / name).exists()
  ]
  if absent:
    raise ValueError(
      f"expected the {len(files)} files of {index.name}, got all but"
      f" {', '.join(absent)} in {os.fspath(folder)}; copy it again, or set"
      f" {setting}"
    )
  arrays, repeated = {}, []
  for name in files:
    shard = safetensors_io.open_file(folder / name, setting=setting)
    repeated += [key for key in shard if key in arrays]
    arrays |= shard
  errors.raise_if_any(
    {
      "in several files": repeated,
      "missing": [key for key in places if key not in arrays],
    },
    expected=f"the {len(places)} arrays of {index.name}, each once",
    setting=setting,
    path=folder,
  )
  return arrays


def _different(theirs, copies, rows: int = 4096) -> list[str]:
  """Returns the copies of the embedding that differ from it in any bit."""
  wrong = []
  original = theirs.get(EMBEDDING)
  for name in copies:
    copy = theirs[name]
    if copy is original:
      continue
    same = (copy.shape, copy.dtype) == (original.shape, original.dtype)
    # By rows: the embedding is the largest array.
    for start in range(0, original.shape[0] if same else 0, rows):
      index = (slice(start, start + rows), slice(None))
      same = same and (
        copy.read(index).tobytes() == original.read(index).tobytes()
      )
    if not same:
      wrong.append(name)
  return wrong
