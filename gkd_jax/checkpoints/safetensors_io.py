"""Reads and writes safetensors, as `model.safetensors` with a `config.json`.

A parameter's name is its path in the tree, joined by "/". `config.json` is the
network configuration with an additional key `"format": "gkd_jax"`.

A file consists of the little-endian length of the header in eight bytes; the
header, JSON from name to dtype, shape and range of bytes; and the arrays without
gaps. It is read and written array by array here, because the `safetensors`
library reads only local files and no bfloat16 into numpy, maps the whole file
into memory, and writes only tensors that are all in memory.

Reference: the format's description,
https://huggingface.co/docs/safetensors
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from gkd_jax import files, model_folders, types
from gkd_jax.checkpoints import stored_arrays

FORMAT = "gkd_jax"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = model_folders.CONFIG_FILE
_DTYPES = {
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "BOOL": np.dtype(np.bool_),
  "F16": np.dtype("<f2"),
  "F32": np.dtype("<f4"),
  "F64": np.dtype("<f8"),
  "I8": np.dtype("<i1"),
  "I16": np.dtype("<i2"),
  "I32": np.dtype("<i4"),
  "I64": np.dtype("<i8"),
  "U8": np.dtype("<u1"),
  "U16": np.dtype("<u2"),
  "U32": np.dtype("<u4"),
  "U64": np.dtype("<u8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The library's limit, far above any real header: the first bytes of a file of
# another format are not taken for a length.
_MAX_HEADER_BYTES = 100_000_000
# Bytes written at a time, to avoid a copy of a whole array.
_BLOCK_BYTES = 2**26


def save_safetensors(
  path: os.PathLike[str] | str,
  params: Mapping[str, Any],
  config: Mapping[str, Any],
  *,
  dtype: str | None = None,
  others: Mapping[str, bytes] | None = None,
) -> None:
  """Writes parameters and their configuration as a folder.

  See `files.write_folder` for what readers see meanwhile.

  Args:
    path: the folder to write.
    params: nested dict of arrays or `StoredArray`s.
    config: JSON-able network configuration.
    dtype: dtype of the stored floating-point arrays; None keeps theirs.
    others: name to content of files to write as well.

  Raises:
    ValueError: if a parameter's name holds "/", or `config` is not JSON-able.
  """
  flat = {
    name: x.cast(dtype, name)
    for name, x in stored_arrays.flatten(params).items()
  }
  text = encode_config(config)
  files.write_folder(
    path,
    {
      WEIGHTS_FILE: lambda file: write_file(file, flat, {"format": FORMAT}),
      CONFIG_FILE: lambda file: file.write_bytes(text),
      **files.contents(others or {}),
    },
    last=CONFIG_FILE,
  )


def write_file(
  file: epath.Path,
  arrays: Mapping[str, stored_arrays.StoredArray],
  metadata: Mapping[str, str],
) -> None:
  """Writes a safetensors file, with one array in memory at a time.

  Args:
    file: path of the file.
    arrays: name to array, written in this order but wide dtypes first, so that
      each starts at a multiple of its item size.
    metadata: text to text, stored in the header.

  Raises:
    ValueError: if the format has no name for an array's dtype.
  """
  ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
  header: dict[str, Any] = {"__metadata__": dict(metadata)}
  end = 0
  for name, array in ordered:
    if array.dtype not in _NAMES:
      raise ValueError(
        f"expected a dtype of {', '.join(map(str, _NAMES))}, got {array.dtype}"
        f" in {name}; set --dtype"
      )
    header[name] = {
      "dtype": _NAMES[array.dtype],
      "shape": list(array.shape),
      "data_offsets": [end, end + array.nbytes],
    }
    end += array.nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with file.open("wb") as f:
    f.write(len(text).to_bytes(8, "little"))
    f.write(text)
    for _, array in ordered:
      # Row-major, as the format requires.
      flat = np.ascontiguousarray(array.read()).reshape(-1).view(np.uint8)
      for start in range(0, flat.size, _BLOCK_BYTES):
        f.write(flat[start : start + _BLOCK_BYTES].tobytes())


def open_file(
  file: os.PathLike[str] | str, *, setting: str
) -> dict[str, stored_arrays.StoredArray]:
  """Lists the arrays of one safetensors file, without reading them.

  Args:
    file: path of the file.
    setting: what the user set the path with, for the messages.

  Raises:
    ValueError: if the file is truncated or has another format; also raised when
      an array is read, if the file has changed.
  """
  file = epath.Path(file)
  try:
    header, start = _read_header(file)
    arrays = {
      name: _stored(file, name, entry, start, setting)
      for name, entry in header.items()
    }
  except NotImplementedError as error:
    raise ValueError(
      f"expected weights of {', '.join(_DTYPES)}, got {error} in"
      f" {os.fspath(file)}; set {setting} to weights that are not quantized"
    ) from error
  except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
    raise _damaged(file, f"{type(error).__name__}: {error}", setting) from error
  return arrays


SPECIAL_TOKENS = model_folders.SPECIAL_TOKENS


def with_special_tokens(
  config: Mapping[str, Any], tokens: types.SpecialTokens | None
) -> dict[str, Any]:
  """Returns a configuration that says what a model's special tokens are."""
  if tokens is None:
    return dict(config)
  return {
    **config,
    SPECIAL_TOKENS: {
      "eos": [*tokens.eos],
      "pad": tokens.pad,
      "start": tokens.start,
    },
  }


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
  config = read_json(file, setting=setting)
  if config.pop("format", None) != FORMAT:
    return None
  return config


