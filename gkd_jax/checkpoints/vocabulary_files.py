"""The files of a tokenizer beside a model: copied, or made from GGUF metadata.

A folder of Hugging Face's family has them beside the weights, and so have our own
folder and an export: the vocabulary of a model travels with it.
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors

from gkd_jax import model_folders

TOKENIZER_FILE = model_folders.TOKENIZER_FILE
CONFIG_FILE = model_folders.TOKENIZER_CONFIG_FILE
_KEY = "tokenizer.ggml"
# Types of a token in GGUF.
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {
  "bos_token": "bos_token_id",
  "eos_token": "eos_token_id",
  "pad_token": "padding_token_id",
  "unk_token": "unknown_token_id",
}


def _byte_level():
  return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_and_bytes():
  digits = pre_tokenizers.Digits(individual_digits=True)
  return pre_tokenizers.Sequence([digits, _byte_level()])


# How a text is divided before merges, by its name in GGUF.
_DIVIDED: dict[str, Callable[[], Any]] = {
  "gpt-2": _byte_level,
  "smollm": _digits_and_bytes,
}


def read(folder: epath.Path) -> dict[str, bytes]:
  """Returns the tokenizer's files in a folder, name to content."""
  found = {name: folder / name for name in model_folders.TOKENIZER_FILES}
  return {k: file.read_bytes() for k, file in found.items() if file.is_file()}


def check_eos(
  folder: epath.Path, eos: tuple[int, ...], *, setting: str
) -> None:
  """Checks that the tokenizer of a folder ends texts as a model does.

  Args:
    folder: with `tokenizer.json`.
    eos: ids of the model.
    setting: what the user set the folder with, for the message.

  Raises:
    ValueError: there is no such file, or its EOS is none of the model's.
  """
  if not (folder / TOKENIZER_FILE).is_file():
    raise ValueError(
      f"expected {TOKENIZER_FILE}, got none in {os.fspath(folder)}; set {setting}"
    )
  config = folder / CONFIG_FILE
  named = json.loads(config.read_text()) if config.is_file() else {}
  token = named.get("eos_token")
  if token is None:
    return
  made = tokenizers.Tokenizer.from_str((folder / TOKENIZER_FILE).read_text())
  text = token["content"] if isinstance(token, dict) else token
  if made.token_to_id(text) not in eos:
    raise ValueError(
      f"expected a tokenizer whose EOS is {' or '.join(map(str, eos))}, as the"
      f" checkpoint says, got {made.token_to_id(text)} ({text!r}) in"
      f" {os.fspath(folder)}; set {setting}"
    )


def of_gguf(metadata: Mapping[str, Any]) -> dict[str, bytes]:
  """Makes a tokenizer's files from the metadata of a GGUF file.

  Args:
    metadata: key to value.

  Returns:
    Name to content, as of `read`; {} if the tokenizer is of another kind than
    pairs of bytes, or divides texts in a way that is not known here.
  """

  def said(name: str) -> Any:
    return metadata.get(f"{_KEY}.{name}")

  divided = _DIVIDED.get(said("pre") or "")
  if said("model") != "gpt2" or divided is None:
    return {}
  pieces = said("tokens")
  made = tokenizers.Tokenizer(
    models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=[tuple(merge.split(" ", 1)) for merge in said("merges")],
    )
  )
  made.pre_tokenizer = divided()
  made.decoder = decoders.ByteLevel()
  kinds = list(zip(pieces, said("token_type") or (), strict=False))
  added = lambda text, special: tokenizers.AddedToken(
    text, special=special, normalized=False
  )
  made.add_special_tokens(
    [added(piece, True) for piece, kind in kinds if kind == _CONTROL]
  )
  made.add_tokens(
    [added(piece, False) for piece, kind in kinds if kind == _USER_DEFINED]
  )
  named = {
    name: pieces[said(key)]
    for name, key in _SPECIAL.items()
    if said(key) is not None
  }
  if said("add_bos_token") and "bos_token" in named:
    bos = named["bos_token"]
    made.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, said("bos_token_id"))]
    )
  config: dict[str, Any] = named | {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    # Or transformers 4 also returns token types, which its models refuse.
    "model_input_names": ["input_ids", "attention_mask"],
  }
  template = metadata.get("tokenizer.chat_template")
  if template is not None:
    config["chat_template"] = template
  return {
    TOKENIZER_FILE: (made.to_str() + "\n").encode(),
    CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
  }
