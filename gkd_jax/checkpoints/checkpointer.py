"""Checkpoints of a training run, by Orbax.

A run writes `MODEL_DIR/checkpoint_<step>` with four items:

  state/    the train state: step, parameters, optimizer (Orbax, OCDBT)
  dataset/  position of the data, `shard_<i>-of-<n>/` for each shard
  config/   `config.json`, the network configuration
  metrics/  `metrics`, JSON, for choosing the best checkpoint

A checkpoint is written under a temporary name and renamed when it is complete,
and an old one is renamed before it is deleted: a folder with a final name is
complete, even after a killed process.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath

from gkd_jax import files, types
from gkd_jax.checkpoints import errors, formats, orbax_arrays, safetensors_io


class SavableIterator(Protocol):
  """A data iterator that can write its position to a folder and restore it.

  The folder exists, is empty, is shared by all processes, and is renamed after
  `save_state`: two processes must not write the same file, and files must not
  contain its absolute path.
  """

  def save_state(self, path: str) -> None:
    """Writes the position."""

  def restore_state(self, path: str) -> None:
    """Restores a position that `save_state` wrote."""


class IteratorHandler(ocp.CheckpointHandler):
  """Orbax's handler of a `SavableIterator`.

  It is synchronous: `save` returns when the iterator has written its position at
  this step, although the arrays are written later.
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
  """Arguments of `IteratorHandler`: the iterator to save or restore."""

  iterator: SavableIterator


_PREFIX = formats.PREFIX
_TRASH = ".deleted"
_REMEDY = "move this folder out of MODEL_DIR to go on from the one before, or set MODEL_DIR"
PyTree = Any
Path = os.PathLike[str] | str


def has_checkpoint(model_dir: Path) -> bool:
  """Returns whether a run's folder has a complete checkpoint."""
  return bool(formats.find_steps(files.absolute(model_dir)))


def newest_step(model_dir: Path) -> int | None:
  """Returns the newest complete step in a run's folder, or None."""
  return max(formats.find_steps(files.absolute(model_dir)), default=None)


def saved_metrics(model_dir: Path, step: int) -> dict[str, float]:
  """Returns the metrics of an evaluation at a step; {} if there are none."""
  folder = files.absolute(model_dir) / f"{_PREFIX}_{step}"
  return files.read_json(folder / "metrics" / "metrics") or {}


