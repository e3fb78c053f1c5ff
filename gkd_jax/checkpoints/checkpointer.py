"""Checkpoints of a run, by Orbax.

A run writes `MODEL_DIR/checkpoint_<step>` with four items:

  state/    the train state: step, parameters, optimizer (Orbax, OCDBT)
  dataset/  the data iterator, `shard_<i>-of-<n>/` for each shard of the data
  config/   `config.json`, the network configuration
  metrics/  `metrics`, JSON, what the best checkpoint is chosen by

A checkpoint is written under a temporary name and renamed when all of it is on
disk, and an old one is renamed away before it is deleted: what carries the
final name is whole, wherever a kill came.

The data iterator's position as an item of an Orbax checkpoint.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath

from gkd_jax import files, partitioning
from gkd_jax.checkpoints import errors, formats, orbax_arrays, safetensors_io


class SavableIterator(Protocol):
  """A data iterator that writes its position to a folder and reads it back.

  The folder exists, is empty, is that of all processes, and is renamed after
  `save_state` returns: two processes must not write one file, and files must not
  refer to it by an absolute path.
  """

  def save_state(self, path: str) -> None:
    """Writes the position, from which `next` goes on."""

  def restore_state(self, path: str) -> None:
    """Goes to the position that `save_state` wrote."""


class IteratorHandler(ocp.CheckpointHandler):
  """Lets a `SavableIterator` write into Orbax's temporary folder.

  It is a synchronous handler, so `save` returns when the iterator has written:
  the position on disk is that of the step, though the arrays follow later.
  """

  def save(self, directory: epath.Path, args: "IteratorArgs") -> None:
    args.iterator.save_state(os.fspath(directory))

  def restore(self, directory: epath.Path, args: "IteratorArgs") -> None:
    args.iterator.restore_state(os.fspath(directory))


@ocp.args.register_with_handler(
  IteratorHandler, for_save=True, for_restore=True
)
@dataclasses.dataclass
class IteratorArgs(ocp.args.CheckpointArgs):
  """The iterator whose position is saved or restored."""

  iterator: SavableIterator


_PREFIX = formats.PREFIX
_TRASH = ".deleted"
_REMEDY = "delete this folder to go on from the one before, or set MODEL_DIR"
PyTree = Any
Path = os.PathLike[str] | str


def load_placed(
  path: Path | None, shapes: PyTree, shardings: PyTree, *, setting: str, of: str
) -> PyTree:
  """Reads the parameters of a model that is not trained onto its devices.

  Args:
    path: see `load_params`.
    shapes: nested dict of anything with a `shape` and a `dtype`.
    shardings: of the same structure.
    setting: what the user set the path with, for the messages.
    of: what the model is, such as "teacher", for the message.

  Returns:
    Nested dict of `jax.Array`s of these types.

  Raises:
    ValueError: no path, or as `load_params`.
  """
  if not path:
    raise ValueError(
      f"expected a checkpoint of the {of}, got none; set {setting}"
    )
  like = partitioning.with_shardings(shapes, shardings)
  return formats.load_params(path, setting=setting, like=like)


def has_checkpoint(model_dir: Path) -> bool:
  """Whether a run's folder holds a whole checkpoint, without opening any."""
  return bool(formats.find_steps(files.absolute(model_dir)))


def recorded_data_shards(model_dir: Path) -> int | None:
  """Returns how many shards of data a run reads, from its newest checkpoint.

  Args:
    model_dir: the run's folder.

  Returns:
    The n of `dataset/shard_<i>-of-<n>/`; None before the first checkpoint.

  Raises:
    ValueError: the checkpoint holds no position of the data.
  """
  steps = formats.find_steps(files.absolute(model_dir))
  if not steps:
    return None
  positions = steps[max(steps)] / "dataset"
  names = [p.name for p in positions.iterdir()] if positions.exists() else []
  for name in names:
    if found := re.fullmatch(r"shard_\d+-of-(\d+)", name):
      return int(found[1])
  raise ValueError(
    "expected the position of each shard of the data, got"
    f" {errors.listing(positions)} in {positions}; set MODEL_DIR to"
    " an empty folder and INITIAL_CHECKPOINT_PATH to this run"
  )


