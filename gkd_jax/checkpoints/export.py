"""Import and export: any checkpoint that is read, in the format that is asked.

gkd  a folder with `model.safetensors` and `config.json`
t5x  `checkpoint_<step>` in T5X's Orbax layout
hf   a folder for `transformers`, with the student's card
"""

import json
import os
import re
from collections.abc import Callable

from etils import epath

from gkd_jax import files, network
from gkd_jax.checkpoints import (
  formats,
  huggingface,
  parameters,
  safetensors_io,
  stored_arrays,
  t5x,
)

FORMATS = ("gkd", "t5x", "hf")
_SETTING = "--checkpoint_path"
Path = os.PathLike[str] | str


def import_checkpoint(
  checkpoint_path: Path, output_path: Path, *, dtype: str | None = None
) -> network.T5Config:
  """Reads a checkpoint of any known format and writes our safetensors folder.

  One array is in memory at a time.

  Args:
    checkpoint_path: see `formats.open_params`.
    output_path: the folder to write.
    dtype: what floating-point arrays are stored in; None keeps theirs.

  Returns:
    The configuration that was read, or, for T5X's formats, which carry none,
    inferred from the parameters.

  Raises:
    ValueError: if the checkpoint is not read, or not a T5's.
  """
  flat, config, _ = _open(checkpoint_path)
  safetensors_io.save_safetensors(
    output_path,
    stored_arrays.unflatten(flat),
    config_fields(config),
    dtype=dtype,
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
  """Writes a checkpoint in another program's format, or in ours.

  Args:
    checkpoint_path: see `formats.open_params`.
    output_path: the folder to write.
    format: of `FORMATS`.
    dtype: what floating-point arrays are stored in; None keeps theirs.
    vocabulary_path: for "hf", the SentencePiece model to write the tokenizer's
      files from; None writes none.
    extra_ids: for "hf", sentinels that the vocabulary has after its pieces.
    card: for "hf", returns the text of README.md; called with the keywords
      `name` (of the model), `num_parameters`, `model_dir` (the run's folder, or
      None) and `step` (or None). None writes no README.md.

  Raises:
    ValueError: if the checkpoint is not read, or, but for "gkd", not a T5's.
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
      formats.load_config(checkpoint_path, setting=_SETTING) or {},
      dtype=dtype,
    )
    return
  flat, config, found = _open(checkpoint_path)
  flat = {name: x.cast(dtype, name) for name, x in flat.items()}
  step = _step(found.path)
  if format == "t5x":
    t5x.save_orbax(output_path, flat, config, step=step or 0)
    return
  run = found.path.parent if step is not None else None
  readme = card and card(
    name=epath.Path(output_path).name,
    num_parameters=parameters.count(config),
    model_dir=run,
    step=step,
  )
  _write_hf(output_path, flat, config, readme, vocabulary_path, extra_ids)


def _open(path):
  """Parameters that fit their configuration, it, and what was found."""
  found = formats.find(path, setting=_SETTING)
  flat = formats.open_params(path, setting=_SETTING)
  fields = formats.load_config(path, setting=_SETTING)
  if fields:
    config = formats.network_config(fields, path=path, setting=_SETTING)
    parameters.check(flat, config, setting=_SETTING, path=path)
  else:
    config = parameters.infer_config(flat, setting=_SETTING, path=path)
  return flat, config, found


def _step(checkpoint: epath.Path) -> int | None:
  """The step in a checkpoint's name, or None for a folder without one."""
  match = re.fullmatch(rf"{formats.PREFIX}_(\d+)", checkpoint.name)
  return int(match[1]) if match else None


def _write_hf(path, flat, config, readme, vocabulary_path, extra_ids) -> None:
  theirs = huggingface.rename(flat, config)
  dtype = str(theirs[huggingface.EMBEDDING].dtype)
  texts = {
    "generation_config.json": {
      "decoder_start_token_id": 0,
      "eos_token_id": 1,
      "pad_token_id": 0,
    },
    safetensors_io.CONFIG_FILE: huggingface.write_config(config, dtype),
  }
  if vocabulary_path is not None:
    texts |= _tokenizer(extra_ids)
  contents = {
    safetensors_io.WEIGHTS_FILE: lambda file: safetensors_io.write_file(
      # transformers refuses a file that does not say what it was written for.
      file,
      theirs,
      {"format": "pt"},
    ),
    **{
      name: lambda file, text=text: file.write_text(
        json.dumps(text, indent=2) + "\n"
      )
      for name, text in texts.items()
    },
  }
  if vocabulary_path is not None:
    model = files.absolute(vocabulary_path)
    if not model.is_file():
      raise ValueError(
        f"expected a SentencePiece model, got nothing at {model}; set"
        " --vocabulary_path"
      )
    contents["spiece.model"] = lambda file: file.write_bytes(model.read_bytes())
  if readme and not (files.absolute(path) / "README.md").exists():
    contents["README.md"] = lambda file: file.write_text(readme)
  files.write_folder(path, contents, last=safetensors_io.CONFIG_FILE)


def _tokenizer(extra_ids: int) -> dict[str, dict]:
  """The files beside `spiece.model` that transformers' T5Tokenizer reads."""
  special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
  sentinels = [f"<extra_id_{i}>" for i in range(extra_ids)]
  return {
    "special_tokens_map.json": {
      **special,
      "additional_special_tokens": sentinels,
    },
    "tokenizer_config.json": {
      **special,
      "additional_special_tokens": sentinels,
      "extra_ids": extra_ids,
      "legacy": True,
      "tokenizer_class": "T5Tokenizer",
    },
  }


def config_fields(config: network.T5Config) -> dict:
  """JSON-able fields of a configuration."""
  return {
    **vars(config),
    "dtype": str(config.dtype),
    "mlp_activations": list(config.mlp_activations),
  }