def recorded_data_shards(model_dir: Path) -> int | None:
  """Returns the number of data shards of a run, from its newest checkpoint.

  Args:
    model_dir: the run's folder.

  Returns:
    The n of `dataset/shard_<i>-of-<n>/`; None before the first checkpoint.

  Raises:
    ValueError: if the checkpoint has no position of the data.
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
  """The checkpoints of a training run, for the run itself.

  Opening it removes incomplete checkpoints, so other programs should read with
  `load_params`.
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
    """Opens `model_dir`, which is created if it does not exist.

    Args:
      model_dir: the run's folder.
      keep: number of newest checkpoints to keep; None keeps all.
      best_metric: metric, of those given to `save`, by which the best
        checkpoints are chosen; None keeps no best ones.
      best_mode: "max" or "min".
      keep_best: number of best checkpoints to keep besides the newest.
      async_save: whether `save` returns when the arrays are copied, and writes
        in the background.

    Raises:
      ValueError: if an argument is out of range.
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
    newest = ocp.checkpoint_managers.LatestN(n=keep)
    best = _Best(self._scores, keep_best)
    self._manager = self._open(
      ocp.checkpoint_managers.AnyPreservationPolicy([newest, best]), async_save
    )
    self._empty_trash()
    self._metrics = {
      step: saved_metrics(self._folder, step)
      for step in self._manager.all_steps()
    }

  def latest_step(self) -> int | None:
    """Returns the newest step, including one being written, or None."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Returns the step with the best metric, the last of equal ones.

    Returns None without `best_metric`, or if no checkpoint has a finite value.
    """
    self.wait()
    scores = self._scores(self._manager.all_steps())
    return max(scores, key=lambda step: (scores[step], step), default=None)

  def is_best(self, metrics: Mapping[str, float]) -> bool:
    """Returns whether no checkpoint has metrics as good as these.

    Args:
      metrics: of an evaluation; always False without `best_metric` in them.
    """
    score = self._score(metrics)
    best = self._scores(self._manager.all_steps()).values()
    return math.isfinite(score) and score > max(best, default=-math.inf)

  def record(self, step: int, metrics: Mapping[str, float]) -> bool:
    """Adds an evaluation's metrics to the checkpoint of its step.

    So a checkpoint can be saved before its evaluation, and chosen by it. Waits
    for the save.

    Args:
      step: of the evaluation.
      metrics: name to value.

    Returns:
      False if there is no checkpoint of this step.
    """
    self.wait()
    if step not in self._manager.all_steps():
      return False
    self._metrics[step] = {name: float(v) for name, v in metrics.items()}
    if jax.process_index() == 0:
      place = self._folder / f"{_PREFIX}_{step}" / "metrics" / "metrics"
      files.write_json(place, self._metrics[step])
    return True

  def save(
    self,
    step: int,
    state: PyTree,
    *,
    dataset_iterator: SavableIterator | None = None,
    metrics: Mapping[str, float] | None = None,
    config: Mapping[str, Any] | None = None,
    special_tokens: types.SpecialTokens | None = None,
  ) -> bool:
    """Saves a checkpoint, unless there is one of this step.

    Waits for the previous save. Afterwards `state` may be donated and the
    iterator may continue. Errors of the background write are raised by the next
    `save`, `wait` or `close`.

    Args:
      step: the step of `state`.
      state: tree of arrays and numbers with the fields `step`, `params` and
        `opt_state`, without the teacher's parameters.
      dataset_iterator: saved at its current position.
      metrics: name to value; None if none were computed at this step.
      config: JSON-able network configuration.
      special_tokens: of the model, stored with `config`.

    Returns:
      False if there is a checkpoint of this step, which is not changed.

    Raises:
      ValueError: if there is a newer checkpoint, a parameter is not finite, or
        `metrics` do not contain `best_metric`.
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
        f" checkpoint by, got {sorted(metrics)}; set BEST_METRIC"
      )
    errors.check_finite(
      getattr(state, "params", {}),
      of=f"student at step {step}",
      path="this run",
      remedy="nothing was saved; set LEARNING_RATE",
    )
    items = {"state": ocp.args.PyTreeSave(state)}
    if dataset_iterator is not None:
      items["dataset"] = IteratorArgs(dataset_iterator)
    if config is not None:
      config = safetensors_io.with_special_tokens(config, special_tokens)
      items["config"] = ocp.args.JsonSave(
        json.loads(safetensors_io.encode_config(config))
      )
    self.wait()
    self._metrics[step] = {k: float(v) for k, v in (metrics or {}).items()}
    return self._manager.save(
      step,
      args=ocp.args.Composite(**items),
      metrics=self._metrics[step],
      force=True,
    )

  def restore(
    self,
    step: int,
    abstract_state: PyTree,
    dataset_iterator: SavableIterator | None = None,
  ) -> PyTree:
    """Reads the state of a step, and restores the iterator's position.

    The two are apart: an error about the position keeps its words, and only
    damage of the arrays is called so.

    Args:
      step: one of the steps in the folder.
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings, or a state,
        for structure, shapes, dtypes and shardings of the arrays. A leaf without
        a sharding is placed on the first device.
      dataset_iterator: moved to the saved position.

    Returns:
      The state.

    Raises:
      ValueError: if there is no checkpoint of the step, if it is damaged, was
        saved without an iterator but one is given, has other parameters or
        another optimizer, or a parameter that is not finite.
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
    if dataset_iterator is not None:
      position = folder / "dataset"
      if not position.exists():
        raise ValueError(
          "expected the data's position in a folder dataset, got"
          f" {errors.listing(folder)} in {folder}; set SAVE_DATA_POSITION ="
          " False to begin the data anew, or MODEL_DIR"
        )
      dataset_iterator.restore_state(os.fspath(position))
    with errors.whole(folder, _REMEDY):
      state = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeRestore(
            abstract_state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(
              abstract_state
            ),
          )
        ),
      ).state
    errors.check_finite(
      getattr(state, "params", {}), of="student", path=folder, remedy=_REMEDY
    )
    return state

  def wait(self) -> None:
    """Waits until the last save is complete, or raises its error."""
    self._manager.wait_until_finished()
    self._empty_trash()

  def close(self) -> None:
    """Waits for the last save and ends the background threads."""
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
        best_fn=self._score,  # else Orbax writes no metrics
        preservation_policy=preservation_policy,
        cleanup_tmp_directories=True,
        todelete_subdir=_TRASH,
        save_root_metadata=False,
        enable_async_checkpointing=async_save,
        # The iterator writes before `save` returns, into its folder.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      ),
    )

  def _scores(self, steps: Sequence[int]) -> dict[int, float]:
    """Returns step to score, of the checkpoints that have a finite one."""
    scores = {s: self._score(self._metrics.get(s, {})) for s in steps}
    return {s: score for s, score in scores.items() if math.isfinite(score)}

  def _score(self, metrics: Mapping[str, float]) -> float:
    """Returns the number by which checkpoints are ordered, higher is better."""
    value = self._sign * metrics.get(self._best_metric or "", math.nan)
    return -math.inf if math.isnan(value) else value

  def _empty_trash(self) -> None:
    if jax.process_index() == 0 and (self._folder / _TRASH).exists():
      (self._folder / _TRASH).rmtree()


class _Best:
  """Orbax's preservation policy that keeps the best checkpoints.

  Orbax knows the metrics that a checkpoint was saved with, not those that were
  recorded later.

  Args:
    scores: steps to the score of each that has one, higher is better.
    count: checkpoints that are kept.
  """

  def __init__(
    self, scores: Callable[[Sequence[int]], Mapping[int, float]], count: int
  ):
    self._scores, self._count = scores, count

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any):
    """Returns whether each checkpoint is kept; see Orbax's protocol."""
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    scores = self._scores(steps)
    best = sorted(scores, key=lambda step: (scores[step], step))
    best = best[len(best) - min(self._count, len(best)) :]
    return [step in best for step in steps]


def _abstract(leaf: Any) -> Any:
  """Describes a leaf of the state for Orbax, its sharding included."""
  if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
    return leaf
  sharding = leaf.sharding
  if sharding is None:
    # Orbax would use the saved sharding, whose devices may not exist here.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
