"""The position of a reader in its shard of the data, saved and restored.

TensorFlow saves what an iterator holds, its shuffle buffer and batches that are
already made. It can only go on with the same pipeline, and with batches of the same
size. So a reader keeps the chunks of the size that it began with, cuts batches of
any size out of them, and saves the rows of a chunk that are left over.
"""

import io
import os
import re

import numpy as np
import tensorflow as tf

from gkd_jax import files
from gkd_jax.data import identity

_ITERATOR = "iterator"  # a prefix, of two files
_LEFT = "rows_left.npz"
_FIRST = "first_rows.json"
ANEW = (
  "SAVE_DATA_POSITION = False to begin the data anew, or another MODEL_DIR with"
  " INITIAL_CHECKPOINT_PATH = this run"
)


class ShardReader:
  """Rows of one shard of the data, without an end.

  Args:
    dataset: endless, of rows.
    chunk: rows that TensorFlow makes at a time.
  """

  def __init__(self, dataset: tf.data.Dataset, chunk: int):
    self.chunk = chunk
    self.features = {
      name: [list(spec.shape), spec.dtype.name]
      for name, spec in dataset.element_spec.items()
    }
    chunks = dataset.batch(chunk, drop_remainder=True).prefetch(2)
    self._iterator = iter(_without_autotuning(chunks))
    self._left: dict[str, np.ndarray] = {}
    self._first: str | None = None

  def peek(self, count: int) -> dict[str, np.ndarray]:
    """Returns the next `count` rows of each feature, and stays where it is."""
    while self._rows_left() < count:
      self._read()
    return {name: value[:count] for name, value in self._left.items()}

  def take(self, count: int) -> dict[str, np.ndarray]:
    """Returns the next `count` rows of each feature."""
    rows = self.peek(count)
    self._left = {name: value[count:] for name, value in self._left.items()}
    return rows

  def save(self, folder: str) -> None:
    """Writes the position into a folder.

    Raises:
      ValueError: the pipeline holds what TensorFlow cannot save.
    """
    first = self._digest_of_first()
    try:
      self._checkpoint().write(os.path.join(folder, _ITERATOR))
    except tf.errors.FailedPreconditionError as error:
      found = re.search(r"(\w+) is stateful", str(error))
      if not found:
        raise
      raise ValueError(
        "expected a data pipeline whose position can be saved, got one with"
        f" {found[1]}, which comes from from_generator, py_function,"
        " numpy_function or tf.random; set SAVE_DATA_POSITION = False to train"
        " without a position, or USE_CACHED_TASKS = True if it is ahead of the"
        " task's cache"
      ) from error
    files.write_json(os.path.join(folder, _FIRST), first)
    if self._rows_left():
      buffer = io.BytesIO()
      np.savez(buffer, **self._left)
      files.write_bytes(os.path.join(folder, _LEFT), buffer.getvalue())

  def restore(self, folder: str) -> None:
    """Goes to the position that `save` wrote.

    Raises:
      ValueError: the position is damaged, or is of another pipeline.
    """
    first = self._digest_of_first()
    saved = files.read_json(os.path.join(folder, _FIRST))
    if saved not in (None, first):
      raise _of_another_pipeline(
        folder, f"first rows of fingerprint {first} (saved with {saved})"
      )
    try:
      path = os.path.join(folder, _ITERATOR)
      self._checkpoint().read(path).assert_consumed()
      self._left = _rows_saved(folder)
      if not self._rows_left():
        # Now, since some differences of pipelines show with the next rows only.
        self._read()
    except Exception as error:
      reason = " ".join(str(error).split())[:300]
      if (damage := _damage(folder)) is not None:
        raise ValueError(
          f"expected a whole position of the data, got {damage} in {folder}; set"
          " SAVE_DATA_POSITION = False to begin the data anew, or move this"
          " checkpoint out of MODEL_DIR to go on from the one before"
        ) from error
      raise _of_another_pipeline(folder, reason) from error

  def _checkpoint(self):
    return tf.train.Checkpoint(iterator=self._iterator)

  def _rows_left(self):
    return len(next(iter(self._left.values()), ()))

  def _read(self):
    """Appends a chunk to the rows that are left."""
    chunk = {name: v.numpy() for name, v in next(self._iterator).items()}
    if any(len(value) != self.chunk for value in chunk.values()):
      raise ValueError(
        f"expected chunks of {self.chunk} rows, got another size"
      )
    if self._first is None:
      self._first = identity.digest(chunk)
    if self._rows_left():
      old = self._left
      chunk = {k: np.concatenate([old[k], v]) for k, v in chunk.items()}
    self._left = chunk

  def _digest_of_first(self) -> str:
    """Returns the digest of the first chunk of the pipeline."""
    if self._first is None:
      self._read()
    assert self._first is not None
    return self._first


def _of_another_pipeline(folder, reason):
  return ValueError(
    f"expected the pipeline that the position in {folder} was saved with, got"
    f" another one ({reason}); set the task as it was, or {ANEW}"
  )


def _rows_saved(folder: str) -> dict[str, np.ndarray]:
  """Returns the rows that were left over when the position was saved."""
  left = files.absolute(os.path.join(folder, _LEFT))
  return dict(np.load(io.BytesIO(left.read_bytes()))) if left.exists() else {}


def _damage(folder: str) -> str | None:
  """Returns what is wrong with the files of a position, None if they are whole."""
  try:
    _rows_saved(folder)
    prefix = os.path.join(folder, _ITERATOR)
    types = tf.train.load_checkpoint(prefix).get_variable_to_dtype_map()
    names = sorted(types)
    # Not by the reader, which knows no variants.
    tf.raw_ops.RestoreV2(
      prefix=prefix,
      tensor_names=names,
      shape_and_slices=[""] * len(names),
      dtypes=[types[name] for name in names],
    )
  except Exception as error:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
  return None


def _without_autotuning(dataset):
  """Returns the pipeline without autotuning, so that it stops at once.

  An iterator that is replaced or deleted waits for TensorFlow's tuning thread, on
  one core for up to minutes. Without it a parallel map has one call per core.
  """
  options = tf.data.Options()
  options.autotune.enabled = False
  return dataset.with_options(options)
