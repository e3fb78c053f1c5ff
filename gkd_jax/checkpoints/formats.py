"""Reads parameters and configurations in any known format.

  orbax        a run's MODEL_DIR (its newest checkpoint), or one
               `checkpoint_<step>`; ours and T5X's
  t5x          the same in T5X's legacy layout: a msgpack file `checkpoint`
               and zarr folders
  gkd          our export: `model.safetensors` and `config.json`
  safetensors  one such file
  huggingface  the folder of a model: `config.json` and safetensors, in one file
               or in several with an index
  gguf         one such file of a Llama

Pickle files are never read.
"""

import dataclasses
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from gkd_jax import files, partitioning, types
from gkd_jax.checkpoints import (
  errors,
  gguf_files,
  huggingface,
  orbax_arrays,
  parameters,
  safetensors_io,
  stored_arrays,
  t5x,
  vocabulary_files,
)

PREFIX = "checkpoint"
SETTINGS = "TEACHER_CHECKPOINT_PATH or INITIAL_CHECKPOINT_PATH"
_UNFINISHED = ".orbax-checkpoint-tmp"
_READABLE = (
  "a MODEL_DIR or a checkpoint_<step> folder of this program or of T5X, a"
  f" folder with {safetensors_io.CONFIG_FILE} and safetensors of this program"
  " or of Hugging Face, or a .safetensors or .gguf file"
)
PyTree = Any
Path = os.PathLike[str] | str


@dataclasses.dataclass(frozen=True)
class Found:
  """The name of a format, and the path of the checkpoint."""

  format: str
  path: epath.Path


def find_steps(model_dir: epath.Path) -> dict[int, epath.Path]:
  """Returns step to folder of a run's complete checkpoints."""
  if not model_dir.is_dir():
    return {}
  step_format = ocp.path.step.standard_name_format(step_prefix=PREFIX)
  return {found.step: found.path for found in step_format.find_all(model_dir)}


def find(path: Path, *, setting: str = SETTINGS) -> Found:
  """Finds the format of the checkpoint at `path`.

  Raises:
    ValueError: if it has none of the formats, or is incomplete.
  """
  place = files.absolute(path)
  if place.is_file() and place.name.endswith(".safetensors"):
    return Found("safetensors", place)
  if place.is_file() and place.name.endswith(gguf_files.SUFFIX):
    return Found("gguf", place)
  if place.is_file() and place.name == t5x.LEGACY_FILE:
    return Found("t5x", place.parent)
  if not place.is_dir():
    got = f"the file {place}" if place.exists() else f"nothing at {place}"
    raise ValueError(f"expected {_READABLE}, got {got}; set {setting}")
  steps = find_steps(place)
  folder = steps[max(steps)] if steps else place
  if (folder / "state" / "_METADATA").exists():
    if _UNFINISHED in folder.name:
      raise ValueError(
        f"expected a whole checkpoint, got {folder}, which was still being"
        f" written; set {setting}"
      )
    return Found("orbax", folder)
  if (folder / t5x.LEGACY_FILE).is_file():
    return Found("t5x", folder)
  config = folder / safetensors_io.CONFIG_FILE
  if config.exists():
    if safetensors_io.decode_config(config, setting=setting) is None:
      return Found("huggingface", folder)
    if (folder / safetensors_io.WEIGHTS_FILE).exists():
      return Found("gkd", folder)
  raise ValueError(
    f"expected {_READABLE}, got {errors.listing(folder)} in {folder};"
    f" set {setting}"
  )


def open_params(
  path: Path, *, setting: str = SETTINGS
) -> dict[str, stored_arrays.StoredArray]:
  """Lists the parameters at `path` under our names, without reading them.

  Only the parameters of a checkpoint are listed, not its optimizer state.
  Scanned layers, T5X's and ours, are split.

  Args:
    path: a folder or a file, local or `gs://`.
    setting: what the user set the path with, for the messages.

  Returns:
    Parameter path, joined by "/", to array.

  Raises:
    ValueError: if the checkpoint has none of the formats, or is damaged; also
      raised when an array is read.
  """
  found = find(path, setting=setting)
  return t5x.split_scanned(
    _open(found, setting), path=found.path, setting=setting
  )


def _open(found: Found, setting: str) -> dict[str, stored_arrays.StoredArray]:
  """Opens the parameters of a format, with scanned layers as stored."""
  if found.format == "safetensors":
    return safetensors_io.open_file(found.path, setting=setting)
  if found.format == "gkd":
    return safetensors_io.open_file(
      found.path / safetensors_io.WEIGHTS_FILE, setting=setting
    )
  if found.format == "huggingface":
    return huggingface.open_folder(found.path, setting=setting)
  if found.format == "gguf":
    return gguf_files.open_file(found.path, setting=setting)
  remedy = f"copy it again, or set {setting}"
  if found.format == "t5x":
    return t5x.open_legacy(found.path, remedy)
  saved = orbax_arrays.saved_tree(found.path, remedy)
  key = "params" if "params" in saved else "target"
  if key not in saved:
    raise ValueError(
      f"expected 'params' (or T5X's 'target') in {found.path}, got"
      f" {sorted(saved)}; set {setting}"
    )
  return orbax_arrays.orbax_arrays(found.path, saved[key], remedy)


