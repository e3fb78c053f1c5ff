"""Batches of numpy arrays from a seqio task, with a position that can be saved."""

import difflib
import functools
import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from jax.experimental import multihost_utils

from gkd_jax import checks, files, types
from gkd_jax.data import (
  errors,
  feature_converters,
  identity,
  optional_targets,
  positions,
  shards,
  vocabularies,
)
from gkd_jax.tasks import distilled

_SHIPPED = ("arithmetic", "bbh", "flan", "g2p", "gsm8k", "mmlu", "wmt", "xsum")
_RECORD = "position.json"
SHIPPED_TASKS = tuple(f"gkd_jax.tasks.{name}" for name in _SHIPPED)


def load_task(
  name: str,
  module: str | None = None,
  *,
  setting: str = "MIXTURE_OR_TASK_NAME",
) -> Any:
  """Returns a copy of a seqio task or mixture whose examples may lack targets.

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
  return optional_targets.allow(seqio.get_mixture_or_task(name))


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
  drop_cut: bool = False,
) -> str:
  """Registers the task of a teacher's outputs and returns its name, for gin.

  Args:
    prefix: of the shards that `gkd infer` wrote, its OUTPUT_PATH.
    original_task: the task that the outputs were made for.
    module: Python module that registers it, imported first.
    name: of the new task; by default the original's and "_distilled".
    drop_cut: leave out outputs that were cut; otherwise they train without EOS.

  Returns:
    The name of the new task.

  Raises:
    ValueError: the original is no task, or the name is one already.
  """
  checks.path(prefix, "TEACHER_DATA_PATH")
  checks.text(original_task, "ORIGINAL_TASK")
  checks.boolean(drop_cut, "DROP_CUT_OUTPUTS")
  prefix = files.expanded(prefix)
  original = load_task(original_task, module, setting="ORIGINAL_TASK")
  if not isinstance(original, seqio.Task):
    raise ValueError(
      f"expected a task, got the mixture {original_task!r}; set ORIGINAL_TASK"
    )
  name = name or f"{original_task}_distilled"
  return distilled.add_distilled_task(
    name, prefix, original_task, drop_cut=drop_cut
  ).name


def feature_converter(
  cls: Any,
  pack: bool,
  special_tokens: types.SpecialTokens = types.T5_TOKENS,
) -> seqio.FeatureConverter:
  """Returns the converter from a task's features to a model's.

  Args:
    cls: a model's `FEATURE_CONVERTER_CLS`: a name in `feature_converters` or in
      seqio, or a class.
    pack: several examples in a row.
    special_tokens: the model's.
  """
  if isinstance(cls, str):
    cls = getattr(feature_converters, cls, None) or getattr(seqio, cls)
  start = special_tokens.start
  if not special_tokens.zero_is_padding:
    # It raises each id by one.
    cls = feature_converters.for_prompts(cls, start + 1 if start else 0)
    return feature_converters.ZeroIsToken(cls(pack=pack, bos_id=start + 1))
  cls = feature_converters.for_prompts(cls, start)
  return cls(pack=pack, bos_id=start) if start else cls(pack=pack)


def feature_lengths(
  cls: Any,
  task_feature_lengths: Mapping[str, int],
  pack: bool,
  special_tokens: types.SpecialTokens = types.T5_TOKENS,
) -> dict[str, int]:
  """Returns the lengths of a batch's features `[B, length]`; reads no data.

  Args:
    cls: see `feature_converter`.
    task_feature_lengths: seqio feature to length.
    pack: see `feature_converter`.
    special_tokens: see `feature_converter`.
  """
  converter = feature_converter(cls, pack, special_tokens)
  return dict(converter.get_model_feature_lengths(dict(task_feature_lengths)))


class TrainIterator:
  """Endless batches: a process's share of a training split.

  Its position can be saved, and restored with another number of processes or
  another batch size (`checkpoints.SavableIterator`). What identifies the data is
  saved beside it.

  Args:
    task: from `load_task`.
    lengths: seqio feature to length.
    batch_size: of all processes together.
    seed: of the shuffle.
    converter: a model's `FEATURE_CONVERTER_CLS`.
    special_tokens: the model's; by default those of the task's vocabulary.
    pack: several examples in a row.
    share: what this process reads; by default one shard, all rows.
    use_cached: read seqio's cache.
    split: name of the split.
    save_position: if False, saving and restoring the state do nothing.
  """

  def __init__(
    self,
    task: Any,
    lengths: Mapping[str, int],
    batch_size: int,
    *,
    seed: int,
    converter: Any = "EncDecFeatureConverter",
    special_tokens: types.SpecialTokens | None = None,
    pack: bool = False,
    share: shards.Share | None = None,
    use_cached: bool = False,
    split: str = "train",
    save_position: bool = True,
  ):
    checks.lengths(lengths, "TASK_FEATURE_LENGTHS")
    errors.check_source(task, split, use_cached=use_cached)
    self._reading = functools.partial(errors.explained, task.name, split)
    if share is None:
      share = shards.Share(1, (0,), (0,), np.arange(batch_size))
    if special_tokens is None:
      special_tokens = vocabularies.special_tokens(task)
    self._share, self._batch_size = share, batch_size
    self._save_position = save_position
    self._examples: int | None = 0
    self._settings = {
      "MIXTURE_OR_TASK_NAME": task.name,
      "TASK_FEATURE_LENGTHS": dict(lengths),
      "SEED": seed,
      "PACK": pack,
      "USE_CACHED_TASKS": use_cached,
    }
    self._sources = lambda: _sources(task, split, use_cached)
    self._dataset = lambda shard: seqio.get_dataset(
      mixture_or_task_name=task,
      task_feature_lengths=dict(lengths),
      feature_converter=feature_converter(converter, pack, special_tokens),
      dataset_split=split,
      use_cached=use_cached,
      shuffle=True,
      num_epochs=None,
      shard_info=seqio.ShardInfo(shard, share.count),
      seed=seed,
    )
    self._rows = batch_size // share.count
    with self._reading():
      self._open(self._rows)

  def __next__(self) -> dict[str, np.ndarray]:
    with self._reading():
      blocks = [reader.take(self._rows) for reader in self._readers]
    if self._examples is not None:
      self._examples += self._batch_size
    return self._joined(blocks)

  def peek(self) -> dict[str, np.ndarray]:
    """Returns the batch that comes next, and stays where it is."""
    with self._reading():
      return self._joined([reader.peek(self._rows) for reader in self._readers])

  def _joined(self, blocks):
    """Returns this process's rows of its shards' blocks."""
    return {
      k: np.concatenate([b[k] for b in blocks])[self._share.rows]
      for k in blocks[0]
    }

  def save_state(self, path: str | os.PathLike[str]) -> None:
    """Writes the positions of the shards that this process owns into `path`.

    Raises:
      ValueError: see `positions.ShardReader.save`.
    """
    if not self._save_position:
      return
    for reader, shard, folder in self._each(path):
      if shard in self._share.owned:
        tf.io.gfile.mkdir(folder)
        with self._reading():  # the first rows, if none were read
          reader.save(folder)
    if jax.process_index() == 0:
      files.write_json(
        os.path.join(path, _RECORD),
        {
          "examples": self._examples,
          "chunk": self._readers[0].chunk,
          "identity": self._identity(),
        },
      )

  def restore_state(self, path: str | os.PathLike[str]) -> None:
    """Goes to the position that `save_state` wrote, in all processes.

    Raises:
      ValueError: the position is of other data, or damaged.
    """
    if not self._save_position:
      return
    # Positions of older versions have no record.
    record = files.read_json(os.path.join(path, _RECORD)) or {}
    identity_now = self._identity()
    saved = record.get("identity", identity_now)
    if found := identity.differences(saved, identity_now):
      raise ValueError(
        f"expected the data of the position in {os.fspath(path)}, got"
        f" {', '.join(found)}; set these as they were, or {positions.ANEW}"
      )
    chunk = record.get("chunk", self._rows)
    if chunk != self._readers[0].chunk:
      self._open(chunk)
    for reader, _, folder in self._each(path):
      reader.restore(folder)
    self._examples = record.get("examples")

  def _open(self, chunk):
    self._readers = [
      positions.ShardReader(self._dataset(shard), chunk)
      for shard in self._share.shards
    ]

  def _identity(self):
    with self._reading():
      sources = self._sources()
    return self._settings | {
      "features": self._readers[0].features,
      "sources": sources,
    }

  def _each(self, path):
    """Reader, number and folder of each shard that this process reads."""
    names = [shards.folder(s, self._share.count) for s in self._share.shards]
    folders = [os.path.join(path, name) for name in names]
    return zip(self._readers, self._share.shards, folders, strict=True)


# A run may make several iterators of a task.
_sources = functools.lru_cache(maxsize=4)(identity.sources)


def try_saving(iterator: Any) -> None:
  """Saves an iterator's state once, into a folder that is deleted again.

  Args:
    iterator: a `checkpoints.SavableIterator`.

  Raises:
    ValueError: its position cannot be saved.
  """
  with tempfile.TemporaryDirectory() as folder:
    iterator.save_state(folder)


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
    return self._cut(next(self._iterator))

  def peek(self) -> dict[str, np.ndarray]:
    """Returns the batch that comes next, and stays where it is."""
    return self._cut(self._iterator.peek())

  def _cut(self, batch):
    cut = {k: batch[k] for k in (_INPUTS, types.INPUT_MASK) if k in batch}
    longest = _longest(cut.get(types.INPUT_MASK, batch[_INPUTS]))
    place = np.searchsorted(self._lengths, longest)
    if jax.process_count() > 1:
      place = np.max(multihost_utils.process_allgather(place))
    length = self._lengths[int(place)]
    return batch | {k: x[:, :length] for k, x in cut.items()}

  def save_state(self, path: str | os.PathLike[str]) -> None:
    """Writes the iterator's position into `path`."""
    self._iterator.save_state(path)

  def restore_state(self, path: str | os.PathLike[str]) -> None:
    """Goes to the position that `save_state` wrote."""
    self._iterator.restore_state(path)


def _longest(mask):
  """Returns the length of the longest row of `[B, S]`, 0 after its end."""
  used = np.flatnonzero(mask.any(axis=0))
  return used[-1] + 1 if used.size else 0
