"""Few-shot evaluation: prompts that fit, and the mean over groups of examples."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import seqio
import tensorflow as tf

from gkd_jax.tasks import (
  example_statistics,
  preprocessors,
  sources,
  text_tasks,
)


def shot_names(num_shots: int) -> tuple[str, ...]:
  """The columns of the worked examples, first to last.

  >>> shot_names(2)
  ('shot_0', 'shot_1')
  """
  return tuple(f"shot_{i}" for i in range(num_shots))


class Question(NamedTuple):
  """A question of a benchmark, with its worked examples.

  Attributes:
    header: What stands before all.
    question: Up to where the answer goes.
    targets: The answer.
    group: Over which the metric is averaged.
    shots: The worked examples, `num_shots` of them.
  """

  header: str
  question: str
  targets: str
  group: str
  shots: Sequence[str]


def join_shots(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int] | None,
  output_features: Mapping[str, Any],
  *,
  num_shots: int,
) -> tf.data.Dataset:
  """Makes inputs of a header, worked examples and the question.

  As many of the first worked examples are used as leave room for the whole
  question, its EOS included; a question that does not fit alone is cut at its
  end, as any input.

  Args:
    dataset: The texts of `Question`, shots under `shot_names`.
    sequence_length: The length of `inputs` in tokens; None for no limit.
    output_features: Of the task; the vocabulary of `inputs` counts tokens.
    num_shots: The most worked examples.

  Returns:
    A dataset of `inputs`, `targets` and `group`.
  """
  limit = (sequence_length or {}).get("inputs")
  vocabulary = output_features["inputs"].vocabulary

  def convert(example):
    shots = [example[name] for name in shot_names(num_shots)]
    prompts = [
      tf.strings.join([example["header"], *shots[:n], example["question"]])
      for n in range(num_shots + 1)
    ]
    inputs = prompts[-1]
    if limit is not None:
      lengths = tf.stack([tf.size(vocabulary.encode_tf(p)) for p in prompts])
      used = tf.reduce_sum(tf.cast(lengths[1:] + 1 <= limit, tf.int32))
      inputs = tf.stack(prompts)[used]
    kept = {name: example[name] for name in ("targets", "group")}
    return {"inputs": inputs, **kept}

  return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def grouped_target(
  output: str, example: Mapping | None = None, is_target: bool = False
) -> str | tuple[str, str]:
  """The output as it is; for a target, its group and its whole text.

  Args:
    output: A decoded prediction or target.
    example: The example, with `group`.
    is_target: Whether `output` is the target.
  """
  if not is_target or example is None:
    return output
  group = example["group"]
  group = group.decode() if isinstance(group, bytes) else str(group)
  return group, preprocessors.whole_target(output, example, is_target)


def _in_group(target: tuple[str, str], prediction: str):
  group, answer = target
  hit = [100.0 * (prediction.strip() == answer.strip()), 1.0]
  return {"accuracy": {group: hit}, f"accuracy/{group}": hit}


@example_statistics.declare(_in_group)
def grouped_exact_match(
  targets: Sequence[tuple[str, str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Exact match, averaged over groups with equal weight.

  White space around answers does not count.

  Args:
    targets: The group and the answer of each example.
    predictions: The generated answers.

  Returns:
    `accuracy`, the unweighted mean over groups, and `accuracy/GROUP` of each,
    in percent.

  Raises:
    ValueError: If the two differ in length or are empty.

  Example:
    >>> grouped_exact_match([("a", "x"), ("a", "y"), ("b", "z")], ["x", "", "z"])
    {'accuracy': 75.0, 'accuracy/a': 50.0, 'accuracy/b': 100.0}
  """
  if len(targets) != len(predictions) or not predictions:
    raise ValueError(
      "expected as many predictions as targets and at least one, got "
      f"{len(targets)} targets and {len(predictions)} predictions; "
      "set the evaluation split"
    )
  hits: dict[str, list[bool]] = {}
  for (group, answer), prediction in zip(targets, predictions, strict=True):
    hits.setdefault(group, []).append(prediction.strip() == answer.strip())
  shares = {g: 100.0 * sum(x) / len(x) for g, x in sorted(hits.items())}
  return {
    "accuracy": sum(shares.values()) / len(shares),
    **{f"accuracy/{group}": share for group, share in shares.items()},
  }


def find_file(folder: str, *parts: str, setting: str) -> str:
  """A file of a benchmark's folder.

  Args:
    folder: `~` and `$VARIABLE` are expanded.
    *parts: The path below it.
    setting: The variable to set, for the message.

  Raises:
    ValueError: If it is not there.
  """
  root = os.path.expandvars(os.path.expanduser(folder))
  path = os.path.join(root, *parts)
  if not os.path.isfile(path):
    raise ValueError(
      f"expected the benchmark's file {os.path.join(*parts)} in {folder!r}, got "
      f"{path!r}, which is no file; set the variable {setting}"
    )
  return path


def add_task(
  name: str,
  load_questions: Callable[[str], Iterable[Question]],
  *,
  splits: Sequence[str],
  num_shots: int,
  vocabulary: seqio.Vocabulary | None,
) -> seqio.Task:
  """Registers a few-shot task under a name; no file is read yet.

  Args:
    name: The name of the task.
    load_questions: From the name of a split to its questions.
    splits: The names of the splits.
    num_shots: Worked examples before each question, fewer where the length of
      the inputs does not hold them all.
    vocabulary: Of inputs and targets; None for T5's SentencePiece.

  Returns:
    The task. Its metrics are those of `grouped_exact_match`.

  Raises:
    ValueError: If the name is taken.
  """

  # seqio gives lengths and features to parameters of these names.
  def joined(dataset, sequence_length, output_features):
    return join_shots(
      dataset, sequence_length, output_features, num_shots=num_shots
    )

  return text_tasks.add(
    name,
    sources.ColumnsDataSource(
      lambda split: _columns(load_questions(split), num_shots), splits=splits
    ),
    [joined],
    [grouped_exact_match],
    vocabulary=vocabulary,
    postprocess_fn=grouped_target,
  )


def _columns(
  questions: Iterable[Question], num_shots: int
) -> dict[str, list[str]]:
  """The columns that `join_shots` reads."""
  columns: dict[str, list[str]] = {}
  names = shot_names(num_shots)
  for question in questions:
    texts = question._asdict()
    texts |= zip(names, texts.pop("shots"), strict=True)
    for name, text in texts.items():
      columns.setdefault(name, []).append(text)
  return columns
