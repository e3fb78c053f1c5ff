"""Parameters as safetensors: a folder with `model.safetensors`, `config.json`.

A parameter is named by its path in the tree, joined by "/". `config.json` is
the JSON network configuration with one key more, `"format": "gkd_jax"`.

Reference: the format's description,
https://huggingface.co/docs/safetensors
"""

import json
import math
import os
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util

FORMAT = "gkd_jax"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

# `safetensors.numpy` writes bfloat16 but cannot read it back.
_DTYPES = {
  "BF16": ml_dtypes.bfloat16,
  "BOOL": np.bool_,
  "F16": np.float16,
  "F32": np.float32,
  "F64": np.float64,
  "I8": np.int8,
  "I16": np.int16,
  "I32": np.int32,
  "I64": np.int64,
  "U8": np.uint8,
  "U16": np.uint16,
  "U32": np.uint32,
  "U64": np.uint64,
}


def save_safetensors(
  path: os.PathLike[str] | str,
  params: Mapping[str, Any],
  config: Mapping[str, Any],
) -> None:
  """Writes the folder `path` with the parameters and their configuration.

  A reader never meets half of it: a new folder appears by one rename. In a
  folder that exists, other files stay, and the configuration is taken away
  before the weights change, so that a kill in between leaves a folder that is
  refused and not one that pairs new weights with an old configuration.

  Args:
    path: the folder to write.
    params: nested dict of arrays; dtypes are kept (float32, bfloat16, ...).
    config: JSON-able network configuration.

  Raises:
    ValueError: if a parameter's name holds "/", or `config` is not JSON-able.
  """
  folder = epath.Path(path).expanduser().resolve()
  contents = {
    WEIGHTS_FILE: _serialize(params),
    CONFIG_FILE: encode_config(config),
  }
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = folder.parent / f".{folder.name}.tmp-{uuid.uuid4().hex}"
  temporary.mkdir()
  try:
    for name, content in contents.items():
      (temporary / name).write_bytes(content)
    if folder.exists():
      (folder / CONFIG_FILE).unlink(missing_ok=True)
      for name in contents:
        (temporary / name).replace(folder / name)
      temporary.rmdir()
    else:
      temporary.rename(folder)
  except BaseException:
    temporary.rmtree(missing_ok=True)
    raise


def load_safetensors(
  file: os.PathLike[str] | str, *, setting: str
) -> dict[str, Any]:
  """Reads one safetensors file into a nested dict of numpy arrays.

  Args:
    file: path of the file; names are split at "/".
    setting: what the user set the path with, for the message.

  Raises:
    ValueError: if the file is truncated or is not in the format.
  """
  try:
    tensors = safetensors.deserialize(epath.Path(file).read_bytes())
    flat = {name: _array(tensor) for name, tensor in tensors}
  except (safetensors.SafetensorError, OSError, KeyError) as error:
    raise ValueError(
      f"expected a whole safetensors file, got {error} in {os.fspath(file)};"
      f" copy it again, or set {setting}"
    ) from error
  return traverse_util.unflatten_dict(flat, sep="/")


def cast(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """Converts the floating-point arrays of a tree, others stay as they are.

  Args:
    params: nested dict of arrays.
    dtype: name of a floating-point type, "float32", "bfloat16" or "float16".

  Raises:
    ValueError: if a finite number is beyond the largest of `dtype`.
  """

  def convert(path, x):
    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    with np.errstate(over="ignore"):
      y = x.astype(jnp.dtype(dtype))
    if y.dtype.itemsize < x.dtype.itemsize and not np.array_equal(
      np.isfinite(x), np.isfinite(y)
    ):
      raise ValueError(
        f"expected numbers that {dtype} can hold, got {np.abs(x).max():.3g} in"
        f" {jax.tree_util.keystr(path, simple=True, separator='/')}; set --dtype"
        " to bfloat16 or float32"
      )
    return y

  return jax.tree_util.tree_map_with_path(convert, dict(params))


def encode_config(config: Mapping[str, Any]) -> bytes:
  """Returns the text of `config.json`, the format's mark included."""
  if "format" in config:
    raise ValueError(
      "expected a network configuration without the reserved key 'format',"
      f" got {config['format']!r}; rename the field"
    )
  try:
    text = json.dumps({"format": FORMAT, **config}, indent=2)
  except TypeError as error:
    raise ValueError(
      f"expected a JSON-able network configuration, got {error};"
      " pass numbers, strings, lists and dicts"
    ) from error
  return (text + "\n").encode()


def decode_config(
  file: os.PathLike[str] | str, *, setting: str
) -> dict[str, Any] | None:
  """Reads a `config.json` of ours, or returns None for another program's.

  Args:
    file: path of the file.
    setting: what the user set the path with, for the message.

  Raises:
    ValueError: if the file is not JSON.
  """
  try:
    config = json.loads(epath.Path(file).read_text())
  except ValueError as error:
    raise ValueError(
      f"expected JSON, got {error} in {os.fspath(file)}; copy it again, or set"
      f" {setting}"
    ) from error
  if not isinstance(config, dict) or config.pop("format", None) != FORMAT:
    return None
  return config


def _serialize(params: Mapping[str, Any]) -> bytes:
  flat = traverse_util.flatten_dict(dict(params))
  for names in flat:
    if any("/" in name for name in names):
      raise ValueError(
        f"expected parameter names without '/', got {names}; rename it"
      )
  return safetensors.numpy.save(
    # The format stores the buffer as it lies: it has to be row-major.
    {
      "/".join(k): np.ascontiguousarray(v).reshape(np.shape(v))
      for k, v in flat.items()
    },
    metadata={"format": FORMAT},
  )


def _array(tensor: Mapping[str, Any]) -> np.ndarray:
  shape = tensor["shape"]
  array = np.frombuffer(
    tensor["data"], _DTYPES[tensor["dtype"]], count=math.prod(shape)
  )
  return array.reshape(shape)
