"""What a model's folder says of its tokenizer: files, and special tokens.

A folder of Hugging Face's, ours, an export or a run's MODEL_DIR. Rooms that read
parameters and rooms that read data ask here.
"""

from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from gkd_jax import files

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# SentencePiece models, the first that is there.
PIECES_FILES = "spiece.model", "tokenizer.model", "sentencepiece.model"
# All that belongs to a tokenizer.
TOKENIZER_FILES = (
  TOKENIZER_FILE,
  TOKENIZER_CONFIG_FILE,
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  *PIECES_FILES,
)
# The key of special tokens in a `config.json` of ours, and its fields by those of
# Hugging Face's.
SPECIAL_TOKENS = "special_tokens"
_OURS = {
  "eos_token_id": "eos",
  "pad_token_id": "pad",
  "decoder_start_token_id": "start",
}


def stated_tokens(
  folder: epath.Path,
  defaults: Mapping[str, Any] = {},
  read: Callable[[epath.Path], Any] = files.read_json,
) -> dict[str, Any]:
  """Returns the special tokens that a model's configuration states.

  As in transformers, `generation_config.json` comes before `config.json`, which
  may be ours.

  Args:
    folder: of the model.
    defaults: what holds where neither file says anything.
    read: reads a JSON file that is there.

  Returns:
    Hugging Face's field, such as `pad_token_id`, to id; `eos_token_id` to a list
    of ids, which may be empty.
  """
  said = dict(defaults)
  for name in (CONFIG_FILE, GENERATION_FILE):
    if not (folder / name).is_file():
      continue
    fields = read(folder / name)
    ours = fields.get(SPECIAL_TOKENS) or {}
    found = {theirs: ours.get(name) for theirs, name in _OURS.items()} | fields
    said |= {
      field: value
      for field, value in found.items()
      if field.endswith("_token_id") and value is not None
    }
  eos = said.get("eos_token_id", [])
  return said | {"eos_token_id": eos if isinstance(eos, list) else [eos]}
