"""Writes a teacher's outputs for a whole task, shard by shard.

Shard s of S has the outputs for the examples s n / S to (s + 1) n / S of the n
in the split. A restarted run skips the shards that exist, so that no output is
lost or duplicated. The random numbers of an output depend only on seed, example
and sample number, and a shard is always decoded in the same batches: it does
not depend on the shards written before or on the number of processes. Files are
equal bit for bit on the same devices with the same batch size.

Each process writes its own shards with its own devices.
"""

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from flax import traverse_util
from jax.experimental import multihost_utils

from gkd_jax import data, partitioning
from gkd_jax.data import errors
from gkd_jax.evaluation import teacher_records
from gkd_jax.tasks import teacher_shards


def write(
  model: Any,
  params: Any,
  task: seqio.Task,
  lengths: Mapping[str, int],
  prefix: str,
  shards: teacher_records.Shards,
  *,
  split: str,
  batch_size: int,
  num_examples: int | None = None,
  temperature: float = 0.0,
  use_cached: bool = False,
  seed: int = 0,
  process_index: int | None = None,
  process_count: int | None = None,
) -> int:
  """Writes the shards of this process that do not exist yet.

  Args:
    model: the teacher, with T5X's protocol.
    params: its parameters, on the host.
    task: a task, not a mixture.
    lengths: seqio feature to length in tokens.
    prefix: of the shards' paths, see `teacher_shards`; local, or `gs://`.
    shards: how they are stored.
    split: name of the split.
    batch_size: rows decoded at a time.
    num_examples: number of examples, from the first; None for all.
    temperature: 0 decodes greedily, or with the model's `decode_fn`.
    use_cached: read seqio's cache.
    seed: of sampling and of random preprocessors.
    process_index: of this process; JAX's by default.
    process_count: number of processes; JAX's by default.

  Returns:
    The number of examples in the split.

  Raises:
    ValueError: if a setting is wrong, or the existing shards have others.
  """
  index = jax.process_index() if process_index is None else process_index
  count = jax.process_count() if process_count is None else process_count
  _check(model, task, split, shards, temperature)
  _check_references(task, split, lengths, shards, use_cached)
  dataset = _dataset(
    task, lengths, model, split, num_examples, use_cached, seed
  )
  examples = functools.partial(_examples, task, split, dataset)
  settings = {
    "CHECKPOINT_PATH": fingerprint(params),
    "TASK_FEATURE_LENGTHS": dict(lengths),
    "EVAL_SPLIT": split,
    "EVAL_NUM_EXAMPLES": num_examples,
    "SEED": seed,
    **_settings(model, task, shards, temperature),
  }
  total = _begun(prefix, settings, shards, examples, model, index)
  paths = teacher_shards.shard_paths(prefix, shards.num_shards)
  mine = _missing(paths, index, count)
  if mine:
    mesh = partitioning.make_mesh(devices=jax.local_devices())
    params = jax.device_put(params, partitioning.replicated(mesh))
    size = min(batch_size, -(-total // shards.num_shards))
    for s, start, rows in _shares(examples(), total, shards.num_shards, mine):
      records = teacher_records.records(
        model,
        params,
        task,
        rows,
        shards,
        first_index=start,
        temperature=temperature,
        seed=seed,
        batch_size=size,
        mesh=mesh,
      )
      teacher_shards.write_shard(paths[s], records)
      what = f"{len(rows):,} examples from {start:,} on"
      print(f"shard {s + 1} of {len(paths)}: {what}", flush=True)
  _wait_for_others()
  return total


def _missing(paths, index, count):
  """Returns the numbers of a process's shards that do not exist yet."""
  return {
    s
    for s, path in enumerate(paths)
    if s % count == index and not tf.io.gfile.exists(path)
  }


def _wait_for_others():
  if jax.process_count() > 1:
    # A process that ends early would end the others' coordinator.
    multihost_utils.sync_global_devices("teacher_data written")


def fingerprint(params: Any) -> str:
  """Returns a checksum of parameters: names, shapes, dtypes and values."""
  code = 0
  for name, leaf in sorted(traverse_util.flatten_dict(dict(params)).items()):
    leaf = np.ascontiguousarray(leaf)
    head = f"{'/'.join(name)} {leaf.shape} {leaf.dtype}".encode()
    code = zlib.crc32(leaf.reshape(-1).view(np.uint8), zlib.crc32(head, code))
  return f"crc32:{code:08x}"


def _settings(model, task, shards, temperature):
  """Returns the settings that outputs depend on, named as their gin macros."""
  settings = {
    "MIXTURE_OR_TASK_NAME": task.name,
    "NUM_REAL_TOKENS": model.num_real_tokens,
    **{k.upper(): v for k, v in dataclasses.asdict(shards).items()},
  }
  if shards.targets == teacher_records.OUTPUTS:
    settings |= {
      "SAMPLING_TEMPERATURE": temperature,
      "DECODE_FN": _name(model.decode_fn),
      "DECODER_PARAMS": repr(
        sorted(
          (name, value)
          for name, value in model.default_decoder_params.items()
          if name != "slots"  # the outputs are the same
        )
      ),
    }
  return settings


def _check(model, task, split, shards, temperature):
  if not isinstance(task, seqio.Task):
    raise ValueError(
      f"expected one task for a teacher's data, got the mixture {task.name!r};"
      " set MIXTURE_OR_TASK_NAME"
    )
  if split not in task.splits:
    raise ValueError(
      f"expected a split of {sorted(task.splits)} of {task.name}, got"
      f" {split!r}; set EVAL_SPLIT"
    )
  size = model.num_real_tokens or model.config.vocab_size
  if shards.top_k > size:
    raise ValueError(
      f"expected TOP_K of at most {size}, the number of tokens, got"
      f" {shards.top_k}; set TOP_K"
    )
  teacher_records.check_num_samples(model, shards.num_samples, temperature)


def _check_references(task, split, lengths, shards, use_cached):
  """Refuses prompts alone where references are to be stored."""
  if shards.targets == teacher_records.REFERENCES:
    otherwise = "TARGETS = 'outputs'"
    data.check_targets(
      task, split, lengths, use_cached=use_cached, otherwise=otherwise
    )


def _name(decode_fn):
  """Returns a decode function's name and its bound arguments."""
  if isinstance(decode_fn, functools.partial):
    bound = sorted(decode_fn.keywords.items())
    return f"{_name(decode_fn.func)} {bound!r}"
  module = decode_fn.__module__
  if module.startswith("gkd_jax."):  # the public name
    module = ".".join(module.split(".")[:2])
  return f"{module}.{decode_fn.__qualname__}"


def _dataset(
  task, lengths, model, split, num_examples, use_cached, seed
) -> tf.data.Dataset:
  """Returns pairs of example and model features, in the order of the split."""
  dataset = errors.read_split(
    task, split, lengths, use_cached=use_cached, seed=seed
  )
  convert = data.feature_converter(
    model.FEATURE_CONVERTER_CLS, False, model.special_tokens
  )
  with errors.explained(task.name, split):
    if num_examples is not None:
      dataset = dataset.take(num_examples)
    return tf.data.Dataset.zip((dataset, convert(dataset, dict(lengths))))


def _examples(task, split, dataset) -> Iterator[tuple[Any, Any]]:
  """Yields the pairs of a data set."""
  with errors.explained(task.name, split):
    yield from dataset.as_numpy_iterator()


def _begun(prefix, settings, shards, examples, model, index):
  """Writes or compares the manifest, and returns the number of examples."""
  # Tuples become lists in JSON.
  settings = json.loads(json.dumps(settings))
  manifest = teacher_shards.read_manifest(prefix)
  if manifest is None and index == 0:
    total = sum(1 for _ in examples())
    if not total:
      raise ValueError(
        f"expected examples in the split {settings['EVAL_SPLIT']!r} of"
        f" {settings['MIXTURE_OR_TASK_NAME']}, got none; set EVAL_SPLIT"
      )
    storage = None
    if shards.top_k:
      storage = {
        "top_k": shards.top_k,
        "ids": "uint16" if model.config.vocab_size <= 2**16 else "int32",
        "log_probs": shards.top_k_dtype,
      }
    teacher_shards.write_manifest(
      prefix,
      {
        "settings": settings,
        "num_examples": total,
        teacher_shards.STORAGE: storage,
      },
    )
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("teacher_data begun")
  manifest = teacher_shards.read_manifest(prefix)
  if manifest is None:
    raise ValueError(
      "expected the manifest that the first process writes, got none at"
      f" {teacher_shards.manifest_path(prefix)}; set OUTPUT_PATH to a folder"
      " that all processes see"
    )
  known = manifest["settings"]
  other = [
    f"{name} {settings.get(name)!r} instead of {known.get(name)!r}"
    for name in sorted({*known, *settings})
    if settings.get(name) != known.get(name)
  ]
  if other:
    raise ValueError(
      "expected the settings that these shards were begun with"
      f" ({teacher_shards.manifest_path(prefix)}), got {', '.join(other)};"
      f" set {other[0].split()[0]}, or OUTPUT_PATH to another prefix"
    )
  return manifest["num_examples"]


def _shares(
  pairs: Iterator[tuple[Any, Any]],
  total: int,
  num_shards: int,
  wanted: set[int],
) -> Iterator[tuple[int, int, Sequence[Any]]]:
  """Yields number, index of the first example, and pairs of wanted shards.

  The examples of other shards are read and dropped.
  """
  for s in range(max(wanted) + 1):
    start, stop = s * total // num_shards, (s + 1) * total // num_shards
    share = itertools.islice(pairs, stop - start)
    if s not in wanted:
      read = sum(1 for _ in share)
      rows = []
    else:
      rows = list(share)
      read = len(rows)
    if read < stop - start:
      raise ValueError(
        f"expected {total} examples, as when these shards were begun, got"
        f" {start + read}; set OUTPUT_PATH to another prefix"
      )
    if s in wanted:
      yield s, start, rows
