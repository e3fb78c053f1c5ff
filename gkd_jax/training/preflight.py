"""Checks of a run before its first step, printed as one table.

What can be known to be wrong costs no step here: a batch is drawn, its position is
saved, the reward is called, and the teacher is looked at.
`evaluation.RunEvaluations` tries the metrics.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gkd_jax import data, partitioning
from gkd_jax.training import rollouts, runs, settings, teacher_check


def draw(batches: Any) -> Mapping[str, np.ndarray]:
  """Returns the first batch of a run, which the run is given again.

  Args:
    batches: a `data.TrainIterator` or one around it; it stays where it is.

  Raises:
    ValueError: there is no batch, or the position cannot be saved.
  """
  batch = batches.peek()
  data.try_saving(batches)
  return batch


def table(
  run: runs.Run,
  model: Any,
  dataset: settings.DatasetConfig,
  teacher_params: Any,
  batch: Mapping[str, np.ndarray],
) -> list[tuple[str, str]]:
  """Returns what was found, as (name, sentence).

  Args:
    run: from `runs.build`.
    model: see `train.train`.
    dataset: see `settings.DatasetConfig`.
    teacher_params: {} without a teacher.
    batch: from `draw`.
  """
  rows = [("student", _size(run.state.params, run.state) + " with optimizer")]
  if teacher_params:
    rows.append(("teacher", _size(teacher_params, teacher_params)))
  devices = "device" if run.mesh.size == 1 else "devices"
  rows.append(("mesh", f"{run.mesh.size} {devices} as {dict(run.mesh.shape)}"))
  weights = np.asarray(batch["decoder_loss_weights"]) > 0
  lengths = ", ".join(
    f"{name} {length}" for name, length in dataset.task_feature_lengths.items()
  )
  rows.append(
    (
      "data",
      f"{dataset.mixture_or_task_name}: {dataset.batch_size} rows of {lengths};"
      f" {weights.sum():,} target tokens in the first batch, the longest output"
      f" {weights.sum(axis=1).max()}",
    )
  )
  rows.append(("tokens", _special(model.student.special_tokens)))
  return rows + _distributions(model)


def try_reward(
  model: Any, task: Any, batch: Mapping[str, np.ndarray]
) -> list[tuple[str, str]]:
  """Calls a reward once, and returns what it gave as a row; [] without one.

  Args:
    model: see `train.train`.
    task: from `data.load_task`.
    batch: this process's rows, from `draw`.

  Raises:
    ValueError: see `rollouts.Judge.try_on`.
  """
  if not model.needs_rewards:
    return []
  rewards = rollouts.Judge(model, task).try_on(batch)
  found = rewards[np.isfinite(rewards)]
  of = f"{found.size} of {rewards.size} references as outputs"
  if not found.size:
    return [("reward", of)]
  mean, low, high = found.mean(), found.min(), found.max()
  return [("reward", f"{mean:.3g} in [{low:.3g}, {high:.3g}] for {of}")]


def text(rows: Sequence[tuple[str, str]], warnings: Sequence[str] = ()) -> str:
  """Returns the table, and a line for each warning.

  Args:
    rows: (name, sentence).
    warnings: sentences.
  """
  width = max((len(name) for name, _ in rows), default=0)
  return "\n".join(
    [
      *(f"{name:{width}}  {sentence}" for name, sentence in rows),
      *(f"warning: {sentence}" for sentence in warnings),
    ]
  )


def _size(params, state):
  number = sum(leaf.size for leaf in jax.tree.leaves(params))
  return (
    f"{number:,} parameters, {partitioning.bytes_per_device(state):,} bytes per"
    " device"
  )


def _special(tokens):
  eos = " or ".join(map(str, tokens.eos)) or "none"
  pad = "none" if tokens.pad is None else tokens.pad
  zero = "" if tokens.zero_is_padding else "; 0 is a token of the data"
  return f"EOS {eos}, PAD {pad}, decoders read {tokens.start} first{zero}"


def _distributions(model):
  """Returns what is sampled and compared, as (name, sentence)."""
  if model.teacher is None:
    return []
  rows = []
  if any(source != "data" for source in model.sources):
    options = ", ".join(
      f"{name} {_shown(model.sampling[name])}"
      for name in ("temperature", "top_k", "top_p")
    )
    fraction = _shown(model.student_data_fraction)
    rows.append(
      (
        "samples",
        f"of the student with probability {fraction} per"
        f" {model.student_data_granularity}: {options}",
      )
    )
  beta = "" if model.beta is None else f" (β {_shown(model.beta)})"
  hard = ""
  if model.hard_label_weight:
    hard = (
      f"; of rows from the data {_shown(model.hard_label_weight)} is their"
      " cross-entropy"
    )
  return [
    *rows,
    (
      "loss",
      f"{model.divergence}{beta} of softmax(teacher /"
      f" {_shown(model.teacher_temperature)}) and softmax(student /"
      f" {_shown(model.student_temperature)}), mean per"
      f" {model.length_normalization}{hard}",
    ),
  ]


def _shown(value):
  """Returns a number or schedule in a few letters."""
  return "by schedule" if callable(value) else f"{value:g}"


def _teacher_rows(means):
  """Returns what `teacher_check.measure` found, as (name, sentence)."""
  if math.isnan(means["teacher"]):
    return [("signal", "not measured: the first rows have no target tokens")]
  return [
    (
      "signal",
      f"on {means['tokens']:.0f} of the data's tokens: cross-entropy"
      f" {means['teacher']:.3g} nats (student {means['student']:.3g}, uniform"
      f" {means['uniform']:.3g}), entropy {means['entropy']:.3g}, both likeliest"
      f" tokens equal on {100 * means['agreement']:.0f} %",
    )
  ]


def check_teacher(
  model: Any,
  run: runs.Run,
  student_params: Any,
  teacher_params: Any,
  batch: Mapping[str, np.ndarray],
  *,
  same_asked: bool,
) -> tuple[list[tuple[str, str]], list[str]]:
  """Returns rows of the table on the teacher's signal, and warnings.

  Args:
    model: see `train.train`; without a teacher, there is nothing to say.
    run: from `runs.build`.
    student_params: on the mesh.
    teacher_params: on the mesh.
    batch: this process's rows, from `draw`.
    same_asked: the settings name one checkpoint for both.
  """
  if model.teacher is None:
    return [], []
  placed = partitioning.put_batch(batch, run.mesh)
  means = teacher_check.measure(
    model, student_params, teacher_params, placed, run.mesh
  )
  said = teacher_check.warnings(
    means, teacher_check.temperatures(model), same_asked=same_asked
  )
  return _teacher_rows(means), said
