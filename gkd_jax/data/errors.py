"""Errors of seqio, TFDS and TensorFlow about data, each as one sentence."""

import contextlib
import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf


def check_source(
  task: Any, split: str, *, use_cached: bool = False, setting: str | None = None
) -> None:
  """Checks that a task can be read: its splits, its TFDS data set, its cache.

  Args:
    task: a seqio task or mixture.
    split: name of the split.
    use_cached: whether seqio's cache is read.
    setting: what the split is set with; None if it cannot be set.

  Raises:
    ValueError: a task of it lacks one of them.
  """
  for sub in seqio.get_subtasks(task):
    cached = use_cached and sub.supports_caching
    if cached and not sub.cache_dir:
      folders = ", ".join(seqio.utils.get_global_cache_dirs()) or "no folder"
      raise ValueError(
        f"expected a cache of {sub.name}, got none in {folders}; set"
        " USE_CACHED_TASKS = False or --seqio_additional_cache_dirs"
      )
    splits = sub.source.splits
    if cached or (splits and (setting or split in splits)):
      continue  # which splits there are is said where they can be set
    if isinstance(sub.source, seqio.TfdsDataSource) and not splits:
      dataset = sub.source.tfds_dataset
      raise ValueError(
        f"expected the TFDS data set {dataset.name} of {sub.name}, got none"
        f" in {dataset.builder.data_path}; set --tfds_data_dir, or prepare it"
        " with tfds build"
      )
    raise ValueError(
      f"expected a task with a split {split!r}, got {sub.name} with"
      f" {sorted(splits) or 'none'}; set {setting or 'MIXTURE_OR_TASK_NAME'}"
    )


@contextlib.contextmanager
def explained(task: str, split: str) -> Iterator[None]:
  """Raises errors of reading a split as a ValueError of one sentence.

  Errors of a task's own Python code stay as they are.

  Args:
    task: its name.
    split: its name.

  Raises:
    ValueError: there are too few examples, or they cannot be read.
  """
  of = f"the split {split!r} of {task}"
  try:
    yield
  except StopIteration as error:
    raise ValueError(
      f"expected enough examples for a batch in {of}, got fewer or none; set"
      " MIXTURE_OR_TASK_NAME or BATCH_SIZE, or the task's preprocessors"
    ) from error
  except tf.errors.OpError as error:
    what = "files" if _is_about_files(error) else "examples"
    raise ValueError(
      f"expected {what} that can be read for {of}, got {_reason(error)!r}; set"
      " MIXTURE_OR_TASK_NAME, or the task's files and preprocessors"
    ) from error
  except (ValueError, KeyError, AssertionError) as error:
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    if "/seqio/" not in place or not str(error):
      raise
    raise ValueError(
      f"expected a task that seqio can read, got {_reason(error)!r} of {of};"
      " set MIXTURE_OR_TASK_NAME, or what registers the task"
    ) from error


def read_split(
  task: Any,
  split: str,
  lengths: Mapping[str, int],
  *,
  use_cached: bool = False,
  seed: int | None = None,
) -> tf.data.Dataset:
  """Returns the examples of a split in its order, with `explained` errors.

  Errors of the examples come when they are read.

  Args:
    task: a seqio task.
    split: name of the split.
    lengths: seqio feature to length.
    use_cached: read seqio's cache.
    seed: of what a task draws, and of a mixture's order.

  Raises:
    ValueError: the split cannot be read.
  """
  with explained(task.name, split):
    return task.get_dataset(
      sequence_length=dict(lengths),
      split=split,
      shuffle=False,
      use_cached=use_cached,
      seed=seed,
    )


@contextlib.contextmanager
def explained_vocabulary(task: str) -> Iterator[None]:
  """Raises errors of reading a task's vocabulary as a ValueError.

  Args:
    task: its name.

  Raises:
    ValueError: its file cannot be read.
  """
  try:
    yield
  except (tf.errors.OpError, OSError) as error:
    raise ValueError(
      f"expected the vocabulary of {task}, got {_reason(error)!r}; set"
      " MIXTURE_OR_TASK_NAME, or what registers the task"
    ) from error


def _is_about_files(error):
  return isinstance(
    error, tf.errors.NotFoundError | tf.errors.PermissionDeniedError
  )


def _reason(error):
  """Returns what is wrong, without the names of TensorFlow's nodes."""
  text = str(getattr(error, "message", error))
  text = re.sub(r"\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*?\].*", "", text)
  text = text.strip().splitlines()[0] if text.strip() else repr(error)
  # "Error in user-defined function ... Iterator::Root::...::Map: the reason"
  return re.sub(r"^Error in user-defined function .*?::\w+: ", "", text).strip()
