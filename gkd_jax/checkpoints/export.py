"""Converts checkpoints: `gkd import` and `gkd export`.

Formats that are written; those that are read are listed in `formats`.

gkd  a folder with `model.safetensors` and `config.json`
t5x  `checkpoint_<step>` in T5X's Orbax layout
hf   a folder for `transformers`, with a model card
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from typing import Any

from etils import epath

from gkd_jax import files, types
from gkd_jax.checkpoints import (
  fewer_layers,
  formats,
  huggingface,
  parameters,
  safetensors_io,
  stored_arrays,
  t5x,
  vocabulary_files,
)

FORMATS = ("gkd", "t5x", "hf")
_SETTING = "--checkpoint_path"
Path = os.PathLike[str] | str


def import_checkpoint(
  checkpoint_path: Path,
  output_path: Path,
  *,
  dtype: str | None = None,
  layers: str | None = None,
  encoder_layers: str | None = None,
) -> Any:
  """Reads a checkpoint of any known format and writes our safetensors folder.

  One array is in memory at a time. The files of a tokenizer beside the checkpoint
  are copied, or made from a GGUF file's metadata.

  Args:
    checkpoint_path: see `formats.open_params`.
    output_path: the folder to write.
    dtype: dtype of the stored floating-point arrays; None keeps theirs.
    layers: those to keep, of each side; see `fewer_layers.choose`. None: all.
    encoder_layers: of the encoder, if others than `layers`.

  Returns:
    The configuration. It is inferred from the parameters for T5X's formats,
    which have none.

  Raises:
    ValueError: the checkpoint cannot be read, or is of no network of ours, or
      there are no such layers.
  """
  flat, config, _ = _open(checkpoint_path)
  if layers is not None:
    flat, config = fewer_layers.keep(flat, config, layers, encoder_layers)
  elif encoder_layers is not None:
    raise ValueError(
      f"expected --layers with --encoder_layers={encoder_layers}, got none; set"
      " --layers"
    )
  tokens = formats.load_special_tokens(checkpoint_path, setting=_SETTING)
  safetensors_io.save_safetensors(
    output_path,
    stored_arrays.unflatten(flat),
    safetensors_io.with_special_tokens(config_fields(config), tokens),
    dtype=dtype,
    others=formats.read_tokenizer(checkpoint_path, setting=_SETTING),
  )
  return config


def export_checkpoint(
  checkpoint_path: Path,
  output_path: Path,
  *,
  format: str = "gkd",
  dtype: str | None = None,
  vocabulary_path: Path | None = None,
  extra_ids: int = 100,
  card: Callable[..., str] | None = None,
) -> None:
  """Writes a checkpoint in one of `FORMATS`.

  Args:
    checkpoint_path: see `formats.open_params`.
    output_path: the folder to write.
    format: one of `FORMATS`.
    dtype: dtype of the stored floating-point arrays; None keeps theirs.
    vocabulary_path: for "hf", the SentencePiece model of the tokenizer's files,
      or a folder with `tokenizer.json`; None: of those beside the checkpoint.
    extra_ids: for "hf", number of sentinels after the vocabulary's pieces.
    card: for "hf", returns the text of README.md; called with the keywords
      `name` (of the folder), `num_parameters`, `model_dir` (the run's folder, or
      None), `step` (or None), `architecture` (their class) and `has_tokenizer`.
      None writes no README.md.

  Raises:
    ValueError: if the checkpoint cannot be read or, except for "gkd", is not a
      T5.
  """
  if format not in FORMATS:
    raise ValueError(
      f"expected a format of {', '.join(FORMATS)}, got {format!r}; set --format"
    )
  if vocabulary_path is not None and format != "hf":
    raise ValueError(
      f"expected --format=hf with a vocabulary, got {format}; set --format"
    )
  if format == "gkd":
    safetensors_io.save_safetensors(
      output_path,
      stored_arrays.unflatten(
        formats.open_params(checkpoint_path, setting=_SETTING)
      ),
      safetensors_io.with_special_tokens(
        formats.load_config(checkpoint_path, setting=_SETTING) or {},
        formats.load_special_tokens(checkpoint_path, setting=_SETTING),
      ),
      dtype=dtype,
      others=formats.read_tokenizer(checkpoint_path, setting=_SETTING),
    )
    return
  flat, config, found = _open(checkpoint_path)
  flat = {name: x.cast(dtype, name) for name, x in flat.items()}
  step = _step(found.path)
  if format == "t5x":
    t5x.save_orbax(output_path, flat, config, step=step or 0)
    return
  run = found.path.parent if step is not None else None
  stated = formats.load_special_tokens(checkpoint_path, setting=_SETTING)
  tokens, others = _tokenizer(
    checkpoint_path, vocabulary_path, stated, extra_ids
  )
  theirs = huggingface.write_config(config, "float32", tokens)
  readme = card and card(
    name=epath.Path(output_path).name,
    num_parameters=parameters.count(config),
    model_dir=run,
    step=step,
    architecture=theirs["architectures"][0],
    has_tokenizer=bool(others),
  )
  fields = huggingface.generation_fields(tokens, config)
  others[huggingface.GENERATION_FILE] = _json(fields)
  _write_hf(output_path, flat, config, tokens, others, readme)


def _tokenizer(checkpoint_path, vocabulary_path, stated, extra_ids):
  """Returns a model's special tokens, and its tokenizer's files as content."""
  if vocabulary_path is None:
    files_beside = formats.read_tokenizer(checkpoint_path, setting=_SETTING)
    return stated or types.T5_TOKENS, files_beside
  place = files.absolute(vocabulary_path)
  if place.is_dir():
    tokens = stated or types.T5_TOKENS
    vocabulary_files.check_eos(place, tokens.eos, setting="--vocabulary_path")
    return tokens, vocabulary_files.read(place)
  if not place.is_file():
    raise ValueError(
      "expected a SentencePiece model, or a folder with a tokenizer, got nothing"
      f" at {place}; set --vocabulary_path"
    )
  import seqio  # and TensorFlow, for tokenizers alone

  vocabulary = seqio.SentencePieceVocabulary(os.fspath(place))
  texts = _sentencepiece_files(vocabulary, extra_ids)
  return _special_tokens(stated, vocabulary), {
    **{name: _json(text) for name, text in texts.items()},
    "spiece.model": place.read_bytes(),
  }


def _special_tokens(stated, vocabulary):
  """Returns the checkpoint's special tokens, else the vocabulary's."""
  read = types.SpecialTokens.of(vocabulary)
  if stated is None:
    return read
  if not set(read.eos) <= set(stated.eos):
    raise ValueError(
      f"expected a vocabulary whose EOS is {' or '.join(map(str, stated.eos))},"
      f" as the checkpoint says, got {' or '.join(map(str, read.eos))};"
      " set --vocabulary_path"
    )
  return stated


def _open(path):
  """Returns parameters, their configuration, and `formats.Found`."""
  found = formats.find(path, setting=_SETTING)
  flat = formats.open_params(path, setting=_SETTING)
  fields = formats.load_config(path, setting=_SETTING)
  if fields:
    config = parameters.network_config(fields, path=path, setting=_SETTING)
    parameters.check(flat, config, setting=_SETTING, path=path)
  else:
    config = parameters.infer_config(flat, setting=_SETTING, path=path)
  return flat, config, found


def _step(checkpoint: epath.Path) -> int | None:
  """Returns the step in a checkpoint's name, or None."""
  match = re.fullmatch(rf"{formats.PREFIX}_(\d+)", checkpoint.name)
  return int(match[1]) if match else None