def load_params(
  path: Path,
  *,
  setting: str = SETTINGS,
  dtype: str | None = "float32",
  like: PyTree | None = None,
) -> PyTree:
  """Reads parameters in any known format.

  Args:
    path: a folder or a file, local or `gs://`.
    setting: what the user set the path with, for the messages.
    dtype: dtype of the returned floating-point arrays (the network's parameters
      are float32, whatever a file stores); None keeps the file's. Ignored with
      `like`.
    like: nested dict of `jax.ShapeDtypeStruct`s, whose names and shapes are
      compared before anything is read. Arrays are converted to its dtypes (see
      `stored_arrays.converted`), and layers are stacked for a scanned network.
      With shardings each process reads onto its devices only what these hold,
      one array at a time.

  Returns:
    Nested dict of numpy arrays, or of `jax.Array`s with shardings.

  Raises:
    ValueError: if the checkpoint has none of the formats, is damaged, or has
      other names or shapes than `like`.
  """
  flat = open_params(path, setting=setting)
  if like is None:
    return stored_arrays.read_tree(flat, dtype)
  wanted = traverse_util.flatten_dict(like, sep="/")
  flat = stored_arrays.joined_stacks(
    stored_arrays.converted(flat, wanted), wanted
  )
  errors.check_matches(flat, like, setting=setting, path=path)
  if all(leaf.sharding is None for leaf in wanted.values()):
    return stored_arrays.read_tree(flat)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
  return stored_arrays.place_tree(flat, shardings)


def load_placed(
  path: Path | None, shapes: PyTree, shardings: PyTree, *, setting: str, of: str
) -> PyTree:
  """Reads parameters onto devices, for a model that is not trained.

  Args:
    path: see `load_params`.
    shapes: nested dict of anything with a `shape` and a `dtype`.
    shardings: nested dict of shardings.
    setting: what the user set the path with, for the messages.
    of: the role of the model, such as "teacher", for the message.

  Returns:
    Nested dict of `jax.Array`s with these shapes, dtypes and shardings.

  Raises:
    ValueError: if there is no path, or as `load_params`.
  """
  if not path:
    raise ValueError(
      f"expected a checkpoint of the {of}, got none; set {setting}"
    )
  like = partitioning.with_shardings(shapes, shardings)
  return load_params(path, setting=setting, like=like)


def load_config(
  path: Path, *, setting: str = SETTINGS
) -> dict[str, Any] | None:
  """Reads the network configuration stored with the parameters.

  Arguments and errors are those of `load_params`.

  Returns:
    The saved fields of a network's configuration, or None if there are none, as
    in T5X's formats.
  """
  found = find(path, setting=setting)
  theirs = {"huggingface": huggingface, "gguf": gguf_files}.get(found.format)
  if theirs is not None:
    return dataclasses.asdict(theirs.read_config(found.path, setting=setting))
  config = _stored_config(found, setting)
  if config is not None:
    config.pop(safetensors_io.SPECIAL_TOKENS, None)
  return config


def load_special_tokens(
  path: Path, *, setting: str = SETTINGS
) -> types.SpecialTokens | None:
  """Reads the special tokens that are stored with the parameters.

  Args:
    path: as for `load_params`.
    setting: what the user set the path with, for the message.

  Returns:
    None if there are none, as in T5X's formats.

  Raises:
    ValueError: as `load_params`.
  """
  found = find(path, setting=setting)
  theirs = {"huggingface": huggingface, "gguf": gguf_files}.get(found.format)
  if theirs is not None:
    return theirs.read_special_tokens(found.path, setting=setting)
  config = _stored_config(found, setting) or {}
  stored = config.get(safetensors_io.SPECIAL_TOKENS)
  if stored is None:
    return None
  return types.SpecialTokens(
    tuple(stored["eos"]), stored["pad"], stored["start"]
  )


def read_tokenizer(path: Path, *, setting: str = SETTINGS) -> dict[str, bytes]:
  """Reads the files of the tokenizer beside the parameters, name to content.

  Args:
    path: as for `load_params`.
    setting: what the user set the path with, for the message.

  Returns:
    {} if there are none. A run has them in its folder.

  Raises:
    ValueError: as `load_params`.
  """
  found = find(path, setting=setting)
  if found.format == "gguf":
    contents = gguf_files.read(found.path, setting=setting)
    return vocabulary_files.of_gguf(contents.metadata)
  if found.format in ("gkd", "huggingface"):
    return vocabulary_files.read(found.path)
  if found.format == "orbax":
    return vocabulary_files.read(found.path.parent)
  return {}


def _stored_config(found: Found, setting: str) -> dict[str, Any] | None:
  """Reads what this program stored in `config.json`, or returns None."""
  file = {
    "orbax": found.path / "config" / safetensors_io.CONFIG_FILE,
    "gkd": found.path / safetensors_io.CONFIG_FILE,
    "safetensors": found.path.parent / safetensors_io.CONFIG_FILE,
  }.get(found.format)
  if file is None or not file.exists():
    return None
  return safetensors_io.decode_config(file, setting=setting)


def load_model(
  path: Path, *, setting: str = SETTINGS, dtype: str | None = "float32"
) -> tuple[Any, PyTree]:
  """Reads a network's configuration and its parameters.

  Arguments are those of `load_params`.

  Returns:
    The configuration, and a nested dict of numpy arrays.

  Raises:
    ValueError: as `load_params`; if there is no configuration (as in T5X's
      formats); or if the parameters do not fit it.
  """
  config = load_config(path, setting=setting)
  if not config:
    raise ValueError(
      f"expected a network configuration beside the parameters, got none in"
      f" {os.fspath(path)}; set {setting} to a folder with one, as `gkd import`"
      " writes"
    )
  flat = open_params(path, setting=setting)
  built = parameters.network_config(config, path=path, setting=setting)
  parameters.check(flat, built, setting=setting, path=path)
  return built, stored_arrays.read_tree(flat, dtype)
