"""Reads and writes T5X's checkpoints.

T5X's legacy layout is a folder `checkpoint_<step>` with a msgpack file
`checkpoint`, the tree of the optimizer, whose large leaves are tensorstore
specs of zarr folders beside it (`target.decoder.decoder_norm.scale`). Its Orbax
layout is a folder `checkpoint_<step>` with an item `state`: `target`, the
parameters; `state/step`; `state/param_states`, the optimizer.

With scanned layers (T5X's scalable T5) the layers of a stack are one array with
the layers on the second axis, and heads have an axis. In our checkpoints of a
scanned network (`network.layer_loops`) layers are on the first axis.

Reference: T5X, Roberts et al. 2022 (arXiv 2203.17189).
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from gkd_jax import files, network, partitioning
from gkd_jax.checkpoints import errors, orbax_arrays, parameters, stored_arrays
from gkd_jax.network import layer_loops

LEGACY_FILE = "checkpoint"
# `encoder/encoder/mlp/wo/kernel`: the stack's name repeats that of its side.
_SCANNED = re.compile(r"(encoder|decoder)/\1/(.+)")
_SCAN_AXIS = 1
_OURS = re.compile(rf"(encoder|decoder)/{layer_loops.NAME}/(.+)")
# Of T5X's Adafactor.
_MIN_SIZE_TO_FACTOR = 128


def open_legacy(
  folder: epath.Path, remedy: str
) -> dict[str, stored_arrays.StoredArray]:
  """Lists the parameters of a legacy checkpoint, without reading them.

  Args:
    folder: `checkpoint_<step>`.
    remedy: what to do if it is damaged, for the message.

  Returns:
    Path below `target`, joined by "/", to array.

  Raises:
    ValueError: if the checkpoint is damaged; also raised when an array is read.
  """
  with errors.whole(folder, remedy):
    content = flax.serialization.msgpack_restore(
      (folder / LEGACY_FILE).read_bytes()
    )
    # Version 0 is the bare tree, later ones have it under "optimizer".
    tree = content.get("optimizer", content)
    if "target" not in tree:
      raise ValueError(f"{sorted(tree)} instead of 'target'")
    leaves = traverse_util.flatten_dict(
      tree["target"], sep="/", is_leaf=lambda _, x: _is_spec(x)
    )
    return {
      name: _legacy_array(leaf, folder, remedy) for name, leaf in leaves.items()
    }


def split_scanned(
  flat: Mapping[str, stored_arrays.StoredArray],
  *,
  path: os.PathLike[str] | str,
  setting: str,
) -> dict[str, stored_arrays.StoredArray]:
  """Splits scanned stacks into the arrays of each layer.

  Args:
    flat: path to array.
    path: of the checkpoint, for the message.
    setting: what to change, for the message.

  Raises:
    ValueError: when an array is read, if the relative position biases of the
      layers differ, which a T5 shares.
  """
  split, latest = {}, _Latest()
  for name, array in flat.items():
    match, axis = _SCANNED.fullmatch(name), _SCAN_AXIS
    if match is None:
      match, axis = _OURS.fullmatch(name), 0
    if match is None or len(array.shape) not in (2, 3, 4):
      split[name] = array
      continue
    side, rest = match.groups()
    if rest.startswith("relpos_bias/"):
      split[f"{side}/{rest}"] = _shared(array, name, path, setting)
      continue
    for layer in range(array.shape[axis]):
      split[f"{side}/{layer_loops.NAME}_{layer}/{rest}"] = _one_layer(
        array, rest, layer, axis, latest
      )
  return split


class _Latest:
  """Cache of the last array that was read.

  All layers of a stack are in the same chunks: each would decode them again.
  """

  def __init__(self):
    self._source: stored_arrays.StoredArray | None = None
    self._array: np.ndarray | None = None

  def read(self, source: stored_arrays.StoredArray) -> np.ndarray:
    if self._source is not source:
      self._array = None
      self._source, self._array = source, source.read()
    return self._array


def _one_layer(array, rest, layer, axis, latest) -> stored_arrays.StoredArray:
  """Returns the matrix or vector of one layer, with joined heads."""
  shape = array.shape[:axis] + array.shape[axis + 1 :]
  if len(shape) == 3:
    # [D, H, K] of a projection to heads, [H, K, D] of the one from them.
    joins_first = rest.endswith("out/kernel")
    shape = (
      (shape[0] * shape[1], shape[2])
      if joins_first
      else (shape[0], shape[1] * shape[2])
    )

  def fetch(index):
    whole = latest.read(array)
    # A copy: a view would keep the whole stack in memory.
    one = np.array(np.take(whole, layer, axis=axis))
    return one.reshape(shape)[index]

  return stored_arrays.StoredArray(shape, array.dtype, fetch)


def _shared(array, name, path, setting) -> stored_arrays.StoredArray:
  """Returns the bias `[H, buckets]` that the layers of a stack share."""
  shape = array.shape[:_SCAN_AXIS] + array.shape[_SCAN_AXIS + 1 :]

  def fetch(index):
    whole = array.read()
    first = np.take(whole, 0, axis=_SCAN_AXIS)
    if not np.array_equal(
      whole, np.broadcast_to(np.expand_dims(first, _SCAN_AXIS), whole.shape)
    ):
      raise ValueError(
        "expected one relative position bias for all layers of a T5, got"
        f" another for each in {name} (umT5's) in {os.fspath(path)}; set"
        f" {setting} to a T5, mT5 or ByT5"
      )
    return first[index]

  return stored_arrays.StoredArray(shape, array.dtype, fetch)


def _is_spec(leaf: Any) -> bool:
  """Returns whether a leaf of the msgpack tree is a tensorstore spec."""
  return isinstance(leaf, dict) and {"driver", "metadata"} <= set(leaf)


def _legacy_array(leaf, folder, remedy) -> stored_arrays.StoredArray:
  if not isinstance(leaf, dict):
    return stored_arrays.from_array(np.asarray(leaf))
  if leaf["driver"] != "zarr":
    raise ValueError(f"the driver {leaf['driver']!r} instead of zarr")
  # Before tensorstore 0.1.14 the folder's name stood outside of the kvstore.
  name = (leaf["kvstore"].get("path") or leaf["path"]).strip("/")
  if not re.fullmatch(r"[\w.\-]+", name) or name in (".", ".."):
    raise ValueError(f"the path {name!r} instead of a folder beside the file")
  return orbax_arrays.stored(
    {"driver": "zarr", "kvstore": orbax_arrays.kvstore(folder / name)},
    tuple(leaf["metadata"]["shape"]),
    np.dtype(leaf.get("dtype") or leaf["metadata"]["dtype"]),
    folder,
    remedy,
  )


def save_orbax(
  path: os.PathLike[str] | str,
  flat: Mapping[str, stored_arrays.StoredArray],
  config: network.T5Config,
  *,
  step: int,
) -> None:
  """Writes `path/checkpoint_<step>` in T5X's Orbax layout, for T5X to restore.

  The optimizer state is that of T5X's Adafactor (the optimizer of its T5
  configurations) before its first step, so that T5X can continue training.

  Args:
    path: T5X's MODEL_DIR; created if it does not exist.
    flat: path to array; dtypes are not changed.
    config: of the network.
    step: T5X's step, in the checkpoint's name.

  Raises:
    ValueError: if the parameters do not fit `config`, or there is a checkpoint
      of this step.
  """
  folder = files.absolute(path)
  target = folder / f"{LEGACY_FILE}_{step}"
  if target.exists():
    raise ValueError(
      f"expected no checkpoint at {target}, got one; set --output_path"
    )
  mesh = partitioning.make_mesh(devices=jax.local_devices()[:1])
  axes = parameters.logical_axes(config)
  shardings = partitioning.param_shardings(
    stored_arrays.unflatten(flat), axes, mesh
  )
  params = stored_arrays.place_tree(flat, shardings)
  replicated = partitioning.replicated(mesh)
  slots = jax.tree.map(
    lambda x: _fresh_slots(x.shape, x.sharding, replicated), params
  )
  state = {
    "target": params,
    "state": {"step": jnp.int32(step), "param_states": slots},
  }
  with ocp.CheckpointManager(
    folder,
    item_handlers={
      "state": ocp.PyTreeCheckpointHandler(use_ocdbt=True),
    },
    options=ocp.CheckpointManagerOptions(
      step_prefix=LEGACY_FILE,
      save_root_metadata=False,
      enable_async_checkpointing=False,
    ),
  ) as manager:
    manager.save(
      step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state))
    )


def _fresh_slots(
  shape: tuple[int, ...], sharding: Any, replicated: Any
) -> dict[str, Any]:
  """T5X's Adafactor slots of one parameter: factored from 128 x 128 on.

  Unused slots have the shape `[1]`. `v_row` lacks the larger of the two axes,
  `v_col` the smaller one; of equal ones the last counts as the larger.
  """
  unused = jax.device_put(np.zeros(1, np.float32), replicated)
  slots = dict.fromkeys(("m", "v", "v_col", "v_row"), unused)
  if len(shape) == 2 and min(shape) >= _MIN_SIZE_TO_FACTOR:
    for name, size in (("v_row", min(shape)), ("v_col", max(shape))):
      slots[name] = jax.device_put(np.zeros(size, np.float32), replicated)
  else:
    slots["v"] = jax.device_put(np.zeros(shape, np.float32), sharding)
  return slots
