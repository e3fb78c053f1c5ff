"""Batches of numpy arrays from a seqio task, with a position that can be saved."""

import dataclasses
import difflib
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from jax.experimental import multihost_utils

from gkd_jax.data import feature_converters, shards
from gkd_jax.tasks import distilled

_SHIPPED = ("arithmetic", "bbh", "flan", "g2p", "gsm8k", "mmlu", "wmt", "xsum")
SHIPPED_TASKS = tuple(f"gkd_jax.tasks.{name}" for name in _SHIPPED)


def load_task(
  name: str,
  module: str | None = None,
  *,
  setting: str = "MIXTURE_OR_TASK_NAME",
) -> Any:
  """Returns a seqio task or mixture by name.

  Args:
    name: of the task or mixture.
    module: Python module that registers it, imported first.
    setting: what the name is set with, for errors.

  Raises:
    ValueError: there is no such module or task.
  """
  for path in (*SHIPPED_TASKS, module):
    if path:
      try:
        importlib.import_module(path)
      except ModuleNotFoundError as error:
        raise ValueError(
          f"expected a Python module, got {path!r} ({error});"
          " set MIXTURE_OR_TASK_MODULE, or PYTHONPATH"
        ) from error
  known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  if name not in known:
    near = difflib.get_close_matches(name, known, cutoff=0.3) or sorted(known)
    raise ValueError(
      f"expected a seqio task or mixture such as {', '.join(near)}, got"
      f" {name!r}; set {setting} or MIXTURE_OR_TASK_MODULE"
    )
  task = seqio.get_mixture_or_task(name)
  for sub in seqio.get_subtasks(task):
    _allow_prompts(sub)
  return task


def _allow_prompts(task):
  """Lets examples lack targets: on-policy training and decoding read none."""
  feature = task.output_features.get("targets")
  if feature is not None and feature.required:
    task.output_features["targets"] = dataclasses.replace(
      feature, required=False
    )


def target_vocabulary(task: Any) -> seqio.Vocabulary:
  """Returns the vocabulary of outputs; that of inputs for prompts alone.

  Args:
    task: from `load_task`.
  """
  features = task.output_features
  return features["targets" if "targets" in features else "inputs"].vocabulary


def has_split(task: Any, split: str) -> bool:
  """Returns whether a task, or a task of a mixture, has a split."""
  return any(split in sub.splits for sub in seqio.get_subtasks(task))


def tasks_with_split(
  task: Any, split: str, *, setting: str = "EVAL_SPLIT"
) -> list[seqio.Task]:
  """Returns the tasks of a task or mixture that have a split.

  Args:
    task: from `load_task`.
    split: name of the split.
    setting: what it is set with, for errors.

  Raises:
    ValueError: if none has it.
  """
  tasks = seqio.get_subtasks(task)
  found = [sub for sub in tasks if split in sub.splits]
  if not found:
    known = sorted({name for sub in tasks for name in sub.splits})
    raise ValueError(
      f"expected a split of {known} of {task.name}, got {split!r};"
      f" set {setting}"
    )
  return found


def distilled_task(
  prefix: str,
  original_task: str,
  module: str | None = None,
  name: str | None = None,
) -> str:
  """Registers the task of a teacher's outputs and returns its name, for gin.

  Args:
    prefix: of the shards that `gkd infer` wrote, its OUTPUT_PATH.
    original_task: the task that the outputs were made for.
    module: Python module that registers it, imported first.
    name: of the new task; by default the original's and "_distilled".

  Returns:
    The name of the new task.

  Raises:
    ValueError: the original is no task, or the name is one already.
  """
  original = load_task(original_task, module, setting="ORIGINAL_TASK")
  if not isinstance(original, seqio.Task):
    raise ValueError(
      f"expected a task, got the mixture {original_task!r}; set ORIGINAL_TASK"
    )
  name = name or f"{original_task}_distilled"
  return distilled.add_distilled_task(name, prefix, original_task).name


def feature_converter(cls: Any, pack: bool) -> seqio.FeatureConverter:
  """Returns the converter from a task's features to a model's.

  Args:
    cls: a model's `FEATURE_CONVERTER_CLS`: a name in `feature_converters` or in
      seqio, or a class.
    pack: several examples in a row.
  """
  if isinstance(cls, str):
    cls = getattr(feature_converters, cls, None) or getattr(seqio, cls)
  return feature_converters.for_prompts(cls)(pack=pack)


def feature_lengths(
  cls: Any, task_feature_lengths: Mapping[str, int], pack: bool
) -> dict[str, int]:
  """Returns the lengths of a batch's features `[B, length]`; reads no data.

  Args:
    cls: see `feature_converter`.
    task_feature_lengths: seqio feature to length.
    pack: see `feature_converter`.
  """
  converter = feature_converter(cls, pack)
  return dict(converter.get_model_feature_lengths(dict(task_feature_lengths)))


