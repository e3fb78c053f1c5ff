"""Reads what runs and sweeps left in their folders.

A run's folder holds `config.gin`, `metrics.jsonl` and, once it is finished,
`final.json`; an evaluation's holds `metrics.json`. A sweep's folder holds
`sweep.json`, a folder with `cell.json` for each cell, and the table of its cells.
"""

import csv
import io
import os
import re
from collections.abc import Mapping
from typing import Any

from gkd_jax import files

# `A`, and as T5X writes it: `scope/A/macro.value`.
_MACRO = re.compile(r"(?:\w+/)*([A-Z][A-Z0-9_]*)(?:/macro\.value)?")


def name_and_folder(item: str) -> tuple[str, str]:
  """Splits `NAME=FOLDER`; a folder alone has its own name."""
  name, equals, folder = item.partition("=")
  if equals:
    return name, folder
  return os.path.basename(os.path.normpath(item)), item


def read_metrics(folder: files.Path) -> list[dict[str, Any]]:
  """Returns the rows of `metrics.jsonl`, one for each step, in order.

  Of a step that was done twice the last values count.
  """
  found: dict[int, dict[str, Any]] = {}
  for row in files.read_json_lines(os.path.join(folder, "metrics.jsonl")):
    found.setdefault(row["step"], {}).update(row)
  return [found[step] for step in sorted(found)]


def evaluated(row: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the scores of a row of `metrics.jsonl`, {} if it has none."""
  return {
    key.removeprefix("eval/"): value
    for key, value in row.items()
    if key.startswith("eval/")
  }


def read_bindings(folder: files.Path) -> dict[str, str]:
  """Returns all bindings of a run's configuration, as gin wrote them.

  A macro has its name alone, without scopes.
  """
  bindings: dict[str, str] = {}
  for file in sorted(files.absolute(folder).glob("*.gin")):
    # Gin breaks a long value after a backslash, or inside brackets.
    text = re.sub(r"\\\n\s*", "", file.read_text())
    name = None
    for line in text.splitlines():
      if match := re.match(r"([\w./]+) = ?(.*)", line):
        macro = _MACRO.fullmatch(match[1])
        name = macro[1] if macro else match[1]
        bindings[name] = match[2]
      elif name and line.startswith(" "):
        bindings[name] += " " + line.strip()
      else:
        name = None
  return bindings


def read_macros(folder: files.Path) -> dict[str, str]:
  """Returns the gin macros of a run's configuration, strings without quotes."""
  return {
    name: value.strip("'\"")
    for name, value in read_bindings(folder).items()
    if _MACRO.fullmatch(name)
  }


def resolve(value: str, bindings: Mapping[str, str]) -> str:
  """Returns a value with the macros and calls in it spelled out.

  >>> resolve("@shipped.model_path()", {"shipped.model_path.name": "'a'"})
  "model_path(name='a')"

  Args:
    value: gin source, such as `%BASE` or `@f()`.
    bindings: of the configuration that it stands in.
  """
  if match := re.fullmatch(r"%([\w./]+)", value):
    return resolve(bindings.get(match[1], match[1]), bindings)
  if match := re.fullmatch(r"@([\w./]+)(?:\(\))?", value):
    arguments = [
      f"{name.rpartition('.')[2]}={resolve(bound, bindings)}"
      for name, bound in bindings.items()
      if name.rpartition(".")[0] == match[1]
    ]
    return f"{match[1].rpartition('.')[2]}({', '.join(arguments)})"
  return value


def read_cell(folder: str) -> dict[str, Any]:
  """Returns a row of the table of cells: a run's place in the grid and scores.

  Args:
    folder: MODEL_DIR of a run, EVAL_OUTPUT_DIR of an evaluation, or a cell.

  Returns:
    `stage`, `seed`, the axes, `status` (finished or not), `split`, `steps`,
    `seconds` (of the process that ended it; `start_seconds` of them until its
    first step was done), `step_seconds` (of all its steps,
    those of earlier processes included), `params`, and each score of
    `final.json` as `greedy/NAME` and `sampled/NAME`, of `metrics.json` as
    `eval/NAME`, as far as the files have them.
  """
  cell = files.read_json(os.path.join(folder, "cell.json")) or {}
  row: dict[str, Any] = {}
  if cell:
    row |= {"cell": cell["name"], "stage": cell["stage"], **cell["axes"]}
    row |= {"seed": cell["seed"]}
  done = cell.get("done") or ("done.json" if cell else "final.json")
  finished = (files.absolute(folder) / done).exists()
  row["status"] = "finished" if finished else "not finished"
  final = files.read_json(os.path.join(folder, "final.json")) or {}
  for key, value in final.items():
    if isinstance(value, Mapping):
      row |= _numbers(f"{key}/", value)
    elif key in ("seconds", "start_seconds", "params", "split"):
      row[key] = value
  scores = files.read_json(os.path.join(folder, "metrics.json")) or {}
  row |= _numbers("eval/", scores)
  steps = read_metrics(folder)
  if steps:
    row["steps"] = steps[-1]["step"]
    row["step_seconds"] = _step_seconds(steps)
  return row


def read_intervals(
  folder: files.Path,
) -> dict[str, tuple[float, float] | None]:
  """Returns the 95 % bootstrap intervals of a run's scores, `greedy/NAME`.

  None of a score that is the same for every example.
  """
  final = files.read_json(os.path.join(folder, "final.json")) or {}
  found = final.get("intervals", {})
  # Earlier runs wrote two equal ends.
  return {
    name: (ends[0], ends[1]) if ends and ends[0] < ends[1] else None
    for name, ends in found.items()
  }


def read_origin(folder: files.Path) -> tuple[str, str]:
  """Returns the command that a run was started with, and by which version.

  Both are comments at the top of `config.gin`; "" where it has none.
  """
  path = files.absolute(folder) / "config.gin"
  lines = path.read_text().splitlines() if path.exists() else []
  found = [line[2:] for line in lines[:2] if line.startswith("# gkd ")]
  return (found[0], found[1]) if len(found) == 2 else ("", "")


def read_table(output: str) -> list[dict[str, Any]]:
  """Returns the rows of a sweep's cells, in the order of the sweep.

  Raises:
    ValueError: the folder is not a sweep's.
  """
  sweep = files.read_json(os.path.join(output, "sweep.json"))
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
  files.write_json(os.path.join(output, "cells.json"), rows)
  files.write_text(os.path.join(output, "cells.csv"), text.getvalue())


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
