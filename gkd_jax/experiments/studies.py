"""The runs of a report: where each stands in a grid, and groups of seeds."""

import dataclasses
import importlib.resources
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from gkd_jax import files
from gkd_jax.experiments import metrics, run_folders

# What an axis of a sweep may be called; the report uses the first name.
_AXES = {
  "method": ("method",),
  "size": ("size",),
  "labelled": ("labelled",),
  "lambda": ("lambda", "STUDENT_DATA_FRACTION"),
  "divergence": ("divergence", "DIVERGENCE"),
  "alpha": ("alpha", "ALPHA", "RL_ALPHA"),
  "temperature": ("temperature", "SAMPLING_TEMPERATURE"),
}
# The last fifth of a run's steps shows where training ended up.
_LATE = 0.8


@dataclasses.dataclass(frozen=True)
class Run:
  """One run.

  Attributes:
    place: axis to the run's point on it: `method` always, the axes that the
      report knows, and any other axis under its own name.
    seed: None if it is not known.
    scores: `greedy/wer` and the like, as they were written.
    folder: of its curves and examples.
    on_grid: whether it is one of the methods to compare, and not a point of a
      λ, divergence or α axis.
    intervals: score to the 95 % bootstrap interval over its examples, as far as
      the run has written these.
  """

  place: Mapping[str, str]
  seed: int | None
  scores: Mapping[str, float]
  folder: str
  on_grid: bool
  intervals: Mapping[str, tuple[float, float] | None] = dataclasses.field(
    default_factory=dict
  )


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
    paper: the paper's numbers on this task, {} if the paper has none.
    unfinished: names of cells without scores.
    commands: of the sweeps and single runs, as far as they are known.
  """

  title: str
  runs: Sequence[Run]
  axes: Mapping[str, Sequence[str]]
  metric: str
  lower_is_better: bool
  paper: Mapping[str, Any]
  unfinished: Sequence[str]
  commands: Sequence[str] = ()

  @property
  def metric_label(self) -> str:
    """The metric's name, and which way is better."""
    better = "lower" if self.lower_is_better else "higher"
    return f"{metrics.of(self.metric).label} ({better} is better)"

  def has_score(self, run: Run) -> bool:
    """Whether the run was scored by the study's metric."""
    return bool(
      {f"greedy/{self.metric}", f"sampled/{self.metric}"} & set(run.scores)
    )

  def points(self, axis: str, runs: Iterable[Run]) -> list[str]:
    """Returns the points of an axis that the runs have, in the study's order."""
    present = {run.place[axis] for run in runs if axis in run.place}
    return [label for label in self.axes.get(axis, ()) if label in present]

  def has_most_labelled(self, place: Mapping[str, str]) -> bool:
    """Whether no place has more labelled examples; the paper's have all."""
    labels = self.axes.get("labelled", ())
    if not labels or "labelled" not in place:
      return True
    count = lambda label: examples_count(label) or float("inf")
    return count(place["labelled"]) == max(map(count, labels))


def estimate(values: Iterable[float]) -> Estimate:
  """Returns the mean and its 95 % t-interval, with n - 1 degrees of freedom.

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
  """Returns a run's mean reward and divergences over its last fifth of steps."""
  rows = run_folders.read_metrics(folder)
  if not rows:
    return {}
  late = [row for row in rows if row["step"] > _LATE * rows[-1]["step"]]
  return {
    name: float(np.mean(values))
    for name in ("reward", *metrics.DIVERGENCES)
    if (values := [r[name] for r in late if r.get(name) is not None])
  }


def divergence_of(means: Mapping[str, float]) -> str | None:
  """Returns the divergence that `late_means` has, reverse KL if it has both."""
  return next((name for name in metrics.DIVERGENCES if name in means), None)


def groups(
  runs: Iterable[Run], key: Callable[[Run], Any]
) -> dict[Any, list[Run]]:
  """Groups runs by a key, in the order of first appearance."""
  found: dict[Any, list[Run]] = {}
  for run in runs:
    found.setdefault(key(run), []).append(run)
  return found


def scores(runs: Iterable[Run], name: str) -> list[float]:
  """Returns the scores of that name, of the runs that have it."""
  return [run.scores[name] for run in runs if name in run.scores]


def mean_score(runs: Iterable[Run], name: str) -> Estimate | None:
  """Returns the mean of a score over the runs that have it, None if none has."""
  values = scores(runs, name)
  return estimate(values) if values else None


def examples_count(label: str) -> float | None:
  """Returns how many labelled examples "1000", "3k" or "5%" means; else None.

  >>> examples_count("3k"), examples_count("0.5%"), examples_count("all")
  (3000.0, 0.5, None)
  """
  match = re.fullmatch(r"([\d.,]+)\s*([kKM%]?)", label.strip())
  if not match:
    return None
  scale = {"k": 1e3, "K": 1e3, "M": 1e6}.get(match[2], 1.0)
  return float(match[1].replace(",", "")) * scale


