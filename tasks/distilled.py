"""Tasks whose train split is a teacher's outputs in shards (`teacher_shards`).

Token ids are not changed: inputs are tokenized as in the original task, targets
are what the teacher wrote, with its top-k log-probs if they are stored. All
other splits and the metrics are those of the original task.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.tasks import teacher_outputs, teacher_shards


class ShardsSource(seqio.DataSource):
  """Train split from shards; the other splits from the original task's source."""

  def __init__(self, prefix: str, original_task: str, drop_cut: bool = False):
    """Makes the source; no file is read yet.

    Args:
      prefix: Of the shards; `~` and `$VARIABLE` are expanded when they are read.
      original_task: The name of the task that gives the other splits.
      drop_cut: Whether outputs that were cut are left out.
    """
    self.prefix = prefix
    self.original_task = original_task
    self.drop_cut = drop_cut
    splits = seqio.TaskRegistry.get(original_task).splits
    super().__init__(splits=("train", *(s for s in splits if s != "train")))

  @property
  def supports_arbitrary_sharding(self) -> bool:
    """False: processes read files of their own, or seqio deals out examples."""
    return False

  def num_input_examples(self, split: str) -> int | None:
    """Outputs of the teacher, None if some are dropped; or the original's."""
    if split != "train":
      return self._original.num_input_examples(split)
    if self.drop_cut:
      return None
    manifest, _ = self._shards()
    return manifest["num_examples"] * manifest["settings"]["NUM_SAMPLES"]

  def list_shards(self, split: str) -> Sequence[str]:
    """The files."""
    if split != "train":
      return self._original.list_shards(split)
    return self._shards()[1]

  def get_dataset(
    self,
    split: str = "train",
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused_kwargs,
  ) -> tf.data.Dataset:
    """Parsed records, or raw examples of the original; see `seqio.DataSource`."""
    if split != "train":
      return self._original.get_dataset(
        split=split, shuffle=shuffle, seed=seed, shard_info=shard_info
      )
    manifest, paths = self._shards()
    files = seqio.FileDataSource(
      tf.data.TFRecordDataset, {"train": list(paths)}
    )
    dataset = files.get_dataset(
      split="train", shuffle=shuffle, seed=seed, shard_info=shard_info
    )
    dataset = dataset.map(
      teacher_shards.record_parser(manifest),
      num_parallel_calls=tf.data.AUTOTUNE,
    )
    return dataset.filter(self._has_ended) if self.drop_cut else dataset

  def _has_ended(self, record):
    original = seqio.TaskRegistry.get(self.original_task)
    eos_id = original.output_features["targets"].vocabulary.eos_id
    last_is_eos = tf.reduce_any(tf.equal(record["targets"][-1:], eos_id))
    known = record["ended"] >= 0
    return tf.where(known, record["ended"] > 0, last_is_eos)

  @property
  def _original(self):
    return seqio.TaskRegistry.get(self.original_task).source

  def _shards(self):
    return teacher_shards.check_shards(
      os.path.expandvars(os.path.expanduser(self.prefix))
    )


def add_distilled_task(
  name: str, prefix: str, original_task: str, *, drop_cut: bool = False
) -> seqio.Task:
  """Registers a task that trains on a teacher's outputs in shards.

  Nothing is read before the dataset is built. Registering the same task twice
  is allowed, so that a configuration may be parsed again.

  Args:
    name: The name of the new task.
    prefix: Of the shards that `gkd infer` wrote, its OUTPUT_PATH.
    original_task: The task that the outputs were made for.
    drop_cut: Whether outputs that were cut, without EOS, are left out.

  Returns:
    The task.

  Raises:
    ValueError: If `name` is a task already, with other shards or original.
  """
  if name in seqio.TaskRegistry.names():
    task = seqio.TaskRegistry.get(name)
    known = task.source
    if isinstance(known, ShardsSource) and (
      (known.prefix, known.original_task, known.drop_cut)
      == (prefix, original_task, drop_cut)
    ):
      return task
    raise ValueError(
      f"expected a new name, got {name!r}, which is a task with another source;"
      " set name"
    )
  return teacher_outputs.add_like(
    seqio.TaskRegistry.get(original_task),
    name,
    source=ShardsSource(prefix, original_task, drop_cut),
    preprocessors=[functools.partial(_prepare, original_task=original_task)],
  )


def _prepare(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int] | None,
  output_features: Mapping[str, Any],
  *,
  original_task: str,
) -> tf.data.Dataset:
  """Tokens of the original task's examples; records are ready."""
  if "sample_number" in set(dataset.element_spec):
    return dataset
  for step in seqio.TaskRegistry.get(original_task).preprocessors:
    # seqio's own place for its cache: what is cached is another task.
    if not isinstance(step, seqio.CacheDatasetPlaceholder):
      dataset = seqio.utils.add_kwargs_to_transform(
        step, sequence_length=sequence_length, output_features=output_features
      )(dataset)
  return dataset
