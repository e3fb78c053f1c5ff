"""What a finished run scored, and the table of a sweep's cells."""

import csv
import io
import json
import os
from collections.abc import Mapping
from typing import Any

# Files of an evaluation in a run's folder, and the prefix of their scores.
_SCORE_FILES = ("metrics.json",)


def read_cell(folder: str) -> dict[str, Any]:
  """One row: where it stands in the grid, and its scores.

  Args:
    folder: MODEL_DIR of a run, EVAL_OUTPUT_DIR of an evaluation, or a cell.

  Returns:
    `stage`, `seed`, the axes, `status` (finished or not), `split`, `steps`,
    `seconds` (of the process that ended it), `step_seconds` (of all its steps,
    those of earlier processes included), `params`, and each score of
    `final.json` as `greedy/NAME` and `sampled/NAME`, of `metrics.json` as
    `eval/NAME`; as far as there is a file that says so.
  """
  cell = read_json(os.path.join(folder, "cell.json")) or {}
  row: dict[str, Any] = {}
  if cell:
    row |= {"cell": cell["name"], "stage": cell["stage"], **cell["axes"]}
    row |= {"seed": cell["seed"]}
  done = cell.get("done") or ("done.json" if cell else "final.json")
  finished = os.path.exists(os.path.join(folder, done))
  row["status"] = "finished" if finished else "not finished"
  final = read_json(os.path.join(folder, "final.json")) or {}
  for key, value in final.items():
    if isinstance(value, Mapping):
      row |= _numbers(f"{key}/", value)
    elif key in ("seconds", "params", "split"):
      row[key] = value
  scores = read_json(os.path.join(folder, "metrics.json")) or {}
  row |= _numbers("eval/", scores)
  steps = read_metrics(folder)
  if steps:
    row["steps"] = steps[-1]["step"]
    row["step_seconds"] = _step_seconds(steps)
  return row


def read_metrics(folder: str) -> list[dict[str, Any]]:
  """Rows of `metrics.jsonl` by step; of a step done twice, the last time's."""
  path = os.path.join(folder, "metrics.jsonl")
  if not os.path.exists(path):
    return []
  found: dict[int, dict[str, Any]] = {}
  with open(path, encoding="utf-8") as lines:
    for line in lines:
      try:
        row = json.loads(line)
      except ValueError:
        continue  # the process was killed while it wrote this line
      found.setdefault(row["step"], {}).update(row)
  return [found[step] for step in sorted(found)]


def read_json(path: str) -> Any:
  """What a JSON file holds; None where there is no file."""
  if not os.path.exists(path):
    return None
  with open(path, encoding="utf-8") as f:
    return json.load(f)


def read(output: str) -> list[dict[str, Any]]:
  """The rows of a sweep's cells, in the order of the sweep.

  Raises:
    ValueError: the folder is not a sweep's.
  """
  sweep = read_json(os.path.join(output, "sweep.json"))
  if sweep is None:
    raise ValueError(
      f"expected the folder of a sweep, got {output!r} without sweep.json;"
      " set --output_dir of `gkd sweep`"
    )
  return [read_cell(os.path.join(output, name)) for name in sweep["cells"]]


def write(output: str):
  """Writes `cells.json` and `cells.csv` into a sweep's folder."""
  rows = read(output)
  # Columns in the order in which they first appear, scores at the end.
  columns = list({column: None for row in rows for column in row})
  columns.sort(key=lambda name: "/" in name)
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  for name, content in (
    ("cells.json", json.dumps(rows, indent=1)),
    ("cells.csv", text.getvalue()),
  ):
    path = os.path.join(output, name)
    with open(path + ".tmp", "w", encoding="utf-8") as f:
      f.write(content)
    os.replace(path + ".tmp", path)


def _numbers(prefix, values):
  return {
    prefix + name: value
    for name, value in values.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
  }


def _step_seconds(rows):
  """Seconds of all training steps, from the rates of each stretch of them."""
  total, last = 0.0, 0
  for row in rows:
    if row.get("seconds_per_step") is not None:
      total += row["seconds_per_step"] * (row["step"] - last)
      last = row["step"]
  return total