class TrainIterator:
  """Endless batches: a process's share of a training split.

  Its position can be saved, and restored by another number of processes
  (`checkpoints.SavableIterator`).

  Args:
    task: from `load_task`.
    lengths: seqio feature to length.
    batch_size: of all processes together.
    seed: of the shuffle.
    converter: a model's `FEATURE_CONVERTER_CLS`.
    pack: several examples in a row.
    share: what this process reads; by default one shard, all rows.
    use_cached: read seqio's cache.
    split: name of the split.
  """

  def __init__(
    self,
    task: Any,
    lengths: Mapping[str, int],
    batch_size: int,
    *,
    seed: int,
    converter: Any = "EncDecFeatureConverter",
    pack: bool = False,
    share: shards.Share | None = None,
    use_cached: bool = False,
    split: str = "train",
  ):
    if min(lengths.values()) < 1:
      raise ValueError(
        f"expected lengths of at least 1, got {dict(lengths)};"
        " set TASK_FEATURE_LENGTHS"
      )
    if share is None:
      share = shards.Share(1, (0,), (0,), np.arange(batch_size))
    self._share = share
    self._iterators = []
    for shard in share.shards:
      dataset = seqio.get_dataset(
        mixture_or_task_name=task.name,
        task_feature_lengths=dict(lengths),
        feature_converter=feature_converter(converter, pack),
        dataset_split=split,
        use_cached=use_cached,
        shuffle=True,
        num_epochs=None,
        shard_info=seqio.ShardInfo(shard, share.count),
        seed=seed,
      )
      dataset = dataset.batch(batch_size // share.count, drop_remainder=True)
      self._iterators.append(iter(_without_autotuning(dataset.prefetch(2))))

  def __next__(self) -> dict[str, np.ndarray]:
    blocks = [next(iterator) for iterator in self._iterators]
    join = lambda *parts: np.concatenate([part.numpy() for part in parts])
    return {
      k: join(*(b[k] for b in blocks))[self._share.rows] for k in blocks[0]
    }

  def save_state(self, path: str | os.PathLike[str]) -> None:
    """Writes the positions of the shards that this process owns into `path`."""
    for iterator, shard, name in self._each():
      if shard in self._share.owned:
        tf.io.gfile.mkdir(os.path.join(path, name))
        tf.train.Checkpoint(iterator=iterator).write(
          os.path.join(path, name, "iterator")
        )

  def restore_state(self, path: str | os.PathLike[str]) -> None:
    """Goes to the position that `save_state` wrote, in all processes."""
    for iterator, _, name in self._each():
      tf.train.Checkpoint(iterator=iterator).read(
        os.path.join(path, name, "iterator")
      ).assert_consumed()

  def _each(self):
    """Iterator, number and folder of each shard that this process reads."""
    names = [shards.folder(s, self._share.count) for s in self._share.shards]
    return zip(self._iterators, self._share.shards, names, strict=True)


def _without_autotuning(dataset):
  """Returns the pipeline without autotuning, so that it stops at once.

  An iterator that is replaced or deleted waits for TensorFlow's tuning thread, on
  one core for up to minutes. Without it a parallel map has one call per core.
  """
  options = tf.data.Options()
  options.autotune.enabled = False
  return dataset.with_options(options)


_INPUTS = "encoder_input_tokens"


class CutInputs:
  """Batches of an iterator with inputs cut to the shortest bucket that holds them.

  jit compiles one program per length that occurs, at most one more than there are
  buckets. Losses equal those of uncut batches to rounding, except for dropout on
  attention weights: its masks have the inputs' length, so other random numbers of
  the same distribution are drawn. The cut depends on the batch alone, so a resumed
  run continues bit for bit. Several processes agree on the length of each batch, for
  which the host waits until the devices have finished the step before.

  Args:
    iterator: a `checkpoints.SavableIterator` of batches.
    lengths: ascending buckets; a batch with a longer row is not cut.
    features: name to length of the batches' features, `feature_lengths`.

  Raises:
    ValueError: lengths that do not ascend, packed batches, or batches without
      encoder inputs.
  """

  def __init__(
    self, iterator: Any, lengths: Sequence[int], features: Mapping[str, int]
  ):
    if any(np.diff([0, *lengths]) < 1):
      raise ValueError(
        f"expected ascending lengths of at least 1, got {tuple(lengths)};"
        " set INPUT_BUCKETS"
      )
    if _INPUTS not in features:
      raise ValueError(
        f"expected batches with {_INPUTS}, got {', '.join(sorted(features))};"
        " set INPUT_BUCKETS = None"
      )
    if "encoder_segment_ids" in features:
      raise ValueError(
        "expected unpacked batches with INPUT_BUCKETS, got packed ones;"
        " set PACK = False or INPUT_BUCKETS = None"
      )
    self._iterator = iterator
    longest = features[_INPUTS]
    self._lengths = [n for n in lengths if n < longest] + [longest]

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self._iterator)
    place = np.searchsorted(self._lengths, _longest(batch[_INPUTS]))
    if jax.process_count() > 1:
      place = np.max(multihost_utils.process_allgather(place))
    cut = batch[_INPUTS][:, : self._lengths[int(place)]]
    return batch | {_INPUTS: cut}

  def save_state(self, path: str | os.PathLike[str]) -> None:
    """Writes the iterator's position into `path`."""
    self._iterator.save_state(path)

  def restore_state(self, path: str | os.PathLike[str]) -> None:
    """Goes to the position that `save_state` wrote."""
    self._iterator.restore_state(path)


def _longest(tokens):
  """Returns the length of the longest row of `[B, S]`; 0 without a token."""
  used = np.flatnonzero(tokens.any(axis=0))
  return used[-1] + 1 if used.size else 0
