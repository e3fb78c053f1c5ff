"""Reads GGUF files of Llama's family, with the library `gguf`.

Quantised arrays are dequantised to float32 when they are read, row by row. The
rows of query and key are in another order than in Hugging Face's files: their
rotation pairs neighbours, Hugging Face's pairs the halves of a head.

References: the format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md,
and the names of `gguf.constants`.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from gkd_jax import files, types
from gkd_jax.checkpoints import hf_rotary, huggingface, stored_arrays

SUFFIX = ".gguf"
_ARCHITECTURE = "llama"
# The keys of the network after the architecture's name, to Hugging Face's fields.
_FIELDS = {
  "embedding_length": "hidden_size",
  "feed_forward_length": "intermediate_size",
  "block_count": "num_hidden_layers",
  "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.key_length": "head_dim",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "rope.freq_base": "rope_theta",
  "context_length": "max_position_embeddings",
}
_OPTIONAL = {
  "attention.head_count_kv",
  "attention.key_length",
  "rope.freq_base",
  "context_length",
}
_NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_OF_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(\w+)")
_SCALED = "rope_freqs.weight"


class Contents(NamedTuple):
  """What a file holds, in Hugging Face's terms.

  Attributes:
    config: the fields of `config.json`.
    arrays: their names to arrays.
    metadata: all keys of the file to their values.
  """

  config: dict[str, Any]
  arrays: dict[str, stored_arrays.StoredArray]
  metadata: Mapping[str, Any]


def read(file: epath.Path, *, setting: str) -> Contents:
  """Reads a file's metadata; its arrays are read when they are needed.

  Args:
    file: local, since its pages are mapped into memory.
    setting: what the user set the path with, for the messages.

  Raises:
    ImportError: the library is not installed.
    ValueError: the file is damaged, or of another family.
  """
  if files.is_remote(file):
    raise ValueError(
      f"expected a local GGUF file, got {os.fspath(file)}; copy it, and set"
      f" {setting}"
    )
  status = os.stat(file)
  return _read(os.fspath(file), status.st_mtime_ns, status.st_size, setting)


def read_config(file: epath.Path, *, setting: str) -> Any:
  """Returns our configuration; see `read`."""
  text = read(file, setting=setting).config
  return hf_rotary.read_config(text, setting=setting, path=file)


def open_file(
  file: epath.Path, *, setting: str
) -> dict[str, stored_arrays.StoredArray]:
  """Lists the parameters under our names, without reading them; see `read`."""
  contents = read(file, setting=setting)
  return huggingface.to_our_names(
    contents.arrays,
    contents.config,
    read_config(file, setting=setting),
    setting=setting,
    path=file,
  )


def read_special_tokens(
  file: epath.Path, *, setting: str
) -> types.SpecialTokens:
  """Returns what a file says of EOS, PAD and the decoder's start; see `read`."""
  metadata = read(file, setting=setting).metadata
  said = lambda name: metadata.get(f"tokenizer.ggml.{name}_token_id")
  # Some chat models end a turn by another token than a text.
  eos = [int(i) for i in (said("eos"), said("eot")) if i is not None]
  pad = said("padding")
  start = next(i for i in (said("bos"), pad, *eos, 0) if i is not None)
  return types.SpecialTokens(
    tuple(dict.fromkeys(eos)), None if pad is None else int(pad), int(start)
  )


@functools.lru_cache(maxsize=2)
def _read(file, modified_ns, size, setting) -> Contents:
  del modified_ns, size  # a file that was written anew is read anew
  library = _library(setting)
  try:
    reader = library.GGUFReader(file)
    metadata = {key: x.contents() for key, x in reader.fields.items()}
  except (ValueError, IndexError, KeyError) as error:
    raise ValueError(
      f"expected a whole GGUF file, got {type(error).__name__}: {error} in"
      f" {file}; copy it again, or set {setting}"
    ) from error
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  config = _config(metadata, tensors, file, setting)
  _check_types(library, tensors.values(), file, setting)
  heads = {
    "attn_q": config["num_attention_heads"],
    "attn_k": config["num_key_value_heads"],
  }
  arrays = {}
  for name, tensor in tensors.items():
    layer = _OF_LAYER.fullmatch(name)
    order = None
    if layer and layer[2] in heads:
      order = _halves(int(tensor.shape[-1]), heads[layer[2]])
    arrays[_their_name(name)] = _stored(library, tensor, order)
  return Contents(config, arrays, metadata)


