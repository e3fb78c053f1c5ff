"""Arrays of Orbax checkpoints and of zarr folders, by tensorstore.

Orbax stores the leaf `a/b` of an item as the zarr array `a.b`, inside an OCDBT
database in the item's folder, or, in older checkpoints, in a folder of its own.

References: the zarr and OCDBT drivers,
https://google.github.io/tensorstore/driver/index.html
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax import traverse_util

from gkd_jax.checkpoints import errors, stored_arrays


def kvstore(folder: os.PathLike[str] | str) -> dict[str, Any]:
  """Returns tensorstore's spec of a folder, local or `gs://bucket/path`."""
  path = os.fspath(folder)
  if path.startswith("gs://"):
    bucket, _, rest = path.removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": rest.rstrip("/") + "/"}
  return {"driver": "file", "path": path.rstrip("/") + "/"}


def saved_tree(folder: epath.Path, remedy: str) -> dict[str, Any]:
  """Reads the tree of descriptions of the arrays in `folder/state`.

  Raises:
    ValueError: if the checkpoint is damaged.
  """
  # Not by `ocp.Checkpointer`, which warns that an item lacks the metadata of a
  # whole checkpoint.
  with (
    errors.whole(folder, remedy),
    contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler,
  ):
    return handler.metadata(folder / "state").tree


def orbax_arrays(
  folder: epath.Path, tree: Mapping[str, Any], remedy: str
) -> dict[str, stored_arrays.StoredArray]:
  """Lists the arrays below one name of an Orbax checkpoint.

  Args:
    folder: the checkpoint; its item is `state`.
    tree: descriptions, a branch of `saved_tree`.
    remedy: what to do if it is damaged, for the message.

  Returns:
    Path in `tree`, joined by "/", to array.

  Raises:
    ValueError: if the checkpoint is damaged; also raised when an array is read.
  """
  item = folder / "state"
  with errors.whole(folder, remedy):
    zarr3 = json.loads((item / "_METADATA").read_text()).get("use_zarr3", False)
  driver = "zarr3" if zarr3 else "zarr"
  in_database = (item / "manifest.ocdbt").exists()
  arrays = {}
  for path, leaf in traverse_util.flatten_dict(dict(tree), sep="/").items():
    store = kvstore(item / leaf.name)
    if in_database:
      base = kvstore(item)
      store = {"driver": "ocdbt", "base": base, "path": leaf.name + "/"}
    arrays[path] = stored(
      {"driver": driver, "kvstore": store},
      tuple(leaf.shape),
      np.dtype(leaf.dtype),
      folder,
      remedy,
    )
  return arrays


def stored(
  spec: Mapping[str, Any],
  shape: tuple[int, ...],
  dtype: np.dtype,
  folder: epath.Path,
  remedy: str,
) -> stored_arrays.StoredArray:
  """Makes a lazily read array of tensorstore.

  Args:
    spec: tensorstore's.
    shape: the expected shape.
    dtype: the expected dtype.
    folder: of the checkpoint, for the message.
    remedy: what to do if it is damaged, for the message.
  """

  def fetch(index):
    with errors.whole(folder, remedy):
      array = ts.open(dict(spec), open=True, read=True).result()
      found = (tuple(array.shape), array.dtype.numpy_dtype)
      if found != (shape, dtype):
        raise ValueError(
          f"{found[1]} {found[0]} instead of {dtype} {shape} in"
          f" {spec['kvstore']['path']}"
        )
      _check_chunks(array)
      return array[index].read().result() if shape else array.read().result()

  return stored_arrays.StoredArray(shape, dtype, fetch)


def _check_chunks(array: ts.TensorStore) -> None:
  """Raises if a chunk of a zarr array is missing.

  Tensorstore reads a missing chunk as zeros. Without a fill value all chunks are
  written, including zeros, so that a missing one is a lost file.
  """
  if array.fill_value is not None or array.kvstore is None:
    return
  sizes = array.chunk_layout.write_chunk.shape
  expected = math.prod(
    -(-size // chunk) for size, chunk in zip(array.shape, sizes, strict=True)
  )
  keys = [key for key in array.kvstore.list().result() if not _is_metadata(key)]
  if len(keys) != expected:
    raise ValueError(
      f"{len(keys)} of {expected} chunks of {array.kvstore.path}"
    )


def _is_metadata(key: bytes) -> bool:
  return key.rsplit(b"/", 1)[-1].startswith((b".z", b"zarr.json"))
