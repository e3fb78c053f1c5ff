"""Hugging Face's folders, both ways.

One table of names serves both directions: ours on the left, theirs on the right,
and whether the matrix is transposed (PyTorch's linear layers store `[out, in]`).
A folder is `config.json` and `model.safetensors`, or several safetensors files
with `model.safetensors.index.json`.

A module of `_MODULES` knows the configurations and names of its families:

  CONFIG                     class of our configuration
  KINDS                      values of `model_type`
  name_table                 our parameter path to (their name, transposed)
  read_config, write_config  the content of `config.json`
  EMBEDDING, HEAD            names of the embedding, and of a head of its own
  COPIES                     of copies of the embedding that some files have
                             besides it, or instead of it
  UNUSED                     pattern of arrays that nothing reads
  START                      field of the token that a decoder reads first
  special_tokens             fields of special tokens that are left out
"""

import functools
import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath

from gkd_jax import model_folders, types
from gkd_jax.checkpoints import (
  errors,
  hf_rotary,
  hf_t5,
  hf_t5gemma,
  parameters,
  safetensors_io,
  stored_arrays,
)

GENERATION_FILE = model_folders.GENERATION_FILE
INDEX_FILE = "model.safetensors.index.json"
_MODULES = (hf_t5, hf_t5gemma, hf_rotary)
_BY_KIND = {kind: module for module in _MODULES for kind in module.KINDS}
# `model_type` of a model of texts and images, to that of its text model; how names
# of the text model begin there, to how they begin in a folder of it alone.
_TEXT_PARTS = {"gemma3": "gemma3_text"}
_TEXT_PREFIXES = {
  "language_model.model.": "model.",
  "language_model.lm_head.": "lm_head.",
  "model.language_model.": "model.",
}
_IMAGES = r"(model\.)?(vision_tower|multi_modal_projector)\..*"
_BY_CONFIG = {module.CONFIG: module for module in _MODULES}


def name_table(config: Any) -> dict[str, tuple[str, bool]]:
  """Returns our parameter path to (their name, whether it is transposed).

  The embedding comes first.

  Args:
    config: of a network.

  Raises:
    ValueError: as `write_config`.
  """
  return _module(config).name_table(config)


def read_config(folder: epath.Path, *, setting: str) -> Any:
  """Reads `config.json`.

  Raises:
    ValueError: if it is not a model that one of our networks computes.
  """
  return _read_config(folder, setting)[1]


def _read_config(folder, setting):
  """Returns the content of `config.json`, and our configuration."""
  text, module = _read_text(folder, setting)
  file = folder / safetensors_io.CONFIG_FILE
  return text, module.read_config(text, setting=setting, path=file)


def _read_text(folder, setting):
  """Returns the content of `config.json`, and the module of its family.

  Of a model of texts and images that is the part of the text model.
  """
  file = folder / safetensors_io.CONFIG_FILE
  text = safetensors_io.read_json(file, setting=setting)
  kind = text.get("model_type")
  if kind in _TEXT_PARTS and "text_config" in text:
    whole, kind = kind, _TEXT_PARTS[kind]
    text = {**text["text_config"], "model_type": kind, "part_of": whole}
  if kind not in _BY_KIND:
    raise ValueError(
      f"expected model_type {' or '.join(map(repr, _BY_KIND))}, got {kind!r} in"
      f" {os.fspath(file)}; set {setting} to a model of these families"
    )
  return text, _BY_KIND[kind]


def read_special_tokens(
  folder: epath.Path, *, setting: str
) -> types.SpecialTokens:
  """Returns what a folder says of EOS, PAD and the decoder's start.

  Args:
    folder: with `config.json`.
    setting: what the user set the path with, for the messages.
  """
  text, module = _read_text(folder, setting)
  said = model_folders.stated_tokens(
    folder,
    module.special_tokens(text),
    functools.partial(safetensors_io.read_json, setting=setting),
  )
  eos, pad = said["eos_token_id"], said.get("pad_token_id")
  # A model without a start was trained on texts that follow an EOS.
  starts = said.get(module.START), pad, *eos, 0
  start = next(i for i in starts if i is not None)
  return types.SpecialTokens(tuple(eos), pad, start)


def generation_fields(
  tokens: types.SpecialTokens, config: Any = None
) -> dict[str, Any]:
  """Returns the fields of `generation_config.json`.

  Where a vocabulary has no PAD, what follows an output is EOS.

  Args:
    tokens: of the model.
    config: of its network; None: of a T5.
  """
  module = hf_t5 if config is None else _module(config)
  eos = list(tokens.eos)
  pad = tokens.pad
  if pad is None and eos:
    pad = eos[0]
  return {
    module.START: tokens.start,
    "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    "pad_token_id": pad,
  }


