"""The card of an exported student: its teacher, its training and its scores.

All of it comes from what the run wrote: `config.gin`, `metrics.jsonl`,
`final.json`. A missing setting is "not recorded". Cards are published, so no path
of this machine is in them: of a local path the last part is named.
"""

import datetime
import importlib.metadata
import os
import re
from collections.abc import Mapping
from typing import Any

import gkd_jax
from gkd_jax import files
from gkd_jax.experiments import rendering, run_folders

# Row of the table to the gin macro that it shows.
_SETTINGS = (
  ("Teacher", "TEACHER_CHECKPOINT_PATH"),
  ("Data", "MIXTURE_OR_TASK_NAME"),
  ("λ, student-data fraction", "STUDENT_DATA_FRACTION"),
  ("Divergence", "DIVERGENCE"),
  ("β", "BETA"),
  ("Hard-label weight", "HARD_LABEL_WEIGHT"),
  ("Teacher temperature", "TEACHER_TEMPERATURE"),
  ("Sampling temperature", "SAMPLING_TEMPERATURE"),
  ("Length normalisation", "LENGTH_NORMALIZATION"),
  ("First parameters", "INITIAL_CHECKPOINT_PATH"),
  ("Batch size", "BATCH_SIZE"),
  ("Learning rate", "LEARNING_RATE"),
  ("Seed", "SEED"),
)
_NOT_RECORDED = "not recorded"
# A quoted path of a local disk.
_LOCAL_PATH = re.compile(r"""(['"])((?:file:|/|~|\.\.?/)[^'"]*)\1""")


def write(
  *,
  name: str,
  num_parameters: int,
  model_dir: os.PathLike[str] | str | None,
  step: int | None,
  architecture: str = "T5ForConditionalGeneration",
  has_tokenizer: bool = False,
) -> str:
  """Returns the text of README.md.

  Args:
    name: of the folder; the title if no run is known.
    num_parameters: of the student.
    model_dir: folder of the run that trained it, or None.
    step: of the checkpoint, or None.
    architecture: its class in `transformers`.
    has_tokenizer: whether the folder has a tokenizer's files.
  """
  settings, scores = {}, {}
  if model_dir is not None:
    settings = _settings(model_dir)
    scores = _scores(os.fspath(model_dir), step)
    run = os.path.basename(os.path.normpath(model_dir))
    data = settings["Data"]
    name = run if data == _NOT_RECORDED else f"{run} on {data}"
  training = {
    "Parameters": f"{num_parameters:,}",
    "Steps": _NOT_RECORDED if step is None else f"{step:,}",
    **(settings or {row: _NOT_RECORDED for row, _ in _SETTINGS}),
    "Exported": f"{datetime.date.today()} with {_versions()}",
  }
  tables = [("Training", "", training)]
  tables += [(title, "Score", rows) for title, rows in scores.items()]
  return rendering.markdown(
    "model_card.md",
    name=name,
    tables=tables,
    is_seq2seq="ConditionalGeneration" in architecture,
    has_tokenizer=has_tokenizer,
  )


def _settings(model_dir) -> dict[str, str]:
  """Returns the rows of settings, resolved and without paths of this machine."""
  bindings = run_folders.read_bindings(model_dir)
  return {
    row: _public(run_folders.resolve(bindings[macro], bindings))
    if macro in bindings
    else _NOT_RECORDED
    for row, macro in _SETTINGS
  }


def _public(value: str) -> str:
  """Returns a gin value as a reader of the card may see it.

  >>> _public("'/home/me/runs/a/checkpoint_40'"), _public("'gs://b/c'")
  ('a/checkpoint_40', 'gs://b/c')
  """

  def last(match):
    parts = [p for p in re.split(r"[/\\]", match[2]) if p]
    # A checkpoint's step alone names nothing.
    count = 2 if parts and re.fullmatch(r"checkpoint_\d+", parts[-1]) else 1
    return match[1] + "/".join(parts[-count:]) + match[1]

  return _LOCAL_PATH.sub(last, value).strip("'\"")


def _versions() -> str:
  found = [f"gkd_jax {gkd_jax.__version__}"]
  for name in ("jax", "flax"):
    try:
      found.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  return ", ".join(found)


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
      if how != "intervals"
    }
  return {title: rows for title, rows in found.items() if rows}