def _library(setting):
  try:
    import gguf  # an extra
  except ImportError as error:
    raise ImportError(
      "expected the library gguf for a .gguf file, got none; run pip install"
      f" 'gkd_jax[gguf]', or set {setting} to another checkpoint"
    ) from error
  return gguf


def _config(metadata, tensors, file, setting) -> dict[str, Any]:
  """Returns the fields of `config.json`."""
  kind = metadata.get("general.architecture")
  if kind != _ARCHITECTURE:
    raise ValueError(
      f"expected a GGUF file of the architecture {_ARCHITECTURE!r}, got {kind!r}"
      f" in {file}; set {setting} to one, or to the model's folder of Hugging"
      " Face"
    )
  if _SCALED in tensors:
    raise ValueError(
      f"expected rotary positions without factors of their own, got {_SCALED}"
      f" in {file}; set {setting} to the model's folder of Hugging Face"
    )
  key = lambda name: f"{kind}.{name}"
  needed = [key(name) for name in _FIELDS if name not in _OPTIONAL]
  missing = [name for name in needed if name not in metadata]
  missing += [n for n in ("token_embd.weight",) if n not in tensors]
  if missing:
    raise ValueError(
      f"expected {', '.join(missing)}, got none in {file}; copy it again, or set"
      f" {setting}"
    )
  config = {
    field: _shortest(metadata[key(name)])
    for name, field in _FIELDS.items()
    if key(name) in metadata
  }
  config.setdefault("num_key_value_heads", config["num_attention_heads"])
  scaling = metadata.get(key("rope.scaling.type"), "none")
  if scaling != "none":
    factor = metadata.get(key("rope.scaling.factor"), 1.0)
    config["rope_scaling"] = {"rope_type": scaling, "factor": factor}
  return config | {
    "model_type": kind,
    "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
    "tie_word_embeddings": "output.weight" not in tensors,
  }


def _shortest(value):
  """Returns the decimal that a float32 was written for: 1e-05, not 9.99...e-06."""
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _check_types(library, tensors, file, setting) -> None:
  """Raises a ValueError for types that the library cannot dequantise."""
  first = {tensor.tensor_type: tensor for tensor in tensors}
  for kind, tensor in first.items():
    try:
      library.quants.dequantize(tensor.data[:1], kind)
    except NotImplementedError as error:
      raise ValueError(
        f"expected arrays that gguf dequantises, got {kind.name} in {file}; set"
        f" {setting} to a file of another type, such as Q8_0"
      ) from error


def _their_name(name: str) -> str:
  """Returns Hugging Face's name of an array, or the same if it has none."""
  layer = _OF_LAYER.fullmatch(name)
  if layer and layer[2] in _LAYER_NAMES:
    return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
  stem, _, kind = name.rpartition(".")
  return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name


def _halves(rows: int, heads: int) -> np.ndarray:
  """Returns the row of the file for each row of Hugging Face's array.

  >>> _halves(8, 2)
  array([0, 2, 1, 3, 4, 6, 5, 7])

  Args:
    rows: of the array.
    heads: each with as many rows.
  """
  pairs = np.arange(rows).reshape(heads, -1, 2)
  return pairs.swapaxes(1, 2).reshape(-1)


def _stored(library, tensor, order) -> stored_arrays.StoredArray:
  """Returns an array, dequantised when read.

  Args:
    library: `gguf`.
    tensor: of its reader; sizes of axes are listed backwards.
    order: row of the file for each row of the array, None for the same.
  """
  read_rows: Callable = lambda rows: tensor.data[
    rows if order is None else order[rows]
  ]

  def fetch(index):
    numbers = library.quants.dequantize(read_rows(index[0]), tensor.tensor_type)
    return np.asarray(numbers, np.float32)[:, *index[1:]]

  def fetch_vector(index):
    numbers = library.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(numbers, np.float32)[index]

  shape = tuple(int(size) for size in reversed(tensor.shape))
  return stored_arrays.StoredArray(
    shape,
    np.dtype(np.float32),
    fetch if len(shape) > 1 else fetch_vector,
  )
