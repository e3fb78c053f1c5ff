"""Tables of a report: scores with intervals, the paper's numbers, examples."""

import dataclasses
import difflib
import os
import re
from collections.abc import Collection, Sequence

from gkd_jax import files
from gkd_jax.experiments import metrics, studies

_EXAMPLES = 6
_SCORES = 3  # that a table shows of each way of decoding
_RESULTS_CAPTION = (
  "Scores of the whole final split, greedy and sampled at temperature 1. In"
  " brackets the 95 % t-interval of the mean over seeds; with one seed there is"
  " none. Bold: the best method at each point of the other axes, the teacher"
  " aside."
)
_WITHIN = re.compile(r"\(-?[\d.]+ to -?[\d.]+\)$")
_NONE_WITHIN = " (-)"
_NONE_WITHIN_CAPTION = (
  " (-): every example has the same value, so that there is no interval."
)
_WITHIN_CAPTION = (
  " In parentheses, of one seed, the 95 % bootstrap interval over the split's"
  " examples, which says nothing of other seeds."
)


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of texts under a heading.

  Attributes:
    title: the heading.
    caption: below the rows.
    rows: the first one names the columns.
    is_examples: whether the columns are input, reference, teacher and students.
    best: (row, column) of the cells to emphasise.
  """

  title: str
  caption: str
  rows: Sequence[Sequence[str]]
  is_examples: bool = False
  best: Collection[tuple[int, int]] = ()

  @property
  def name(self) -> str:
    """The title as an anchor."""
    return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def results(study: studies.Study) -> list[Table]:
  """Returns the scores of each place of the grid: means over seeds, intervals.

  The first table compares the methods; each other one has points of further axes.
  """
  runs = [run for run in study.runs if study.has_score(run)]
  kinds = studies.groups(
    runs, lambda run: () if run.on_grid else tuple(run.place)
  )
  tables = []
  for kind, members in sorted(kinds.items(), key=lambda pair: bool(pair[0])):
    more = [axis for axis in kind if axis != "method"]
    title = f"Results by {', '.join(more)}" if more else "Results"
    rows, best = _result_rows(study, members)
    caption = _RESULTS_CAPTION
    if any(_WITHIN.search(cell) for row in rows[1:] for cell in row):
      caption += _WITHIN_CAPTION
    if any(cell.endswith(_NONE_WITHIN) for row in rows[1:] for cell in row):
      caption += _NONE_WITHIN_CAPTION
    tables.append(Table(title, caption, rows, best=best))
  return tables


def _result_rows(study, runs):
  axes = _axes(study, runs)
  names = _score_names(study, runs)
  times = {"seconds": "seconds", "start_seconds": "to the first step"}
  costs = {"params": "parameters"} | {
    name: head
    for name, head in times.items()
    if any(name in run.scores for run in runs)
  }
  heads = [*axes, "seeds", *(n.replace("/", " ") for n in names)]
  rows = [[*heads, *costs.values()]]
  places = _places(study, runs, axes)
  for members in places:
    row = [members[0].place.get(axis, "") for axis in axes]
    row.append(str(len(members)))
    row += [_show_score(members, name) for name in names]
    for name in costs:
      mean = studies.mean_score(members, name)
      row.append(f"{mean.mean:,.0f}" if mean else "")
    rows.append(row)
  return rows, _best(study, places, names, first=len(axes) + 1)


def _best(study, places, names, first) -> set[tuple[int, int]]:
  """Returns (row, column) of the best methods, equal ones included."""
  found = set()
  rivals: dict[tuple, list[int]] = {}
  for row, (run, *_) in enumerate(places, 1):
    if run.place["method"].lower() != "teacher":
      others = {**run.place, "method": ""}
      rivals.setdefault(tuple(others.items()), []).append(row)
  for column, name in enumerate(names, first):
    metric = name.partition("/")[2]
    is_lower = metrics.of(metric).lower_is_better
    if metric == study.metric:
      is_lower = study.lower_is_better
    for rows in rivals.values():
      means = {
        row: mean.mean * (-1 if is_lower else 1)
        for row in rows
        if (mean := studies.mean_score(places[row - 1], name))
      }
      if len(means) > 1:
        top = max(means.values())
        found |= {(row, column) for row, m in means.items() if m == top}
  return found


def rl_tradeoff(study: studies.Study) -> Table | None:
  """Returns reward and divergence of RL + GKD by α, and differences between α.

  The differences are between runs of the same seed: they have the same first
  parameters and prompts and, as long as they agree, the same samples.
  """
  runs = [run for run in study.runs if "alpha" in run.place]
  late = {run.folder: studies.late_means(run.folder) for run in runs}
  runs = [run for run in runs if "reward" in late[run.folder]]
  runs = [run for run in runs if studies.divergence_of(late[run.folder])]
  if not runs:
    return None
  name = studies.divergence_of(late[runs[0].folder]) or ""
  divergence = metrics.of(name)
  words = divergence.label
  axes = _axes(study, runs)
  heads = ["seeds", "reward", words, "reward - at α = 1", f"{words} - at α = 0"]
  rows = [[*axes, *heads]]
  for members in _places(study, runs, axes):
    row = [members[0].place.get(axis, "") for axis in axes]
    row.append(str(len(members)))
    for key in ("reward", name):
      values = [late[run.folder][key] for run in members]
      row.append(_show(studies.estimate(values), 4))
    for key, alpha in (("reward", 1), (name, 0)):
      pairs = _paired(runs, members, alpha)
      gaps = [late[a.folder][key] - late[b.folder][key] for a, b in pairs]
      same = float(members[0].place["alpha"]) == alpha
      row.append("" if same or not gaps else _show(studies.estimate(gaps), 4))
    rows.append(row)
  caption = (
    f"Means over the last fifth of training; {words} to the teacher in"
    f" {divergence.unit} of own samples. Differences are between runs of the same seed. In"
    " brackets 95 % t-intervals over seeds."
  )
  return Table("Reward and divergence by α", caption, rows)


def _paired(runs, members, alpha):
  """Pairs each run with the one at this α that has its seed and place."""
  place = {**members[0].place, "alpha": ""}
  others = {
    run.seed: run
    for run in runs
    if float(run.place["alpha"]) == alpha
    and {**run.place, "alpha": ""} == place
  }
  return [(run, others[run.seed]) for run in members if run.seed in others]


def paper(study: studies.Study) -> Table | None:
  """Returns the paper's numbers beside ours, if the task is one of the paper's."""
  if not study.paper:
    return None
  methods = study.paper["methods"]
  sizes = ("small", "base", "large")
  rows = [["method", *(f"{s}, {w}" for s in sizes for w in ("paper", "ours"))]]
  for method in study.axes["method"]:
    theirs = methods.get(studies.method_key(method))
    if theirs is None:
      continue
    row = [method]
    for size in sizes:
      ours = [
        run
        for run in study.runs
        if run.on_grid
        and run.place["method"] == method
        and run.place.get("size", "").removeprefix("t5-") == size
        and study.has_most_labelled(run.place)
      ]
      row.append(f"{theirs[size]:.2f}" if size in theirs else "")
      row.append(_show(studies.mean_score(ours, f"greedy/{study.metric}")))
    rows.append(row)
  rows.append(["teacher", f"{study.paper['teacher']:.2f}", *[""] * 5])
  caption = (
    f"{study.paper['task']}. Ours are greedy, with all the labelled examples"
    " that there are, and intervals as above."
  )
  return Table("The paper's numbers", caption, rows)


def examples(study: studies.Study) -> Table | None:
  """Returns the outputs of each method for the same inputs, side by side."""
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
    is_examples=True,
  )


def marks(output: str, references: str) -> list[tuple[str, bool]]:
  """Splits an output at the words in which it differs from a reference.

  >>> marks("a red house", "a house")
  [('a ', False), ('red ', True), ('house', False)]

  Args:
    output: a cell of a table of examples.
    references: the reference's cell; of several, the most similar one counts.

  Returns:
    Pieces, and whether each differs; an empty one stands where words are missing.
  """
  words = lambda value: re.findall(r"\S+", value)
  pieces = re.findall(r"\s*\S+\s*", output)
  matches = [
    difflib.SequenceMatcher(None, words(reference), words(output), False)
    for reference in references.split(" | ")
  ]
  best = max(matches, key=lambda match: match.ratio())
  return [
    ("".join(pieces[low:high]), tag != "equal")
    for tag, _, _, low, high in best.get_opcodes()
  ]


def text(table: Table) -> str:
  """Returns a table as text, its columns aligned by spaces."""
  widths = [max(map(len, column)) for column in zip(*table.rows, strict=True)]
  lines = []
  for row in table.rows:
    cells = [
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def _show(summary: studies.Estimate | None, digits: int = 1) -> str:
  """Returns the mean, with the interval in brackets if there is one."""
  if summary is None:
    return ""
  if summary.low is None:
    return f"{summary.mean:.{digits}f}"
  low, high = f"{summary.low:.{digits}f}", f"{summary.high:.{digits}f}"
  return f"{summary.mean:.{digits}f} [{low}, {high}]"


def _show_score(runs, name) -> str:
  """Returns the mean over seeds; of one, with its interval over examples."""
  summary = studies.mean_score(runs, name)
  within = [run.intervals[name] for run in runs if name in run.intervals]
  if summary is None or summary.count > 1 or len(within) != 1:
    return _show(summary)
  if within[0] is None:
    return _show(summary) + _NONE_WITHIN
  low, high = within[0]
  return f"{_show(summary)} ({low:.1f} to {high:.1f})"


def _axes(study, runs) -> list[str]:
  """Returns the axes on which the runs have a point, the method first."""
  axes = [a for a in study.axes if any(a in run.place for run in runs)]
  return sorted(axes, key=lambda axis: axis != "method")


def _score_names(study, runs) -> list[str]:
  """Returns the scores to show: the study's metric and a few more."""
  found = {}
  for run in runs:
    for name in run.scores:
      how, slash, metric = name.partition("/")
      if slash and how in ("greedy", "sampled"):
        found.setdefault(metric, None)
  shown = sorted(found, key=lambda metric: metric != study.metric)[:_SCORES]
  return [f"{how}/{m}" for how in ("greedy", "sampled") for m in shown]


def _places(study, runs, axes):
  """Groups runs that differ by the seed alone, in the order of the points."""
  found = studies.groups(runs, lambda run: tuple(run.place.items()))

  def order(members):
    place = members[0].place
    return [
      list(study.axes[axis]).index(place[axis]) if axis in place else -1
      for axis in axes
    ]

  return sorted(found.values(), key=order)


def _text(value) -> str:
  """Returns an output, or several references in one text."""
  if isinstance(value, list | tuple):
    return " | ".join(map(str, value))
  return str(value)
