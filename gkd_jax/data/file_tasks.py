"""A seqio task of a user's files, made from settings alone."""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from gkd_jax import checks, files
from gkd_jax.data import row_files, row_texts, tokenizer_folders
from gkd_jax.tasks import preprocessors, sources, text_metrics

Files = str | Sequence[str] | None

_METRICS = {
  "exact": text_metrics.exact_match,
  "rouge": text_metrics.rouge,
  "bleu": text_metrics.bleu,
  "chrf": text_metrics.chrf,
}
_SHOWN = 5  # bad lines that a message names


@dataclasses.dataclass(frozen=True)
class _Settings:
  files: tuple[tuple[str, tuple[str, ...]], ...]
  form: row_texts.RowForm
  lengths: tuple[tuple[str, int], ...]
  validation_fraction: float
  bad_lines: str
  long_lines: str


def task_of_files(
  train_files: Files = None,
  validation_files: Files = None,
  test_files: Files = None,
  *,
  task_feature_lengths: Mapping[str, int],
  input_field: str = "inputs",
  target_field: str | None = "targets",
  prompt_template: str | None = None,
  chat: bool = False,
  metrics: Sequence[str | Callable[..., Any]] = ("rouge",),
  vocabulary_path: str | None = None,
  student_path: str | None = None,
  teacher_path: str | None = None,
  validation_fraction: float = 0.05,
  bad_lines: str = "refuse",
  long_lines: str = "skip",
) -> str:
  """Registers a task of files and returns its name, for gin.

  Nothing is read yet but tokenizers; the files are read, and their texts
  tokenized, when the task is first used. What is not read is a row: an example is
  a prompt and its answer, or a prompt alone where the rows have no answers.

  Args:
    train_files: paths or globs of `.jsonl`, `.csv`, `.tsv` or `.parquet`.
    validation_files: of the split `validation`.
    test_files: of the split `test`.
    task_feature_lengths: seqio feature to length in tokens.
    input_field: see `row_texts.RowForm`.
    target_field: see `row_texts.RowForm`.
    prompt_template: see `row_texts.RowForm`.
    chat: see `row_texts.RowForm`.
    metrics: names (exact, rouge, bleu, chrf), or functions as seqio has them.
    vocabulary_path: folder or file of the tokenizer; by default that of the
      student's checkpoint, else of the teacher's.
    student_path: the student's checkpoint.
    teacher_path: the teacher's checkpoint.
    validation_fraction: share of the train rows that are the validation split,
      where no files are; 0: there is none.
    bad_lines: "refuse" or "skip" rows that cannot be read.
    long_lines: "skip", "refuse" or "cut" rows of more tokens than the lengths.

  Raises:
    ValueError: a setting is wrong, or there is no tokenizer.
  """
  given = {
    "train": _patterns(train_files, "TRAIN_FILES"),
    "validation": _patterns(validation_files, "VALIDATION_FILES"),
    "test": _patterns(test_files, "TEST_FILES"),
  }
  if not any(given.values()):
    raise ValueError(
      "expected files of rows or a task, got neither; set TRAIN_FILES or"
      " MIXTURE_OR_TASK_NAME"
    )
  checks.lengths(task_feature_lengths, "TASK_FEATURE_LENGTHS")
  checks.text(input_field, "INPUT_FIELD")
  checks.text(target_field, "TARGET_FIELD", none=True)
  checks.text(prompt_template, "PROMPT_TEMPLATE", none=True)
  checks.boolean(chat, "CHAT")
  checks.number(validation_fraction, "VALIDATION_FRACTION", least=0, below=1)
  checks.path(vocabulary_path, "VOCABULARY_PATH", none=True)
  functions = _metrics(metrics)
  checks.one_of(bad_lines, "BAD_LINES", ("refuse", "skip"))
  checks.one_of(long_lines, "LONG_LINES", ("skip", "refuse", "cut"))
  settings = _Settings(
    tuple((split, paths) for split, paths in given.items() if paths),
    row_texts.RowForm(input_field, target_field, prompt_template, chat),
    tuple(sorted(task_feature_lengths.items())),
    float(validation_fraction),
    bad_lines,
    long_lines,
  )
  vocabulary = tokenizer_folders.vocabulary(
    vocabulary_path, student_path, teacher_path
  )
  return _registered(settings, vocabulary, functions)


def _registered(settings, vocabulary, metrics):
  """Returns the name of the task; the same settings have one name."""
  identity = tokenizer_folders.fingerprint(vocabulary)
  text = repr((settings, identity, [m.__name__ for m in metrics]))
  first = settings.files[0][1][0]
  stem = re.sub(r"\W+", "_", files.absolute(first).stem, flags=re.ASCII)
  name = f"{stem.strip('_') or 'rows'}.{hashlib.sha256(text.encode()).hexdigest()[:8]}"
  if name in seqio.TaskRegistry.names():
    return name
  feature = functools.partial(seqio.Feature, vocabulary)
  seqio.TaskRegistry.add(
    name,
    source=FilesSource(settings, vocabulary),
    preprocessors=[_as_ids],
    output_features={"inputs": feature(), "targets": feature(required=False)},
    postprocess_fn=preprocessors.whole_target,
    metric_fns=metrics,
  )
  return name


