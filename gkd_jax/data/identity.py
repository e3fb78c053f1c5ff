"""What identifies the data of a run: settings, and fingerprints of the sources.

A position in the data means something only for the data that it was saved with: a
shuffle buffer holds examples, and the seed is spent. So the identity is saved
beside the position and compared when the run goes on.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

_READ_WHOLE = 2**30  # bytes of a task's files; of more, blocks are read
_BLOCK = 2**16
_ROWS = 100_000  # of a source that is no files


def sources(
  task: Any, split: str, use_cached: bool = False
) -> dict[str, dict[str, Any]]:
  """Returns a fingerprint of the source of each task of a mixture.

  Files are known by size and content: all of it up to a gigabyte in all, else
  blocks that are spread over each file. Other sources are read: the first rows
  of each, 100,000 in all.

  Args:
    task: from `load_task`.
    split: name of the split.
    use_cached: whether seqio's cache is the source.

  Returns:
    Task name to `{"rate": ..., path: [bytes, digest], ...}` or `{"rate": ...,
    "rows": [rows, digest]}`, which JSON can hold.
  """
  tasks = seqio.get_subtasks(task)
  found = {sub.name: _files(sub, split, use_cached) for sub in tasks}
  sizes = {f: tf.io.gfile.stat(f).length for x in found.values() for f in x}
  share = min(1.0, _READ_WHOLE / max(1, sum(sizes.values())))
  result = {}
  for sub in tasks:
    result[sub.name] = {"rate": _rate(task, sub)} | {
      name: [sizes[name], _digest_of_file(name, sizes[name], share)]
      for name in found[sub.name]
    }
    if not found[sub.name]:
      rows = max(1000, _ROWS // len(tasks))
      dataset = sub.source.get_dataset(split, shuffle=False).take(rows)
      result[sub.name]["rows"] = _digest_of_rows(dataset)
  return result


def digest(features: Mapping[str, Any]) -> str:
  """Returns a digest of arrays: names, types, shapes and values."""
  hashed = hashlib.sha256()
  for name in sorted(features):
    value = features[name]
    hashed.update(f"{name} {value.dtype} {value.shape}".encode())
    hashed.update(value.tobytes())
  return hashed.hexdigest()[:16]


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Returns what differs between two identities, in words, with both values.

  Args:
    saved: name of a setting to its value; "sources" to those of `sources`,
      "features" to shapes, which follow from the settings for the most part.
    now: the same.
  """
  settings = [name for name in now if name not in ("sources", "features")]
  found = _of_values(saved, now, settings)
  before, after = saved["sources"], now["sources"]
  for task in sorted({*before, *after}):
    a, b = before.get(task, {}), after.get(task, {})
    for part in sorted({*a, *b}):
      if a.get(part) != b.get(part):
        found.append(
          f"{task}: {_of_source(part, b.get(part))}"
          f" (saved with {_of_source(part, a.get(part))})"
        )
  return found or _of_values(saved, now, ["features"])


def _of_values(saved, now, names):
  return [
    f"{name} = {now[name]!r} (saved with {saved[name]!r})"
    for name in names
    if name in saved and saved[name] != now[name]
  ]


def _of_source(part, value):
  if value is None:
    return f"no {part}"
  if part == "rate":
    return f"rate {value}"
  count, fingerprint = value
  if part == "rows":
    return f"{count:,} rows with fingerprint {fingerprint}"
  return f"{part} of {count:,} bytes with fingerprint {fingerprint}"


def _files(task, split, use_cached) -> list[str]:
  """Returns the files of a task's source, as far as it has any."""
  if use_cached and task.cache_dir:
    return tf.io.gfile.glob(os.path.join(task.cache_dir, f"{split}.*"))
  paths = sorted(os.fspath(p) for p in task.source.list_shards(split))
  # Of a source that is no files, seqio names the split.
  return [p for p in paths if os.path.dirname(p) and tf.io.gfile.exists(p)]


def _rate(task, sub):
  return 1.0 if task is sub else float(task.get_rate(sub))


def _digest_of_file(path: str, size: int, share: float) -> str:
  hashed = hashlib.sha256()
  blocks = -(-size // _BLOCK)
  chosen = max(1, int(blocks * share))
  with tf.io.gfile.GFile(path, "rb") as file:
    for i in range(chosen):
      file.seek(i * blocks // chosen * _BLOCK)
      hashed.update(file.read(_BLOCK))
  return hashed.hexdigest()[:16]


def _digest_of_rows(dataset: tf.data.Dataset) -> list[Any]:
  """Returns the number of rows, and a digest that depends on their order."""

  def hashes(*row):
    values = tf.nest.flatten(row, expand_composites=True)
    texts = tf.stack([tf.io.serialize_tensor(value) for value in values])
    return tf.strings.to_hash_bucket_fast(texts, 2**62)

  # A polynomial in the hashes, modulo 2**64 as arrays of NumPy are.
  factor, count, total = np.uint64(1_000_003), 0, np.zeros(1, np.uint64)
  blocks = dataset.map(hashes, num_parallel_calls=tf.data.AUTOTUNE).batch(1024)
  for block in blocks.as_numpy_iterator():
    powers = factor ** np.arange(block.size + 1, dtype=np.uint64)
    terms = block.astype(np.uint64).ravel() * powers[-2::-1]
    count, total = count + len(block), total * powers[-1] + terms.sum()
  return [count, f"{int(total[0]):016x}"]