def method_key(name: str) -> str:
  """Returns the key of a method in the table of the paper's numbers.

  >>> method_key("On-policy GKD"), method_key("f-distill"), method_key("gkd")
  ('onpolicykd', 'fdistill', 'onpolicykd')
  """
  key = re.sub(r"[^a-z0-9]", "", name.lower())
  return {"gkd": "onpolicykd", "onpolicygkd": "onpolicykd"}.get(key, key)


def paper_cell(study: Study, run: Run, how: str) -> float | None:
  """Returns the paper's score at the run's size, λ and divergence, or None.

  Args:
    study: on a task of the paper, or another.
    run: with a point of the λ and the divergence axis.
    how: "greedy" or "sampled".
  """
  grid = study.paper.get("grid", {})
  size = run.place.get("size", "").removeprefix("t5-")
  rows = grid.get(how, {}).get(size, {})
  row = rows.get(f"{float(run.place['lambda']):g}")
  divergence = method_key(run.place["divergence"])
  if not row or divergence not in grid["divergences"]:
    return None
  return row[grid["divergences"].index(divergence)]


def read(items: Sequence[str]) -> Study:
  """Reads sweeps and runs.

  Args:
    items: folders of sweeps, and `NAME=FOLDER` or `FOLDER` of single runs; a
      name given twice is another seed of the same method.

  Raises:
    ValueError: a folder is neither, or nothing is finished.
  """
  runs: list[Run] = []
  unfinished: list[str] = []
  commands: list[str] = []
  settings: dict[str, Any] = {}
  order: dict[str, dict[str, None]] = {}
  for item in items:
    name, folder = run_folders.name_and_folder(item)
    sweep = files.read_json(os.path.join(folder, "sweep.json"))
    if sweep is None:
      runs.append(_single(name, folder))
      commands.append(run_folders.read_origin(folder)[0])
      continue
    commands.append(sweep["report"].get("command", ""))
    settings |= sweep["report"]
    for axis, labels in sweep["axes"].items():
      if axis == "method":
        continue  # in the order of the runs: stages without the axis come first
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
    lower_is_better=settings.get(
      "lower_is_better", metrics.of(metric).lower_is_better
    ),
    paper=_paper(settings.get("task") or _task(runs), metric),
    unfinished=unfinished,
    commands=[*filter(None, commands)],
  )


def _single(name, folder) -> Run:
  if not files.absolute(folder).is_dir():
    raise ValueError(
      f"expected the folder of a run or of a sweep, got {folder!r}, which is no"
      " folder; run `gkd report [NAME=]FOLDER ...`"
    )
  if not (files.absolute(folder) / "final.json").exists():
    raise ValueError(
      f"expected a finished run with final.json, or a sweep, got {folder!r};"
      " set FINAL_EVAL_SPLIT and start the run again, which then goes on to it"
    )
  seed = run_folders.read_macros(folder).get("SEED")
  return Run(
    {"method": name},
    int(seed) if seed else None,
    _only_scores(run_folders.read_cell(folder)),
    folder,
    True,
    run_folders.read_intervals(folder),
  )


def _of_sweep(folder, sweep):
  """Returns a sweep's finished runs, and the names of its other cells."""
  runs, missing = [], []
  for name in sweep["cells"]:
    path = os.path.join(folder, name)
    cell = files.read_json(os.path.join(path, "cell.json"))
    if cell is None:
      print(f"{name} is left out: its folder has no cell.json", flush=True)
      continue
    if cell["command"] == "infer":
      continue
    row = run_folders.read_cell(path)
    if row["status"] != "finished":
      missing.append(name)
      continue
    place = {_known_axis(axis): label for axis, label in cell["axes"].items()}
    on_grid = not {"lambda", "divergence", "alpha"} & set(place)
    place.setdefault("method", cell["stage"])
    scores, within = _only_scores(row), run_folders.read_intervals(path)
    runs.append(Run(place, cell["seed"], scores, path, on_grid, within))
  return runs, missing


def _only_scores(row):
  return {
    k: float(v)
    for k, v in row.items()
    if "/" in k
    or k in ("seconds", "start_seconds", "step_seconds", "params", "steps")
  }


def _known_axis(name):
  return next((axis for axis, names in _AXES.items() if name in names), name)


def _metric(runs):
  names = {
    name.removeprefix("greedy/"): None
    for run in runs
    for name in run.scores
    if name.startswith("greedy/")
  }
  for name in (*metrics.HEADLINES, *names):
    if name in names:
      return name
  raise ValueError(
    "expected a run with scores in final.json, got none; set FINAL_EVAL_SPLIT"
  )


def _task(runs):
  for run in runs:
    if name := run_folders.read_macros(run.folder).get("MIXTURE_OR_TASK_NAME"):
      return name
  return ""


def _paper(task: str, metric: str) -> dict[str, Any]:
  """Returns the paper's numbers on the task whose name this one starts with."""
  source = importlib.resources.files(__package__) / "paper_results.json"
  for name, table in json.loads(source.read_text("utf-8")).items():
    if task.lower().startswith(name) and table["metric"] == metric:
      return table
  return {}