class FilesSource(sources.ColumnsDataSource):
  """Rows of files as token ids, read when they are first asked for.

  Args:
    settings: of the task.
    vocabulary: of inputs and targets.
  """

  def __init__(self, settings: _Settings, vocabulary: seqio.Vocabulary):
    self._settings, self._vocabulary = settings, vocabulary
    self._said = False
    self._rows: dict[str, tuple[list[row_files.Stamp], sources.Columns]] = {}
    self._files = dict(settings.files)
    splits = [*self._files]
    self._shared = (
      "train" in splits
      and "validation" not in splits
      and settings.validation_fraction > 0
    )
    if self._shared:
      splits.append("validation")
    super().__init__(self._load, splits)

  def _load(self, split: str) -> sources.Columns:
    if not self._shared or split == "test":
      return self._read(split)
    columns = self._read("train")
    held = _held_out(columns, self._settings.validation_fraction)
    chosen = np.flatnonzero(held == (split == "validation"))
    return {name: values[chosen] for name, values in columns.items()}

  def _read(self, split):
    """Returns all rows of a split's files, read again if a file has changed."""
    paths = row_files.find(self._files[split], f"{split.upper()}_FILES")
    stamps = [row_files.stamp(path) for path in paths]
    if split not in self._rows or self._rows[split][0] != stamps:
      self._rows[split] = stamps, self._read_files(split, paths)
    return self._rows[split][1]

  def _read_files(self, split, paths):
    kept, bad, long = [], [], []
    total = 0
    for path in paths:
      for row in row_files.read(path):
        total += 1
        example = self._example(row, bad)
        if example is not None and self._fits(example, row.place, long):
          kept.append(example)
    self._report(bad, total, "can be read", "BAD_LINES", "skip")
    self._report(long, total, "fit", "LONG_LINES", "cut")
    with_answer = [e["targets"] is not None for e in kept]
    if any(with_answer) and not all(with_answer):
      wrong = [e["place"] for e in kept if e["targets"] is None]
      lines = [(place, "no answer") for place in wrong]
      self._report(lines, total, "have an answer", "BAD_LINES", "skip")
      kept = [e for e in kept if e["targets"] is not None]
    if not kept:
      fields = ", INPUT_FIELD or PROMPT_TEMPLATE" if bad else ""
      raise ValueError(
        f"expected rows of {split!r} that can be used, got none of {total} in"
        f" {', '.join(map(str, paths))}; set {split.upper()}_FILES{fields}"
      )
    target = self._settings.form.target_field
    if target and not any(with_answer):
      print(
        f"prompts alone: none of {total:,} rows of {split!r} has an answer in"
        f" {target!r} or 'completion'; set TARGET_FIELD, or None if that is meant",
        flush=True,
      )
    self._say_if_plain(kept)
    names = ["inputs", "inputs_pretokenized"]
    if any(with_answer):
      names += ["targets", "targets_pretokenized"]
    return {
      name: np.array([e[name] for e in kept], dtype=object) for name in names
    }

  def _example(self, row, bad):
    """Returns a row's ids and texts, as bytes; None of a bad row."""
    problem = row.problem
    if not problem:
      try:
        prompt, answer = row_texts.prompt_and_answer(
          row.fields, self._settings.form
        )
        is_text = isinstance(prompt, str)
        # A field of this name beside a text is none of ours.
        tools = None if is_text else row_texts.tools(row.fields)
        return _encoded(self._vocabulary, prompt, answer, tools) | {
          "place": row.place,
          "is_text": is_text,
        }
      except row_texts.BadRow as error:
        problem = str(error)
    bad.append((row.place, problem))
    return None

  def _say_if_plain(self, examples):
    """Says once that texts are not put in the chat template that there is."""
    template = getattr(self._vocabulary, "chat_template", None)
    if template and not self._said and any(e["is_text"] for e in examples):
      self._said = True
      print(
        "prompts are used as they are; set CHAT = True to put them in the chat"
        f" template of {os.path.dirname(self._vocabulary.path)}",
        flush=True,
      )

  def _fits(self, example, place, long):
    over = [
      f"{count} tokens of {name}, of {length}"
      for name, length in self._settings.lengths
      if example.get(name) and (count := len(example[name]) // 4) > length
    ]
    if over:
      long.append((place, ", ".join(over)))
    return not over or self._settings.long_lines == "cut"

  def _report(self, lines, total, what, setting, other):
    """Prints the lines that are left out, or refuses them."""
    if not lines:
      return
    shown = _by_reason(lines)
    chosen = getattr(self._settings, setting.lower())
    if chosen == "refuse":
      mend = f"mend the files, or set {setting} = '{other}'"
      if setting == "LONG_LINES":
        mend = f"set TASK_FEATURE_LENGTHS, or {setting} = '{other}'"
      elif len(lines) == total:
        mend = "set INPUT_FIELD, TARGET_FIELD or PROMPT_TEMPLATE"
        if "(no field " not in shown:
          mend = f"mend the files, or {mend}"
      raise ValueError(
        f"expected rows that {what}, got {len(lines):,} of {total:,} that do"
        f" not: {shown}; {mend}"
      )
    done = "cut" if chosen == "cut" else "left out"
    print(f"{done}: {len(lines):,} of {total:,} rows: {shown}", flush=True)


def _by_reason(lines):
  """Returns (place, reason) of lines as text, each reason once."""
  groups: dict[tuple[str, str], list[str]] = {}
  for place, reason in lines[:_SHOWN]:
    path, _, number = place.rpartition(":")
    groups.setdefault((path, reason), []).append(number)
  shown = ", ".join(
    f"{path}:{numbers[0]} ({reason})"
    if len(numbers) == 1
    else f"{path}, lines {', '.join(numbers)} ({reason})"
    for (path, reason), numbers in groups.items()
  )
  more = len(lines) - _SHOWN
  return shown if more <= 0 else f"{shown} and {more:,} more"


def _encoded(vocabulary, prompt, answer, tools=None):
  """Returns ids of prompt and answer as bytes of int32, and their texts."""
  if isinstance(prompt, str):
    ids = _prompt_ids(vocabulary, prompt)
    target_ids = None
    if answer is not None:
      target_ids = [*vocabulary.encode(answer), *_eos(vocabulary)]
  else:
    if getattr(vocabulary, "chat_template", None) is None:
      raise ValueError(
        "expected a tokenizer.json with a chat template for rows of messages, got"
        f" {vocabulary}; set VOCABULARY_PATH"
      )
    try:
      ids, target_ids = vocabulary.encode_exchange(prompt, answer, tools)
    except ValueError as error:
      raise row_texts.BadRow(str(error)) from error
    prompt = json.dumps(prompt, ensure_ascii=False)
    if isinstance(answer, Mapping):  # tool calls, as the template writes them
      answer = vocabulary.decode(target_ids)
  as_bytes = lambda x: None if x is None else np.asarray(x, "<i4").tobytes()
  return {
    "inputs": as_bytes(ids),
    "inputs_pretokenized": prompt.encode(),
    "targets": as_bytes(target_ids),
    "targets_pretokenized": None if answer is None else answer.encode(),
  }


def _prompt_ids(vocabulary, text):
  if hasattr(vocabulary, "with_special_tokens"):
    return vocabulary.with_special_tokens(text)
  return [*vocabulary.encode(text), *_eos(vocabulary)]


def _eos(vocabulary):
  return [] if vocabulary.eos_id is None else [vocabulary.eos_id]


def _held_out(columns, fraction):
  """Returns which rows are for validation, by a hash of their prompts.

  Rows that are added move few others, and equal prompts stay together.
  """
  keys = np.array(
    [
      int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
      for text in columns["inputs_pretokenized"]
    ],
    np.uint64,
  )
  count = max(1, round(fraction * len(keys)))
  held = keys <= np.sort(keys)[count - 1]
  if held.all():
    raise ValueError(
      f"expected rows enough for a share of validation, got {len(keys)}; set"
      " VALIDATION_FILES, or VALIDATION_FRACTION = 0"
    )
  return held


def _as_ids(dataset: tf.data.Dataset) -> tf.data.Dataset:
  def ids(example):
    found = {k: example[k] for k in ("inputs", "targets") if k in example}
    return example | {
      name: tf.io.decode_raw(x, tf.int32) for name, x in found.items()
    }

  return dataset.map(ids, num_parallel_calls=tf.data.AUTOTUNE)


def _metrics(given):
  """Returns the functions that METRICS names."""
  if isinstance(given, str):
    given = [given]
  if not isinstance(given, Sequence):
    checks.refuse("names such as ('rouge', 'exact')", given, "METRICS")
  return [_metric(metric) for metric in given]


def _metric(metric):
  """Returns a metric function, which has no value on prompts alone."""
  if callable(metric):
    function = metric
  else:
    checks.one_of(metric, "METRICS", _METRICS)
    function = _METRICS[metric]

  @functools.wraps(function)
  def of_answers(targets, predictions):
    if all(target is None for target in targets):
      return {}
    return function(targets, predictions)

  return of_answers


def _patterns(value, setting):
  if value is None:
    return ()
  paths = value if isinstance(value, list | tuple) else (value,)
  for path in paths:
    checks.path(path, setting)
  return tuple(os.fspath(files.absolute(path)) for path in paths)
