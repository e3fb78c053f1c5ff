"""The card of an exported student: its teacher, its training and its scores.

All of it comes from what the run wrote: `config.gin`, `metrics.jsonl`,
`final.json`. A missing setting is "not recorded".
"""

import os
from collections.abc import Mapping
from typing import Any

from gkd_jax import files
from gkd_jax.experiments import rendering, run_folders

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
  macros, scores = {}, {}
  if model_dir is not None:
    macros = run_folders.read_macros(model_dir)
    scores = _scores(os.fspath(model_dir), step)
  training = {
    "Parameters": f"{num_parameters:,}",
    "Steps": _NOT_RECORDED if step is None else f"{step:,}",
    **{row: macros.get(macro, _NOT_RECORDED) for row, macro in _SETTINGS},
  }
  tables = [("Training", "", training)]
  tables += [(title, "Score", rows) for title, rows in scores.items()]
  return rendering.markdown("model_card.md", name=name, tables=tables)


def _scores(folder: str, step: int | None) -> dict[str, dict[str, Any]]:
  """Returns the last evaluation up to `step`, and the final one, by title."""
  found: dict[str, dict[str, Any]] = {}
  rows = run_folders.read_metrics(folder)
  until = [row for row in rows if step is None or row["step"] <= step]
  scores = {
    row["step"]: last for row in until if (last := run_folders.evaluated(row))
  }
  if scores:
    last = max(scores)
    found[f"Validation at step {last:,}"] = scores[last]
  # Written after the last step, it does not describe an earlier checkpoint.
  final = files.read_json(os.path.join(folder, "final.json"))
  if final and len(until) == len(rows):
    split = final.pop("split", "final")
    found[f"Split {split}, after the last step"] = {
      f"{how} {key}": value
      for how, values in final.items()
      if isinstance(values, Mapping)
      for key, value in values.items()
    }
  return {title: rows for title, rows in found.items() if rows}
