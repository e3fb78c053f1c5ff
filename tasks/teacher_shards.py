"""The files of a teacher's outputs: TFRecord shards and their manifest.

`PREFIX-00000-of-00008` etc. contain one `tf.train.Example` per output, and
`PREFIX-manifest.json` the settings they were made with. Files are written whole
or not at all, on a local disk or in a bucket.

| feature                | content                                           |
|------------------------|---------------------------------------------------|
| `inputs`, `targets`    | token ids as the teacher read and wrote them; one |
|                        | that was cut has no EOS                           |
| `*_pretokenized`       | their texts, decoded by the vocabularies          |
| `score`                | log-prob of the output in nats, or a beam's score |
| `ended`                | 1, or 0 for an output that was cut, without EOS   |
| `example_index`        | index of the example in the split                 |
| `sample_number`        | 0 to N - 1 for the N outputs of an input          |
| `top_k_ids`            | optional: the teacher's top k tokens at each      |
|                        | target, `[targets, k]`, raw bytes                 |
| `top_k_log_probs`      | their log-probs and that of all other tokens      |
|                        | together, `[targets, k + 1]`, raw bytes           |
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

FORMAT = "gkd_jax teacher outputs 1"

_TOKENS = ("inputs", "targets")
_TEXTS = ("inputs_pretokenized", "targets_pretokenized")
_NUMBERS = ("example_index", "sample_number")
_TOP_K = ("top_k_ids", "top_k_log_probs")
# The key of the manifest with the dtypes of the top-k features.
STORAGE = "top_k_storage"


def shard_paths(prefix: str, num_shards: int) -> list[str]:
  """Returns the paths of all shards.

  >>> shard_paths("out/xsum", 2)
  ['out/xsum-00000-of-00002', 'out/xsum-00001-of-00002']
  """
  return [f"{prefix}-{i:05d}-of-{num_shards:05d}" for i in range(num_shards)]


def manifest_path(prefix: str) -> str:
  """Returns the path of the manifest."""
  return f"{prefix}-manifest.json"


def read_manifest(prefix: str) -> dict[str, Any] | None:
  """Reads the manifest; None if there is none.

  Raises:
    ValueError: if the file is not a manifest.
  """
  path = manifest_path(prefix)
  if not tf.io.gfile.exists(path):
    return None
  with tf.io.gfile.GFile(path) as file:
    text = file.read()
  try:
    manifest = json.loads(text)
    known = manifest["format"] == FORMAT
  except (ValueError, KeyError, TypeError):
    manifest, known = {}, False
  if not known:
    raise ValueError(
      f"expected a manifest of format {FORMAT!r}, got {text[:80]!r} in {path};"
      " set the path to a prefix of shards that `gkd infer` wrote"
    )
  # Before version 0.2 the fourth key had another name.
  (key,) = manifest.keys() - {"format", "settings", "num_examples"}
  manifest[STORAGE] = manifest.pop(key)
  return manifest


def write_manifest(prefix: str, manifest: Mapping[str, Any]):
  """Writes the manifest.

  Args:
    prefix: of the paths; folders are made.
    manifest: `settings`, `num_examples`, and `STORAGE`: None, or
      `{"top_k", "ids", "log_probs"}`, k and the dtype names of the two features.
  """
  tf.io.gfile.makedirs(os.path.dirname(prefix) or ".")
  text = json.dumps({"format": FORMAT} | dict(manifest), indent=2)

  def write(path):
    with tf.io.gfile.GFile(path, "w") as file:
      file.write(text + "\n")

  _whole(manifest_path(prefix), write)


def write_shard(path: str, records: Iterable[Mapping[str, Any]]):
  """Writes a shard, whole or not at all.

  Args:
    path: one of `shard_paths`.
    records: feature to value, see the table; the top-k arrays have the dtypes of
      the manifest.
  """

  def write(temporary):
    with tf.io.TFRecordWriter(temporary) as writer:
      for record in records:
        writer.write(_serialized(record))

  _whole(path, write)


def record_parser(
  manifest: Mapping[str, Any],
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
  """Returns a parser of the records of a manifest's shards.

  Returns:
    A function from a serialized example `[]` to its features: tokens and top-k
    ids int32, log-probs float32, whatever dtypes are stored.
  """
  spec = {
    **{k: tf.io.VarLenFeature(tf.int64) for k in _TOKENS},
    **{k: tf.io.FixedLenFeature([], tf.string) for k in _TEXTS},
    **{k: tf.io.FixedLenFeature([], tf.int64) for k in _NUMBERS},
    "score": tf.io.FixedLenFeature([], tf.float32),
    # -1: not known, of shards that were written before there was this feature.
    "ended": tf.io.FixedLenFeature([], tf.int64, default_value=-1),
  }
  storage = manifest[STORAGE]
  if storage:
    spec |= {k: tf.io.FixedLenFeature([], tf.string) for k in _TOP_K}

  def parse(serialized):
    features = dict(tf.io.parse_single_example(serialized, spec))
    for name in _TOKENS:
      features[name] = tf.cast(tf.sparse.to_dense(features[name]), tf.int32)
    if storage:
      for name, stored, dtype, width in (
        (_TOP_K[0], storage["ids"], tf.int32, storage["top_k"]),
        (_TOP_K[1], storage["log_probs"], tf.float32, storage["top_k"] + 1),
      ):
        flat = tf.io.decode_raw(features[name], tf.as_dtype(stored))
        features[name] = tf.cast(tf.reshape(flat, [-1, width]), dtype)
    return features

  return parse


def _serialized(record):
  features = {}
  for name, value in record.items():
    if name in _TOP_K:
      # `decode_raw` reads little-endian.
      value = np.asarray(value)
      raw = value.astype(value.dtype.newbyteorder("<")).tobytes()
      features[name] = _bytes(raw)
    elif name in _TEXTS:
      features[name] = _bytes(value.encode())
    elif name == "score":
      values = tf.train.FloatList(value=[float(value)])
      features[name] = tf.train.Feature(float_list=values)
    else:
      values = tf.train.Int64List(value=np.atleast_1d(value))
      features[name] = tf.train.Feature(int64_list=values)
  example = tf.train.Example(features=tf.train.Features(feature=features))
  return example.SerializeToString(deterministic=True)


def _bytes(value):
  return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def _whole(path: str, write: Callable[[str], None]):
  """Writes a temporary file and renames it.

  In a bucket too: a `TFRecordWriter` that is interrupted by an exception uploads
  what it has.
  """
  # Left by a process that was killed while it wrote this file.
  for left in tf.io.gfile.glob(f"{path}.tmp-*"):
    tf.io.gfile.remove(left)
  temporary = f"{path}.tmp-{os.getpid()}"
  write(temporary)
  if "://" not in path:
    # A renamed file must not turn out empty after a power failure.
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())
  tf.io.gfile.rename(temporary, path, overwrite=True)


def check_shards(prefix: str) -> tuple[dict[str, Any], Sequence[str]]:
  """Returns the manifest and the paths of the shards, which all exist.

  Args:
    prefix: of the paths.

  Raises:
    ValueError: if there is no manifest, or a shard is missing.
  """
  manifest = read_manifest(prefix)
  if manifest is None:
    raise ValueError(
      f"expected shards of a teacher's outputs, got {prefix!r} without"
      f" {manifest_path(prefix)}; set TEACHER_DATA_PATH"
    )
  paths = shard_paths(prefix, manifest["settings"]["NUM_SHARDS"])
  missing = [p for p in paths if not tf.io.gfile.exists(p)]
  if missing:
    raise ValueError(
      f"expected {len(paths)} shards at {prefix!r}, got"
      f" {len(paths) - len(missing)}; run `gkd infer` again to finish them, or"
      " set TEACHER_DATA_PATH"
    )
  return manifest, paths
