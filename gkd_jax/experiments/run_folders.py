"""What a finished run scored, and the table of a sweep's cells.

Runs read for a report: where each stands in a grid, and groups of seeds.
"""

import csv
import dataclasses
import importlib.resources
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from gkd_jax import files

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
      row |= _cell_numbers(f"{key}/", value)
    elif key in ("seconds", "params", "split"):
      row[key] = value
  scores = files.read_json(os.path.join(folder, "metrics.json")) or {}
  row |= _cell_numbers("eval/", scores)
  steps = read_metrics(folder)
  if steps:
    row["steps"] = steps[-1]["step"]
    row["step_seconds"] = _step_seconds(steps)
  return row


def read_metrics(folder: str) -> list[dict[str, Any]]:
  """Rows of `metrics.jsonl` by step; of a step done twice, the last time's."""
  found: dict[int, dict[str, Any]] = {}
  for row in files.read_json_lines(os.path.join(folder, "metrics.jsonl")):
    found.setdefault(row["step"], {}).update(row)
  return [found[step] for step in sorted(found)]


def read_table(output: str) -> list[dict[str, Any]]:
  """The rows of a sweep's cells, in the order of the sweep.

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


def _cell_numbers(prefix, values):
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


# What an axis of a sweep may be called; the first name is used in the report.
_AXES = {
  "method": ("method",),
  "size": ("size",),
  "labelled": ("labelled",),
  "lambda": ("lambda", "STUDENT_DATA_FRACTION"),
  "divergence": ("divergence", "DIVERGENCE"),
  "alpha": ("alpha", "ALPHA", "RL_ALPHA"),
  "temperature": ("temperature", "SAMPLING_TEMPERATURE"),
}
_DIVERGENCES = ("reverse_kl", "forward_kl")
# A run's last fifth of steps says what training has come to.
_LATE = 0.8
_LOWER_IS_BETTER = ("wer", "per", "loss", "perplexity")
# Looked for in this order where the sweep file names no metric.
_METRICS = (
  *("wer", "rouge2", "bleu", "answer_accuracy", "accuracy_with_calculator"),
)


@dataclasses.dataclass(frozen=True)
class Run:
  """One run.

  Attributes:
    place: its points of the axes that the report knows, `method` always, and
      any other axis under its own name.
    seed: None where it is not known.
    scores: `greedy/wer` and the like, as they were written.
    folder: where its curves and examples are.
    on_grid: its method is a method, not a point of a λ, divergence or α axis.
  """

  place: Mapping[str, str]
  seed: int | None
  scores: Mapping[str, float]
  folder: str
  on_grid: bool


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The mean over seeds, and its two-sided 95 % interval by Student's t.

  With one value there is no interval: `low` and `high` are None.
  """

  mean: float
  low: float | None
  high: float | None
  count: int


@dataclasses.dataclass(frozen=True)
class Study:
  """All that a report draws from.

  Attributes:
    title: of the page.
    runs: finished ones.
    axes: axis to its points, in order.
    metric: the score that figures show, without `greedy/`.
    lower_is_better: of the metric.
    paper: the paper's numbers on this task, {} if it is none of the paper's.
    unfinished: names of cells without scores.
  """

  title: str
  runs: Sequence[Run]
  axes: Mapping[str, Sequence[str]]
  metric: str
  lower_is_better: bool
  paper: Mapping[str, Any]
  unfinished: Sequence[str]


def estimate(values: Iterable[float]) -> Estimate:
  """Mean and 95 % t-interval, n - 1 degrees of freedom.

  >>> e = estimate([1.0, 2.0, 3.0])  # 2 ± 4.303 · 1/√3
  >>> f"{e.mean:.3f} {e.low:.3f} {e.high:.3f}"
  '2.000 -0.484 4.484'

  Raises:
    ValueError: no values.
  """
  x = np.array(list(values), np.float64)
  if not x.size:
    raise ValueError("expected values of at least one seed, got none")
  mean = float(x.mean())
  if x.size == 1:
    return Estimate(mean, None, None, 1)
  half = stats.t.ppf(0.975, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size)
  return Estimate(mean, mean - float(half), mean + float(half), int(x.size))


def late_means(folder: str) -> dict[str, float]:
  """Means of a run's reward and divergences over the last fifth of its steps."""
  rows = read_metrics(folder)
  if not rows:
    return {}
  late = [row for row in rows if row["step"] > _LATE * rows[-1]["step"]]
  return {
    name: float(np.mean(values))
    for name in ("reward", *_DIVERGENCES)
    if (values := [r[name] for r in late if r.get(name) is not None])
  }


def divergence_of(means: Mapping[str, float]) -> str | None:
  """The divergence to the teacher that `late_means` has, reverse KL at best."""
  return next((name for name in _DIVERGENCES if name in means), None)


def read(items: Sequence[str]) -> Study:
  """Reads sweeps and runs.

  Args:
    items: folders of sweeps, and `NAME=FOLDER` or `FOLDER` of single runs; the
      same name twice is another seed of the same thing.

  Raises:
    ValueError: a folder is neither, or nothing is finished.
  """
  runs: list[Run] = []
  unfinished: list[str] = []
  settings: dict[str, Any] = {}
  order: dict[str, dict[str, None]] = {}
  for item in items:
    name, equals, folder = item.partition("=")
    if not equals:
      name, folder = os.path.basename(os.path.normpath(item)), item
    sweep = files.read_json(os.path.join(folder, "sweep.json"))
    if sweep is None:
      runs.append(_single(name, folder))
      continue
    settings |= sweep["report"]
    for axis, labels in sweep["axes"].items():
      if axis == "method":
        continue  # as they were run: stages that have no method axis first
      order.setdefault(_known_axis(axis), {}).update(dict.fromkeys(labels))
    found, missing = _of_sweep(folder, sweep)
    runs += found
    unfinished += missing
  if not runs:
    raise ValueError(
      f"expected at least one finished run, got none in {list(items)};"
      " run `gkd sweep` or `gkd train`"
    )
  for run in runs:
    for axis, label in run.place.items():
      order.setdefault(axis, {})[label] = None
  metric = settings.get("metric") or _metric(runs)
  return Study(
    title=settings.get("title", "Distillation runs compared"),
    runs=runs,
    axes={axis: list(labels) for axis, labels in order.items()},
    metric=metric,
    lower_is_better=settings.get("lower_is_better", metric in _LOWER_IS_BETTER),
    paper=_paper(settings.get("task") or _task(runs), metric),
    unfinished=unfinished,
  )