def write_config(
  config: Any, dtype: str, tokens: types.SpecialTokens = types.T5_TOKENS
) -> dict[str, Any]:
  """Returns the content of `config.json`.

  Args:
    config: our configuration.
    dtype: of the parameters.
    tokens: of the model.

  Raises:
    ValueError: if no family of Hugging Face's computes the same.
  """
  fields = _module(config).write_config(config, dtype)
  return fields | generation_fields(tokens, config)


def _module(config):
  if type(config) not in _BY_CONFIG:
    names = " or ".join(f"network.{c.__name__}" for c in _BY_CONFIG)
    raise ValueError(
      f"expected a {names}, which Hugging Face has, got"
      f" {type(config).__name__}; set --format=gkd"
    )
  return _BY_CONFIG[type(config)]


def open_folder(
  folder: epath.Path, *, setting: str
) -> dict[str, stored_arrays.StoredArray]:
  """Lists a folder's parameters under our names, without reading them.

  Args:
    folder: with `config.json` and safetensors.
    setting: what the user set the path with, for the messages.

  Raises:
    ValueError: if the folder has no safetensors or lacks a file, or as
      `to_our_names`.
  """
  text, config = _read_config(folder, setting)
  theirs = _open_files(folder, setting)
  if "part_of" in text:
    theirs = {
      _of_text(name): array
      for name, array in theirs.items()
      if not re.fullmatch(_IMAGES, name)
    }
  return to_our_names(theirs, text, config, setting=setting, path=folder)


def to_our_names(
  theirs: dict[str, stored_arrays.StoredArray],
  text: Mapping[str, Any],
  config: Any,
  *,
  setting: str,
  path: os.PathLike[str] | str,
) -> dict[str, stored_arrays.StoredArray]:
  """Returns a model's parameters under our names, without reading them.

  Args:
    theirs: name to array.
    text: the content of `config.json`.
    config: our configuration of it.
    setting: what the user set the path with, for the messages.
    path: of the model, for the messages.

  Raises:
    ValueError: lists all parameters that are unmapped, missing, duplicated or of
      a wrong shape.
  """
  theirs = dict(theirs)
  table, module = name_table(config), _module(config)
  embedding, head = module.EMBEDDING, module.HEAD
  copies = [n for n in (embedding, *module.COPIES) if n in theirs]
  if config.logits_via_embedding and head in theirs:
    copies.append(head)
  if copies and embedding not in theirs:
    theirs[embedding] = theirs[copies[0]]
  ties_undivided = (
    text.get("tie_word_embeddings") and not config.logits_via_embedding
  )
  if ties_undivided and embedding in theirs:
    # Tied logits without the division: our network has a separate head.
    theirs.setdefault(head, theirs[embedding])
  wanted = {name: ours for ours, (name, _) in table.items()}
  is_known = lambda name: (
    name in wanted or name in copies or re.fullmatch(module.UNUSED, name)
  )
  found = {
    ours: theirs[name].transpose() if transposed else theirs[name]
    for ours, (name, transposed) in table.items()
    if name in theirs
  }
  shapes = parameters.shapes(config)
  errors.raise_if_any(
    {
      "missing": [name for name in wanted if name not in theirs],
      "unmapped": [name for name in theirs if not is_known(name)],
      "quantized": [
        f"{table[ours][0]} of {x.dtype}"
        for ours, x in found.items()
        if not jnp.issubdtype(x.dtype, jnp.floating)
      ],
      "duplicated with other values": _different(theirs, embedding, copies),
      "wrong shape": [
        f"{table[ours][0]} (expected {_theirs(shapes[ours], table[ours])}, got"
        f" {_theirs(x.shape, table[ours])})"
        for ours, x in found.items()
        if x.shape != shapes[ours]
      ],
    },
    expected=f"the {len(table)} parameters of its configuration",
    setting=setting,
    path=path,
  )
  return found


def rename(
  flat: Mapping[str, stored_arrays.StoredArray], config: Any
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


def _of_text(name):
  """Returns a name as a folder of the text model alone has it."""
  for prefix, alone in _TEXT_PREFIXES.items():
    if name.startswith(prefix):
      return alone + name.removeprefix(prefix)
  return name


def _theirs(shape, entry):
  return shape[::-1] if entry[1] else shape


def _open_files(folder, setting) -> dict[str, stored_arrays.StoredArray]:
  """Opens the arrays of one file, or else of all files in the index.

  A whole file beside an index is newer: the index is left of an earlier model.
  """
  whole = folder / safetensors_io.WEIGHTS_FILE
  index = folder / INDEX_FILE
  if whole.exists() or not index.exists():
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


def _different(theirs, embedding, copies, rows: int = 4096) -> list[str]:
  """Returns the copies of the embedding that differ from it in any bit."""
  wrong = []
  original = theirs.get(embedding)
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