class Checkpointer:
  """The checkpoints of one training run, for the process that writes them.

  Opening it removes what a killed process left half written, so only the run
  itself opens one; everybody else reads with `load_params`.
  """

  def __init__(
    self,
    model_dir: Path,
    *,
    keep: int | None = 3,
    best_metric: str | None = None,
    best_mode: str = "max",
    keep_best: int = 1,
    async_save: bool = True,
  ):
    """Opens `model_dir`, which is created if it is not there.

    Args:
      model_dir: the run's folder.
      keep: how many of the newest checkpoints stay; None keeps all.
      best_metric: name of the metric, of those given to `save`, that the best
        checkpoints are chosen by; None keeps no best.
      best_mode: "max" or "min".
      keep_best: how many of the best stay beside the newest.
      async_save: True returns from `save` when the arrays are copied, and
        writes in the background.

    Raises:
      ValueError: if an argument is out of its range.
    """
    if keep is not None and keep < 1:
      raise ValueError(f"expected keep of at least 1, got {keep}; set keep")
    if keep_best < 0:
      raise ValueError(
        f"expected keep_best of at least 0, got {keep_best}; set keep_best"
      )
    if best_mode not in ("max", "min"):
      raise ValueError(
        f"expected best_mode 'max' or 'min', got {best_mode!r}; set best_mode"
      )
    self._folder = files.absolute(model_dir)
    self._best_metric = best_metric
    self._sign = 1.0 if best_mode == "max" else -1.0
    policies = [ocp.checkpoint_managers.LatestN(n=keep)]
    if best_metric is not None:
      policies.append(
        ocp.checkpoint_managers.BestN(get_metric_fn=self._score, n=keep_best)
      )
    self._manager = self._open(
      ocp.checkpoint_managers.AnyPreservationPolicy(policies), async_save
    )
    self._empty_trash()

  def latest_step(self) -> int | None:
    """Returns the newest step (one being written counts), None without any."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Returns the step with the best metric, the later one of equals.

    None without a `best_metric`, or where no checkpoint has a finite one.
    """
    if self._best_metric is None:
      return None
    self.wait()
    step = self._manager.best_step()
    if step is None or not math.isfinite(
      self._score(self._manager.metrics(step))
    ):
      return None
    return step

  def save(
    self,
    step: int,
    state: PyTree,
    *,
    dataset_iterator: SavableIterator | None = None,
    metrics: Mapping[str, float] | None = None,
    config: Mapping[str, Any] | None = None,
  ) -> bool:
    """Saves, unless there is a checkpoint of this step.

    It waits for the save before and for what that one replaced to be deleted.
    When it returns, `state` may be donated and the iterator may go on. Errors
    of the background write are raised by the next `save`, `wait` or `close`.

    Args:
      step: the step that `state` has reached.
      state: a tree of arrays and numbers with the fields `step`, `params` and
        `opt_state`; the teacher's parameters do not belong in it.
      dataset_iterator: saved with it, at its present position.
      metrics: name to value; None where none were computed at this step.
      config: JSON-able network configuration.

    Returns:
      False if there is a checkpoint of this step, which then stays as it is.

    Raises:
      ValueError: if there is a newer checkpoint, or `metrics` lack
        `best_metric`.
    """
    newest = self.latest_step()
    if newest is not None and step < newest:
      raise ValueError(
        f"expected a step above {newest}, the newest checkpoint in"
        f" {self._folder}, got {step}; set MODEL_DIR to an empty folder"
      )
    if newest == step:
      return False
    if metrics is not None and self._best_metric not in (None, *metrics):
      raise ValueError(
        f"expected the metric {self._best_metric!r} to choose the best"
        f" checkpoint by, got {sorted(metrics)}; set best_metric"
      )
    items = {"state": ocp.args.PyTreeSave(state)}
    if dataset_iterator is not None:
      items["dataset"] = IteratorArgs(dataset_iterator)
    if config is not None:
      items["config"] = ocp.args.JsonSave(
        json.loads(safetensors_io.encode_config(config))
      )
    self.wait()
    return self._manager.save(
      step,
      args=ocp.args.Composite(**items),
      # Never None: Orbax would keep a checkpoint without metrics for ever.
      metrics={name: float(value) for name, value in (metrics or {}).items()},
      force=True,
    )

  def restore(
    self,
    step: int,
    abstract_state: PyTree,
    dataset_iterator: SavableIterator | None = None,
  ) -> PyTree:
    """Reads the state of one step, and puts the iterator where it was.

    Args:
      step: one of the steps in the folder.
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings, or a state:
        the arrays take its structure, shapes, dtypes and shardings. A leaf
        without a sharding goes to the first device.
      dataset_iterator: is moved to the saved position.

    Returns:
      The state.

    Raises:
      ValueError: if the step is not there, is damaged, was saved without an
        iterator where one is asked for, or has other parameters or another
        optimizer.
    """
    self.wait()
    folder = self._folder / f"{_PREFIX}_{step}"
    if step not in self._manager.all_steps():
      raise ValueError(
        f"expected a checkpoint of one of the steps"
        f" {list(self._manager.all_steps())} in {self._folder}, got {step};"
        " set MODEL_DIR"
      )
    abstract_state = jax.tree.map(_abstract, abstract_state)
    errors.check_matches(
      orbax_arrays.saved_tree(folder, _REMEDY),
      abstract_state,
      setting="MODEL_DIR",
      path=folder,
    )
    items = {
      "state": ocp.args.PyTreeRestore(
        abstract_state,
        restore_args=ocp.checkpoint_utils.construct_restore_args(
          abstract_state
        ),
      )
    }
    position = folder / "dataset"
    if dataset_iterator is not None and not position.exists():
      raise ValueError(
        "expected the data's position in a folder dataset, got"
        f" {errors.listing(folder)} in {folder}; set MODEL_DIR"
      )
    if dataset_iterator is not None:
      items["dataset"] = IteratorArgs(dataset_iterator)
    with errors.whole(folder, _REMEDY):
      return self._manager.restore(step, args=ocp.args.Composite(**items)).state

  def wait(self) -> None:
    """Returns when the last save is on disk, or raises its error."""
    self._manager.wait_until_finished()
    self._empty_trash()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    self.wait()
    self._manager.close()

  def _open(self, preservation_policy, async_save) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._folder,
      item_handlers={
        "state": ocp.PyTreeCheckpointHandler(),
        "dataset": IteratorHandler(),
        "config": ocp.JsonCheckpointHandler(safetensors_io.CONFIG_FILE),
      },
      options=ocp.CheckpointManagerOptions(
        step_prefix=_PREFIX,
        best_fn=self._score,
        preservation_policy=preservation_policy,
        cleanup_tmp_directories=True,
        todelete_subdir=_TRASH,
        save_root_metadata=False,
        enable_async_checkpointing=async_save,
        # The iterator writes before `save` returns, so its folder has to be
        # there by then.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      ),
    )

  def _score(self, metrics: Mapping[str, float]) -> float:
    """The number, higher is better, that checkpoints are ordered by."""
    value = self._sign * metrics.get(self._best_metric or "", math.nan)
    return -math.inf if math.isnan(value) else value

  def _empty_trash(self) -> None:
    if jax.process_index() == 0 and (self._folder / _TRASH).exists():
      (self._folder / _TRASH).rmtree()


def _abstract(leaf: Any) -> Any:
  """Describes a leaf of the state for Orbax, its sharding included."""
  if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
    return leaf
  sharding = leaf.sharding
  if sharding is None:
    # Orbax would take the saved sharding, whose devices may not be here.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
