"""Tasks whose examples may lack targets: prompts alone, and mixtures with these.

On-policy training and decoding read no targets. seqio asks for every feature that a
task declares, and mixes only examples with equal features.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.data import errors


def allow(task: Any) -> Any:
  """Returns a copy of a task or mixture whose examples may lack targets.

  In a mixture, examples of a task without targets get empty ones. What is
  registered stays as it is.

  Args:
    task: a seqio task or mixture.
  """
  return _copied(task, {})


def _copied(task, copies):
  """Returns the copy; a task that two mixtures share has one."""
  if id(task) in copies:
    return copies[id(task)]
  copied = copies[id(task)] = copy.copy(task)
  if isinstance(task, seqio.Task):
    features = dict(task.output_features)
    if "targets" in features:
      features["targets"] = dataclasses.replace(
        features["targets"], required=False
      )
    copied._output_features = features
  else:
    of = functools.partial(_copied, copies=copies)
    copied._tasks = [*map(of, task._tasks)]
    copied._sub_mixtures = [*map(of, task._sub_mixtures)]
    copied._task_map = {k: of(sub) for k, sub in task._task_map.items()}
    copied.get_task_dataset = functools.partial(
      _task_dataset, copied.get_task_dataset
    )
  return copied


def _task_dataset(get, task, *args, **kwargs):
  """Returns what a mixture's `get_task_dataset` does, targets always there."""
  feature = task.output_features.get("targets")
  dtype = tf.int32 if feature is None else feature.dtype
  return with_targets(get(task, *args, **kwargs), dtype)


def with_targets(
  dataset: tf.data.Dataset, dtype: tf.DType = tf.int32
) -> tf.data.Dataset:
  """Returns a dataset with empty targets if it has none.

  Args:
    dataset: of a task's features.
    dtype: of targets.
  """
  if "targets" in set(dataset.element_spec):
    return dataset
  empty = {"targets": tf.zeros([0], dtype)}
  return dataset.map(lambda example: example | empty)


def check(
  task: Any,
  split: str,
  lengths: Mapping[str, int],
  *,
  use_cached: bool = False,
  otherwise: str,
) -> None:
  """Checks that each task of a mixture has targets; reads no example.

  Args:
    task: from `load_task`.
    split: name of the split.
    lengths: seqio feature to length.
    use_cached: read seqio's cache.
    otherwise: the setting that needs no targets, with its value.

  Raises:
    ValueError: the examples of a task have none.
  """
  alone = []
  for sub in seqio.get_subtasks(task):
    if split not in sub.splits:
      continue
    dataset = errors.read_split(sub, split, lengths, use_cached=use_cached)
    if "targets" not in set(dataset.element_spec):
      alone.append(sub.name)
  if alone:
    raise ValueError(
      f"expected examples with targets, got prompts alone from"
      f" {', '.join(alone)}; set {otherwise} or MIXTURE_OR_TASK_NAME"
    )
