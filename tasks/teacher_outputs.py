"""Tasks whose train targets are a teacher's outputs, as `gkd infer` wrote them.

Sequence-level distillation (Kim and Rush 2016) is then plain supervised
training on such a task. Validation and test are those of the task that the
outputs were made for. `distilled` does the same with shards of whole tasks.

An output that was cut at the teacher's longest length gets no EOS: the teacher
did not end it, and a student must not learn to end there.
"""

import functools
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.tasks import sources


@functools.lru_cache(maxsize=4)
def _read(
  path: str, drop_cut: bool, modified_ns: int, size: int
) -> sources.Columns:
  # The last two arguments make a file that was written anew be read anew.
  del modified_ns, size
  inputs, targets, ended = [], [], []
  for number, line in enumerate(io.StringIO(sources.read_text(path)), start=1):
    try:
      row = json.loads(line)
      pair = row["inputs"], row["prediction"]
      # Files of before say nothing of it.
      whole = row.get("ended", True)
    except (ValueError, KeyError, TypeError):
      pair, whole = (None, None), True
    if not all(isinstance(text, str) for text in pair) or whole not in (0, 1):
      raise ValueError(
        "expected lines of JSON with the texts 'inputs' and 'prediction', and"
        " 'ended' true or false, "
        f"got {line.strip()[:80]!r} in line {number} of {path}; set path to "
        "a file that `gkd infer` wrote"
      )
    if whole or not drop_cut:
      inputs.append(pair[0])
      targets.append(pair[1])
      ended.append(bool(whole))
  if not inputs:
    raise ValueError(
      f"expected at least one line in {path}, got none"
      f"{' of an output that ended' * drop_cut}; set path to a file that"
      " `gkd infer` wrote"
    )
  return {"inputs": inputs, "targets": targets, "ended": ended}


def _load_columns(split: str, *, path: str, drop_cut: bool) -> sources.Columns:
  del split  # The source has a train split only.
  found = os.path.expandvars(os.path.expanduser(path))
  if not tf.io.gfile.exists(found) or tf.io.gfile.isdir(found):
    raise ValueError(
      f"expected a JSONL file of a teacher's outputs, got {path!r} that names "
      f"{found!r}, which is no file; set path (or the variable in it)"
    )
  status = tf.io.gfile.stat(found)
  return _read(found, drop_cut, status.mtime_nsec, status.length)


class TeacherOutputsSource(seqio.DataSource):
  """Train from a JSONL file; the other splits as texts of a base task."""

  def __init__(self, path: str, base_task: str, drop_cut: bool = False):
    """Makes the source; neither the file nor the base task is read yet.

    Args:
      path: The JSONL file; `~` and `$VARIABLE` are expanded when it is read.
      base_task: The name of the task that gives the other splits.
      drop_cut: Whether outputs that were cut are left out.

    Raises:
      ValueError: If the base task does not tokenize with
        `seqio.preprocessors.tokenize`.
    """
    self.path = path
    self.base_task = base_task
    self.drop_cut = drop_cut
    self._file = sources.ColumnsDataSource(
      functools.partial(_load_columns, path=path, drop_cut=drop_cut),
      splits=("train",),
    )
    base = seqio.TaskRegistry.get(base_task)
    self._text_preprocessors, _ = split_preprocessors(base)
    super().__init__(
      splits=("train", *(s for s in base.splits if s != "train"))
    )

  @property
  def supports_arbitrary_sharding(self) -> bool:
    """Whether the base task's source can be; the file always can."""
    return seqio.TaskRegistry.get(
      self.base_task
    ).source.supports_arbitrary_sharding

  def num_input_examples(self, split: str) -> int | None:
    """The number of rows, as far as the source of the split knows it."""
    return self._source(split).num_input_examples(split)

  def list_shards(self, split: str) -> Sequence[str]:
    """The shards of the source of the split."""
    return self._source(split).list_shards(split)

  def get_dataset(
    self,
    split: str = "train",
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused_kwargs,
  ) -> tf.data.Dataset:
    """Examples of texts, ready to be tokenized; see `seqio.DataSource`."""
    dataset = self._source(split).get_dataset(
      split=split, shuffle=shuffle, seed=seed, shard_info=shard_info
    )
    if split != "train":
      base = seqio.TaskRegistry.get(self.base_task)
      for preprocessor in self._text_preprocessors:
        dataset = seqio.utils.add_kwargs_to_transform(
          preprocessor,
          sequence_length=None,
          output_features=base.output_features,
        )(dataset)
    return dataset

  def _source(self, split: str) -> seqio.DataSource:
    if split == "train":
      return self._file
    return seqio.TaskRegistry.get(self.base_task).source


