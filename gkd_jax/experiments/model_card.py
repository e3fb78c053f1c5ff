"""The card of an exported student: what it was distilled from, how, how well.

Everything in it is read from what the run wrote: the gin configuration that was
in force, `metrics.jsonl`, `final.json`. What is not there is said to be so.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from gkd_jax import files

# Row of the table to the gin macro that it shows.
_SETTINGS = (
  ("Teacher", "TEACHER_CHECKPOINT_PATH"),
  ("Data", "MIXTURE_OR_TASK_NAME"),
  ("λ, student-data fraction", "STUDENT_DATA_FRACTION"),
  ("Divergence", "DIVERGENCE"),
  ("β", "BETA"),
  ("Teacher temperature", "TEACHER_TEMPERATURE"),
  ("Sampling temperature", "SAMPLING_TEMPERATURE"),
  ("Length normalisation", "LENGTH_NORMALIZATION"),
  ("First parameters", "INITIAL_CHECKPOINT_PATH"),
  ("Batch size", "BATCH_SIZE"),
  ("Learning rate", "LEARNING_RATE"),
  ("Seed", "SEED"),
)
_MACRO = re.compile(r"^(?:\w+/)*([A-Z][A-Z0-9_]*)(?:/macro\.value)? = (.+)$")
_NOT_RECORDED = "not recorded"


def write(
  *,
  name: str,
  num_parameters: int,
  model_dir: os.PathLike[str] | str | None,
  step: int | None,
) -> str:
  """Returns the text of README.md.

  Args:
    name: of the model, the title.
    num_parameters: of the student.
    model_dir: folder of the run that trained it, or None.
    step: of the checkpoint, or None.
  """
  folder = None if model_dir is None else files.absolute(model_dir)
  settings = {} if folder is None else read_settings(folder)
  rows = [
    ("Parameters", f"{num_parameters:,}"),
    ("Steps", _NOT_RECORDED if step is None else f"{step:,}"),
    *((row, settings.get(macro, _NOT_RECORDED)) for row, macro in _SETTINGS),
  ]
  lines = [
    "---",
    "library_name: transformers",
    "pipeline_tag: text2text-generation",
    "tags:",
    "- t5",
    "- knowledge-distillation",
    "---",
    "",
    f"# {name}",
    "",
    "A T5 student trained with `gkd_jax`, Generalized Knowledge Distillation"
    " (arXiv 2306.13649).",
    "",
    *_table(("Training", ""), rows),
  ]
  for title, scores in (
    {} if folder is None else _scores(folder, step)
  ).items():
    if scores:
      lines += ["", *_table((title, "Score"), scores.items())]
  return "\n".join(lines) + "\n"


def read_settings(folder: epath.Path) -> dict[str, str]:
  """Gin macros of the configuration files in a run's folder, as text."""
  settings = {}
  for file in sorted(folder.glob("*.gin")):
    # Gin breaks a long value after a backslash.
    text = re.sub(r"\\\n\s*", "", file.read_text())
    for line in text.splitlines():
      if match := _MACRO.match(line):
        settings[match[1]] = match[2].strip("'\"")
  return settings


def _scores(folder: epath.Path, step: int | None) -> dict[str, dict[str, Any]]:
  """Title to name and score: the last evaluation up to `step`, the test."""
  found: dict[str, dict[str, Any]] = {}
  rows = files.read_json_lines(folder / "metrics.jsonl")
  until = [row for row in rows if step is None or row["step"] <= step]
  scores = [
    (row["step"], evaluated) for row in until if (evaluated := _evaluated(row))
  ]
  if scores:
    at, found_scores = scores[-1]
    found[f"Validation at step {at:,}"] = found_scores
  # Written after the last step, it says nothing of an earlier checkpoint.
  result = files.read_json(folder / "final.json")
  if result is not None and len(until) == len(rows):
    split = result.pop("split", "final")
    found[f"Split {split}, after the last step"] = {
      f"{how} {key}": value
      for how, scores in result.items()
      if isinstance(scores, Mapping)
      for key, value in scores.items()
    }
  return found


def _evaluated(row: Mapping[str, Any]) -> dict[str, Any]:
  return {
    key.removeprefix("eval/"): value
    for key, value in row.items()
    if key.startswith("eval/")
  }


def _table(head, rows) -> list[str]:
  shown = [
    f"| {a} | {f'{b:.4g}' if isinstance(b, float) else b} |" for a, b in rows
  ]
  return [f"| {head[0]} | {head[1]} |", "|---|---|", *shown]