def _write_hf(path, flat, config, tokens, others, readme) -> None:
  theirs = huggingface.rename(flat, config)
  dtype = str(next(iter(theirs.values())).dtype)  # of the embedding
  text = huggingface.write_config(config, dtype, tokens)
  others |= {safetensors_io.CONFIG_FILE: _json(text)}
  if readme and not (files.absolute(path) / "README.md").exists():
    others["README.md"] = readme.encode()
  contents = {
    safetensors_io.WEIGHTS_FILE: lambda file: safetensors_io.write_file(
      # transformers refuses a file without the program it was written for.
      file,
      theirs,
      {"format": "pt"},
    ),
    **files.contents(others),
  }
  files.write_folder(path, contents, last=safetensors_io.CONFIG_FILE)


def _json(value) -> bytes:
  return (json.dumps(value, indent=2) + "\n").encode()


def _sentencepiece_files(vocabulary, extra_ids: int) -> dict[str, dict]:
  """Returns the files that transformers' T5Tokenizer reads with spiece.model."""
  model = vocabulary.tokenizer
  pad = model.pad_id() if model.pad_id() >= 0 else model.eos_id()
  ids = {"eos_token": model.eos_id(), "pad_token": pad}
  ids["unk_token"] = model.unk_id()
  special = {name: model.IdToPiece(i) for name, i in ids.items() if i >= 0}
  special["additional_special_tokens"] = [
    f"<extra_id_{i}>" for i in range(extra_ids)
  ]
  config = {
    "extra_ids": extra_ids,
    "legacy": True,
    "tokenizer_class": "T5Tokenizer",
  }
  return {
    "special_tokens_map.json": special,
    "tokenizer_config.json": special | config,
  }


def config_fields(config: Any) -> dict:
  """Returns the fields of a configuration as JSON-able values."""
  fields = dataclasses.asdict(config)
  for part in (fields, *fields.values()):
    if isinstance(part, dict) and "dtype" in part:
      part["dtype"] = str(part["dtype"])
  return fields