def split_preprocessors(
  task: seqio.Task,
) -> tuple[list[Callable], list[Callable]]:
  """Divides a task's preprocessors before `seqio.preprocessors.tokenize`.

  Args:
    task: A seqio task.

  Returns:
    The preprocessors that make texts, and those from `tokenize` on; without
    seqio's cache placeholder.

  Raises:
    ValueError: If `tokenize` is not among them.
  """
  # Outputs in a file are not cached again.
  steps = [
    step
    for step in task.preprocessors
    if not isinstance(step, seqio.CacheDatasetPlaceholder)
  ]
  for i, step in enumerate(steps):
    function = step.func if isinstance(step, functools.partial) else step
    if function is seqio.preprocessors.tokenize:
      return steps[:i], steps[i:]
  raise ValueError(
    "expected a task that tokenizes with seqio.preprocessors.tokenize, got "
    f"{task.name}; set base_task"
  )


def without_eos_where_cut(
  dataset: tf.data.Dataset, output_features: Mapping[str, Any]
) -> tf.data.Dataset:
  """Takes back the EOS that a task's own steps put after outputs that were cut.

  Args:
    dataset: Examples with tokens, and `ended` where they are a teacher's.
    output_features: The task's.

  Returns:
    The dataset without `ended`.
  """
  if "ended" not in set(dataset.element_spec):
    return dataset
  eos_id = output_features["targets"].vocabulary.eos_id

  def cut(example):
    rest = {name: x for name, x in example.items() if name != "ended"}
    targets = example["targets"]
    has_eos = tf.reduce_any(tf.equal(targets[-1:], eos_id))
    extra = tf.cast(has_eos & ~example["ended"], tf.int32)
    return rest | {"targets": targets[: tf.size(targets) - extra]}

  return dataset.map(cut, num_parallel_calls=tf.data.AUTOTUNE)


def register(
  name: str, path: str, base_task: str, *, drop_cut: bool = False
) -> seqio.Task:
  """Registers a task that trains on a teacher's outputs.

  Nothing is read before the dataset is built. Registering the same task
  twice is allowed, so that a configuration may be parsed again.

  Args:
    name: The name of the new task.
    path: A JSONL file of `gkd infer`: one object a line with the texts `inputs`
      (after the base task's own preprocessing) and `prediction`, and `ended`,
      false for an output that was cut and gets no EOS; other keys are ignored.
      `~` and `$VARIABLE` are expanded when it is read.
    base_task: The task that gives vocabularies, metrics, validation and test.
    drop_cut: Whether outputs that were cut are left out.

  Returns:
    The task.

  Raises:
    ValueError: If `name` is a task already, with another file or base, or the
      base task does not tokenize with `seqio.preprocessors.tokenize`.
  """
  if name in seqio.TaskRegistry.names():
    task = seqio.TaskRegistry.get(name)
    known = task.source
    if isinstance(known, TeacherOutputsSource) and (
      (known.path, known.base_task, known.drop_cut)
      == (path, base_task, drop_cut)
    ):
      return task
    raise ValueError(
      f"expected a new name, got {name!r}, which is a task with another source; "
      "set name"
    )
  base = seqio.TaskRegistry.get(base_task)
  _, tokenizers = split_preprocessors(base)
  return add_like(
    base,
    name,
    source=TeacherOutputsSource(path, base_task, drop_cut),
    preprocessors=[*tokenizers, without_eos_where_cut],
  )


def add_like(
  base: seqio.Task,
  name: str,
  *,
  source: seqio.DataSource,
  preprocessors: Sequence[Callable],
) -> seqio.Task:
  """Registers a task that differs from another in its examples alone.

  Args:
    base: The task that gives vocabularies, metrics and postprocessing.
    name: The name of the new task.
    source: Its source.
    preprocessors: From the source's examples to tokens.

  Returns:
    The task.
  """
  return seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=preprocessors,
    output_features=base.output_features,
    postprocess_fn=base.postprocessor,
    metric_fns=base.metric_fns,
    # seqio lists the metric functions again, wrapped, after the given objects.
    metric_objs=base.metric_objs[
      : len(base.metric_objs) - len(base.metric_fns)
    ],
    shuffle_buffer_size=base.shuffle_buffer_size,
  )