def read_json(file: os.PathLike[str] | str, *, setting: str) -> dict[str, Any]:
  """Reads a JSON object.

  Args:
    file: path of the file.
    setting: what the user set the path with, for the message.

  Raises:
    ValueError: if the file is not JSON, or not an object.
  """
  try:
    content = json.loads(epath.Path(file).read_text())
    if not isinstance(content, dict):
      raise ValueError(f"a {type(content).__name__} at its top")
  except ValueError as error:
    raise ValueError(
      f"expected a JSON object, got {error} in {os.fspath(file)}; copy it again,"
      f" or set {setting}"
    ) from error
  return content


def _read_header(file: epath.Path) -> tuple[dict[str, Any], int]:
  """Returns the header's entries, and the offset of the arrays."""
  size = file.stat().length
  with file.open("rb") as f:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
      raise ValueError(f"{size} bytes, too few for its header of {length}")
    header = json.loads(f.read(length), object_pairs_hook=_unique)
  header.pop("__metadata__", None)
  end = 0
  for name, entry in sorted(header.items(), key=lambda x: x[1]["data_offsets"]):
    begin, until = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:  # such as F8_E4M3
      raise NotImplementedError(f"{name} of {entry['dtype']}")
    need = math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
    if begin != end or until - begin != need:
      raise ValueError(
        f"bytes {begin} to {until} for {name}, which has {need} from {end}"
      )
    end = until
  if size != 8 + length + end:
    raise ValueError(f"{size} bytes instead of {8 + length + end}")
  return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  names = [name for name, _ in pairs]
  repeated = sorted({name for name in names if names.count(name) > 1})
  if repeated:
    raise ValueError(f"{', '.join(repeated[:5])} twice")
  return dict(pairs)


def _stored(file, name, entry, start, setting) -> stored_arrays.StoredArray:
  shape = tuple(int(size) for size in entry["shape"])
  dtype = _DTYPES[entry["dtype"]]
  begin, row = start + entry["data_offsets"][0], math.prod(shape[1:])

  def fetch(index):
    """Reads the rows of `index`; its other axes are cut in memory."""
    first, last = 0, 1
    if shape:
      first, last, step = index[0].indices(shape[0])
      if step != 1:
        first, last = 0, shape[0]
      else:
        index = (slice(None), *index[1:])
    size = max(last - first, 0) * row * dtype.itemsize
    with file.open("rb") as f:
      f.seek(begin + first * row * dtype.itemsize)
      data = f.read(size)
    if len(data) != size:
      raise _damaged(file, f"{len(data)} bytes of {name}", setting)
    array = np.frombuffer(data, dtype)
    if not shape:
      return array.reshape(())
    return array.reshape(-1 if row else last - first, *shape[1:])[index]

  return stored_arrays.StoredArray(shape, dtype, fetch)


def _damaged(file, reason, setting) -> ValueError:
  return ValueError(
    f"expected a whole safetensors file, got {' '.join(reason.split())[:300]}"
    f" in {os.fspath(file)}; copy it again, or set {setting}"
  )