def groups(
  runs: Iterable[Run], key: Callable[[Run], Any]
) -> dict[Any, list[Run]]:
  """Runs by a key, in the order of first appearance."""
  found: dict[Any, list[Run]] = {}
  for run in runs:
    found.setdefault(key(run), []).append(run)
  return found


def scores(runs: Iterable[Run], name: str) -> list[float]:
  """The scores of that name, of the runs that have it."""
  return [run.scores[name] for run in runs if name in run.scores]


def examples_count(label: str) -> float | None:
  """A number of labelled examples as it is written: 1000, "3k", "5%", "all".

  >>> examples_count("3k"), examples_count("0.5%"), examples_count("all")
  (3000.0, 0.5, None)
  """
  match = re.fullmatch(r"([\d.,]+)\s*([kKM%]?)", label.strip())
  if not match:
    return None
  scale = {"k": 1e3, "K": 1e3, "M": 1e6}.get(match[2], 1.0)
  return float(match[1].replace(",", "")) * scale


def method_key(name: str) -> str:
  """A method's name in the form that the paper's numbers are listed under.

  >>> method_key("On-policy GKD"), method_key("f-distill"), method_key("gkd")
  ('onpolicykd', 'fdistill', 'onpolicykd')
  """
  key = re.sub(r"[^a-z0-9]", "", name.lower())
  return {"gkd": "onpolicykd", "onpolicygkd": "onpolicykd"}.get(key, key)


def papers_cell(study: Study, run: Run, how: str) -> float | None:
  """The paper's score at the run's size, λ and divergence, if it has one.

  Args:
    study: on the task of the paper, or another.
    run: with a point of the λ and the divergence axis.
    how: "greedy" or "sampled".
  """
  grid = study.paper.get("grid", {})
  size = run.place.get("size", "").removeprefix("t5-")
  rows = grid.get(how, {}).get(size, {})
  scores_of_row = rows.get(f"{float(run.place['lambda']):g}")
  divergence = method_key(run.place["divergence"])
  if not scores_of_row or divergence not in grid["divergences"]:
    return None
  return scores_of_row[grid["divergences"].index(divergence)]


def _single(name, folder) -> Run:
  if not (files.absolute(folder) / "final.json").exists():
    raise ValueError(
      f"expected a finished run with final.json, or a sweep, got {folder!r};"
      " set FINAL_EVAL_SPLIT and train to the end"
    )
  seed = _gin_macros(folder).get("SEED")
  return Run(
    {"method": name},
    int(seed) if seed else None,
    _only_scores(read_cell(folder)),
    folder,
    True,
  )


def _of_sweep(folder, sweep):
  """The finished runs of a sweep, and the names of the others that are there."""
  runs, missing = [], []
  for name in sweep["cells"]:
    path = os.path.join(folder, name)
    cell = files.read_json(os.path.join(path, "cell.json"))
    if cell is None:
      print(f"{name} is left out: its folder has no cell.json", flush=True)
      continue
    row = read_cell(path)
    if cell["command"] == "infer":
      continue
    if row["status"] != "finished":
      missing.append(name)
      continue
    place = {_known_axis(axis): label for axis, label in cell["axes"].items()}
    on_grid = not {"lambda", "divergence", "alpha"} & set(place)
    place.setdefault("method", cell["stage"])
    runs.append(Run(place, cell["seed"], _only_scores(row), path, on_grid))
  return runs, missing


def _only_scores(row):
  return {
    k: float(v)
    for k, v in row.items()
    if "/" in k or k in ("seconds", "step_seconds", "params", "steps")
  }


def _known_axis(name):
  for known, names in _AXES.items():
    if name in names:
      return known
  return name


def _metric(runs):
  names = {
    name.removeprefix("greedy/"): None
    for run in runs
    for name in run.scores
    if name.startswith("greedy/")
  }
  for name in (*_METRICS, *names):
    if name in names:
      return name
  raise ValueError(
    "expected a run with scores in final.json, got none; set FINAL_EVAL_SPLIT"
  )


def _gin_macros(folder) -> dict[str, str]:
  """Macros of a run's `config.gin`, as they are written there."""
  path = files.absolute(folder) / "config.gin"
  if not path.exists():
    return {}
  return dict(re.findall(r"^([A-Z][A-Z0-9_]*) = (.*)$", path.read_text(), re.M))


def _task(runs):
  names = {_gin_macros(run.folder).get("MIXTURE_OR_TASK_NAME") for run in runs}
  return next((name.strip("'\"") for name in names if name), "")


def _paper(task: str, metric: str) -> dict[str, Any]:
  """The paper's numbers on the task whose name this one starts with."""
  source = (
    importlib.resources.files("gkd_jax.experiments") / "paper_results.json"
  )
  with source.open(encoding="utf-8") as f:
    results = json.load(f)
  for name, table in results.items():
    if task.lower().startswith(name) and table["metric"] == metric:
      return table
  return {}
