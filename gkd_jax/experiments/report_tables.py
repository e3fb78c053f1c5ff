"""Tables of a report: scores with intervals, the paper's numbers, examples."""

import dataclasses
import os
from collections.abc import Sequence

from gkd_jax import files
from gkd_jax.experiments import figures, run_folders

_EXAMPLES = 6
_SCORES = 3  # that a table shows of each way of decoding
_RESULTS_CAPTION = (
  "Scores of the whole final split, greedy and sampled at temperature 1. In"
  " brackets the 95 % t-interval of the mean over seeds; with one seed there is"
  " none."
)


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of texts under a heading; the first row names the columns."""

  title: str
  caption: str
  rows: Sequence[Sequence[str]]


def results(study: run_folders.Study) -> list[Table]:
  """Scores of every place of the grid, means over seeds, and intervals.

  The methods are one table; points of further axes are one for each.
  """
  runs = [run for run in study.runs if figures.has_score(study, run)]
  kinds = run_folders.groups(
    runs, lambda run: () if run.on_grid else tuple(run.place)
  )
  tables = []
  for kind, members in sorted(kinds.items(), key=lambda pair: bool(pair[0])):
    more = [axis for axis in kind if axis != "method"]
    title = f"Results by {', '.join(more)}" if more else "Results"
    tables.append(Table(title, _RESULTS_CAPTION, _result_rows(study, members)))
  return tables


def _result_rows(study, runs):
  axes = [a for a in study.axes if any(a in run.place for run in runs)]
  axes.sort(key=lambda axis: axis != "method")
  names = score_names(study, runs)
  seconds = any("seconds" in run.scores for run in runs)
  heads = [*axes, "seeds", *(n.replace("/", " ") for n in names), "parameters"]
  rows = [[*heads, *(["seconds"] if seconds else [])]]
  for members in _places(study, runs, axes):
    row = [members[0].place.get(axis, "") for axis in axes]
    row.append(str(len(members)))
    for name in names:
      values = run_folders.scores(members, name)
      row.append(show(run_folders.estimate(values)) if values else "")
    for name in ("params", "seconds"):
      values = run_folders.scores(members, name)
      if name == "params" or seconds:
        row.append(f"{sum(values) / len(values):,.0f}" if values else "")
    rows.append(row)
  return rows


def rl_tradeoff(study: run_folders.Study) -> Table | None:
  """Reward and divergence of RL + GKD, and what α changes in them.

  The differences are of runs with the same seed: they share the start, the
  prompts and, until they part, the samples.
  """
  runs = [run for run in study.runs if "alpha" in run.place]
  late = {run.folder: run_folders.late_means(run.folder) for run in runs}
  runs = [run for run in runs if "reward" in late[run.folder]]
  runs = [run for run in runs if run_folders.divergence_of(late[run.folder])]
  if not runs:
    return None
  name = run_folders.divergence_of(late[runs[0].folder]) or ""
  words = name.replace("_", " ").replace("kl", "KL")
  axes = [a for a in study.axes if any(a in run.place for run in runs)]
  axes.sort(key=lambda axis: axis != "method")
  heads = ["seeds", "reward", words, "reward - at α = 1", f"{words} - at α = 0"]
  rows = [[*axes, *heads]]
  for members in _places(study, runs, axes):
    row = [members[0].place.get(axis, "") for axis in axes]
    row.append(str(len(members)))
    for key in ("reward", name):
      values = [late[run.folder][key] for run in members]
      row.append(show(run_folders.estimate(values), 4))
    for key, alpha in (("reward", 1), (name, 0)):
      pairs = _paired(runs, members, alpha)
      gaps = [late[a.folder][key] - late[b.folder][key] for a, b in pairs]
      same = float(members[0].place["alpha"]) == alpha
      row.append(
        "" if same or not gaps else show(run_folders.estimate(gaps), 4)
      )
    rows.append(row)
  caption = (
    f"Means over the last fifth of training; {words} to the teacher in nats a"
    " token of own samples. Differences are between runs of the same seed. In"
    " brackets 95 % t-intervals over seeds."
  )
  return Table("Reward and divergence by α", caption, rows)


def _paired(runs, members, alpha):
  """Each run with the one at this α that has its seed and place."""
  place = {**members[0].place, "alpha": ""}
  others = {
    run.seed: run
    for run in runs
    if float(run.place["alpha"]) == alpha
    and {**run.place, "alpha": ""} == place
  }
  return [(run, others[run.seed]) for run in members if run.seed in others]


def paper(study: run_folders.Study) -> Table | None:
  """The paper's numbers beside ours, where the task is the paper's."""
  if not study.paper:
    return None
  methods = study.paper["methods"]
  sizes = ("small", "base", "large")
  rows = [["method", *(f"{s}, {w}" for s in sizes for w in ("paper", "ours"))]]
  for method in study.axes["method"]:
    theirs = methods.get(run_folders.method_key(method))
    if theirs is None:
      continue
    row = [method]
    for size in sizes:
      values = run_folders.scores(
        (
          run
          for run in study.runs
          if run.on_grid
          and run.place["method"] == method
          and run.place.get("size", "").removeprefix("t5-") == size
          and figures.most_labelled(study, run.place)
        ),
        f"greedy/{study.metric}",
      )
      row.append(f"{theirs[size]:.2f}" if size in theirs else "")
      row.append(show(run_folders.estimate(values)) if values else "")
    rows.append(row)
  rows.append(["teacher", f"{study.paper['teacher']:.2f}", *[""] * 5])
  caption = (
    f"{study.paper['task']}. Ours are greedy, with all the labelled examples"
    " that there are, and intervals as above."
  )
  return Table("The paper's numbers", caption, rows)


def examples(study: run_folders.Study) -> Table | None:
  """Outputs of each method for the same inputs, side by side."""
  found: dict[str, dict[str, dict]] = {}
  taken = []
  for run in study.runs:
    method = run.place["method"]
    if method in found or not run.on_grid:
      continue
    lines = files.read_json_lines(os.path.join(run.folder, "examples.jsonl"))
    if lines:
      last = max(line["step"] for line in lines)
      found[method] = {x["input"]: x for x in lines if x["step"] == last}
      taken.append(run)
  if not found:
    return None
  inputs = list(next(iter(found.values())))[:_EXAMPLES]
  methods = [m for m in study.axes["method"] if m in found]
  rows = [["input", "reference", "teacher", *methods]]
  for text in inputs:
    seen = [found[m][text] for m in methods if text in found[m]]
    teacher = next((x["teacher"] for x in seen if x.get("teacher")), "")
    rows.append(
      [
        text,
        _text(seen[0]["reference"]),
        _text(teacher),
        *(_text(found[m].get(text, {}).get("student", "")) for m in methods),
      ]
    )
  where = {k: v for k, v in taken[0].place.items() if k != "method"}
  note = f" ({', '.join(where.values())})" if where else ""
  return Table(
    "Decoded examples",
    "Greedy outputs for validation examples at the last step, of the first"
    f" seed{note}.",
    rows,
  )


def text(table: Table) -> str:
  """A table in columns of spaces."""
  widths = [max(map(len, column)) for column in zip(*table.rows, strict=True)]
  lines = []
  for row in table.rows:
    cells = [
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def show(summary: run_folders.Estimate, digits: int = 1) -> str:
  """Mean, and the interval in brackets if there is one."""
  if summary.low is None:
    return f"{summary.mean:.{digits}f}"
  low, high = f"{summary.low:.{digits}f}", f"{summary.high:.{digits}f}"
  return f"{summary.mean:.{digits}f} [{low}, {high}]"


def score_names(study, runs) -> list[str]:
  """The scores that a table shows: the study's metric and a few more."""
  found = {}
  for run in runs:
    for name in run.scores:
      how, slash, metric = name.partition("/")
      if slash and how in ("greedy", "sampled"):
        found.setdefault(metric, None)
  metrics = sorted(found, key=lambda metric: metric != study.metric)[:_SCORES]
  return [f"{how}/{m}" for how in ("greedy", "sampled") for m in metrics]


def _places(study, runs, axes):
  """Runs that differ by the seed alone, in the order of the axes' points."""
  found = run_folders.groups(runs, lambda run: tuple(run.place.items()))

  def order(members):
    place = members[0].place
    return [
      list(study.axes[axis]).index(place[axis]) if axis in place else -1
      for axis in axes
    ]

  return sorted(found.values(), key=order)


def _text(value) -> str:
  """An output or references, one text of several."""
  if isinstance(value, list | tuple):
    return " | ".join(map(str, value))
  return str(value)
