"""Reads what runs and sweeps left in their folders: the only reader of it.

A run's folder holds `config.gin`, `metrics.jsonl` and, once it is finished,
`final.json`; an evaluation's holds `metrics.json`. A sweep's folder holds
`sweep.json`, a folder with `cell.json` for each cell, and the table of its cells.
"""

import csv
import io
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

_Path = os.PathLike[str] | str
# `A = 1`, and as T5X writes it: `scope/A/macro.value = 1`.
_MACRO = re.compile(r"^(?:\w+/)*([A-Z][A-Z0-9_]*)(?:/macro\.value)? = (.+)$")


def read_json(path: _Path) -> Any:
  """Returns what a JSON file holds, or None if there is no such file."""
  path = epath.Path(path)
  return json.loads(path.read_text()) if path.exists() else None


def read_lines(path: _Path) -> list[dict[str, Any]]:
  """Returns the objects of a JSON lines file, [] if there is no such file.

  A line that was cut off, because its process was killed, is left out.
  """
  path = epath.Path(path)
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except ValueError:
      continue
  return rows


def read_metrics(folder: _Path) -> list[dict[str, Any]]:
  """Returns the rows of `metrics.jsonl`, one for each step, in order.

  Of a step that was done twice the last values count.
  """
  found: dict[int, dict[str, Any]] = {}
  for row in read_lines(epath.Path(folder) / "metrics.jsonl"):
    found.setdefault(row["step"], {}).update(row)
  return [found[step] for step in sorted(found)]


def read_macros(folder: _Path) -> dict[str, str]:
  """Returns the gin macros of a run's configuration, strings without quotes."""
  macros = {}
  for file in sorted(epath.Path(folder).glob("*.gin")):
    # Gin breaks a long value after a backslash.
    text = re.sub(r"\\\n\s*", "", file.read_text())
    for line in text.splitlines():
      if match := _MACRO.match(line):
        macros[match[1]] = match[2].strip("'\"")
  return macros


def read_cell(folder: str) -> dict[str, Any]:
  """Returns a row of the table of cells: a run's place in the grid and scores.

  Args:
    folder: MODEL_DIR of a run, EVAL_OUTPUT_DIR of an evaluation, or a cell.

  Returns:
    `stage`, `seed`, the axes, `status` (finished or not), `split`, `steps`,
    `seconds` (of the process that ended it), `step_seconds` (of all its steps,
    those of earlier processes included), `params`, and each score of
    `final.json` as `greedy/NAME` and `sampled/NAME`, of `metrics.json` as
    `eval/NAME`, as far as the files have them.
  """
  cell = read_json(os.path.join(folder, "cell.json")) or {}
  row: dict[str, Any] = {}
  if cell:
    row |= {"cell": cell["name"], "stage": cell["stage"], **cell["axes"]}
    row |= {"seed": cell["seed"]}
  done = cell.get("done") or ("done.json" if cell else "final.json")
  finished = (epath.Path(folder) / done).exists()
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


def read_table(output: str) -> list[dict[str, Any]]:
  """Returns the rows of a sweep's cells, in the order of the sweep.

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


def write_table(output: str):
  """Writes `cells.json` and `cells.csv` into a sweep's folder."""
  rows = read_table(output)
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
  """Returns the seconds of all steps, from the rate of each stretch of them."""
  total, last = 0.0, 0
  for row in rows:
    if row.get("seconds_per_step") is not None:
      total += row["seconds_per_step"] * (row["step"] - last)
      last = row["step"]
  return total
