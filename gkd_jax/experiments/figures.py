"""Figures of scores: method bars, heat maps, learning curves, data efficiency.

Each takes a study and gives a `Picture`, or None if the runs lack what it
shows. Intervals are `run_folders.estimate`'s over seeds.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import figure, ticker

from gkd_jax import files
from gkd_jax.experiments import run_folders

# Okabe and Ito's palette, which colour-blind readers tell apart.
COLORS = (
  *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
  *("#8B4513", "#6A3D9A", "#555555", "#B0B000"),
)
# One fewer than the colours: the pair repeats after ninety methods.
_MARKERS = "osD^vP*Xh"
_HOW = {"greedy": "greedy", "sampled": "sampled at temperature 1"}


@dataclasses.dataclass(frozen=True)
class Picture:
  """A figure with the name of its file, its heading and what it says."""

  name: str
  title: str
  caption: str
  figure: figure.Figure


def method_bars(study: run_folders.Study) -> Picture | None:
  """Score of each method, greedy and sampled, a panel for each regime."""
  runs = [run for run in study.runs if run.on_grid and has_score(study, run)]
  if not runs:
    return None
  regimes = regimes_of(study, runs)
  methods = [m for m in study.axes["method"] if has_method(runs, m)]
  picture, panels = grid_of_panels(
    regimes, height=0.42 * len(methods) + 0.9, width=4.6, sharey=True
  )
  paper = study.paper.get("methods", {})
  shown = False
  for panel, (regime, members) in zip(panels, regimes.items(), strict=True):
    for offset, how, color in ((-0.19, "greedy", 0), (0.19, "sampled", 1)):
      for y, method in enumerate(methods):
        values = run_folders.scores(
          (r for r in members if r.place["method"] == method),
          f"{how}/{study.metric}",
        )
        if values:
          draw_bar(panel, y + offset, values, COLORS[color])
      panel.barh(0, 0, color=COLORS[color], label=_HOW[how])
    for y, method in enumerate(methods):
      if not most_labelled(study, dict(regime)):
        continue
      value = paper.get(run_folders.method_key(method), {}).get(
        dict(regime).get("size", "").removeprefix("t5-")
      )
      if value is not None:
        panel.plot(value, y, "D", color="black", markersize=6)
        shown = True
    panel.set_yticks(range(len(methods)), methods)
    panel.invert_yaxis() if panel is panels[0] else None
    panel.set(title=regime_title(regime), xlabel=axis_label(study))
    zoom(panel)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
  if shown:
    panels[0].plot([], [], "D", color="black", label="the paper's")
  legend_below(picture, panels[0])
  return Picture(
    "methods",
    "Methods",
    f"{axis_label(study)} of each method; dots are seeds. {seeds_note(runs)}"
    + (f" Diamonds: the paper's: {study.paper['task']}." if shown else ""),
    picture,
  )


def heat_maps(study: run_folders.Study) -> Picture | None:
  """Mean score for each student-data fraction λ and divergence."""
  runs = [r for r in study.runs if {"lambda", "divergence"} <= set(r.place)]
  runs = [run for run in runs if has_score(study, run)]
  if not runs:
    return None
  fractions = [
    x for x in study.axes["lambda"] if any(r.place["lambda"] == x for r in runs)
  ]
  fractions.sort(key=float, reverse=True)
  names = [
    x
    for x in study.axes["divergence"]
    if any(r.place["divergence"] == x for r in runs)
  ]
  panels = {
    (*regime, ("decoding", _HOW[how])): (members, how)
    for regime, members in regimes_of(study, runs).items()
    for how in _HOW
  }
  picture, axes = grid_of_panels(
    panels,
    height=0.65 * len(fractions) + 1.3,
    width=0.95 * len(names) + 1.8,
    columns=2,
  )
  shown = False
  for panel, (regime, (members, how)) in zip(axes, panels.items(), strict=True):
    cells, theirs = {}, {}
    for run in members:
      cell = run.place["lambda"], run.place["divergence"]
      values = run_folders.scores(
        (r for r in members if r.place == run.place), f"{how}/{study.metric}"
      )
      if values:
        row, column = fractions.index(cell[0]), names.index(cell[1])
        cells[row, column] = run_folders.estimate(values)
        if most_labelled(study, run.place):
          theirs[row, column] = run_folders.papers_cell(study, run, how)
    shape = len(fractions), len(names)
    draw_heat_map(panel, shape, cells, theirs, study.lower_is_better)
    shown |= any(theirs.values())
    panel.set_xticks(range(len(names)), names, rotation=20, ha="right")
    panel.set_yticks(range(len(fractions)), fractions)
    panel.set(title=regime_title(regime), ylabel="λ")
  return Picture(
    "lambda_divergence",
    "Student-data fraction λ and divergence",
    f"Mean {axis_label(study)} over seeds; rows are the fraction λ of steps on"
    " the student's own samples, columns the divergence. A darker cell is a"
    " better one; each panel has its own scale."
    f" {seeds_note(runs, 'Numbers with ±')}"
    + (f" In italics {study.paper['grid']['source']}." if shown else ""),
    picture,
  )


def learning_curves(study: run_folders.Study) -> Picture | None:
  """Score on validation examples over training steps."""
  curves: dict[str, list[tuple[int, float]]] = {}
  key = f"eval/{study.metric}"
  runs = [run for run in study.runs if run.on_grid]
  for run in runs:
    rows = run_folders.read_metrics(run.folder)
    curve = [
      (r["step"], r[key]) for r in rows if r.get(key) is not None and r["step"]
    ]
    if curve:
      curves[run.folder] = curve
  if not curves:
    return None
  regimes = regimes_of(study, [r for r in runs if r.folder in curves])
  picture, panels = grid_of_panels(regimes, height=3.4, width=4.8)
  for panel, (regime, members) in zip(panels, regimes.items(), strict=True):
    for method in ordered(study, members, "method"):
      style = style_of(study, method)
      lines = [curves[r.folder] for r in members if r.place["method"] == method]
      draw_curves(panel, lines, style, method)
    for run in runs:
      # A shipped model has no curve; its file says what a last point would be.
      final = files.read_json(os.path.join(run.folder, "final.json")) or {}
      level = (final.get("validation") or {}).get(study.metric)
      if level is not None and run.folder not in curves:
        panel.axhline(
          level, color="grey", linestyle="--", label=run.place["method"]
        )
    panel.set(title=regime_title(regime), xlabel="step")
    panel.set_ylabel(axis_label(study))
    panel.grid(alpha=0.3)
  legend_below(picture, *panels)
  return Picture(
    "learning_curves",
    "Learning curves",
    f"Greedy {axis_label(study)} on validation examples over steps: the mean of"
    " the seeds, and the range from the least to the greatest of them.",
    picture,
  )


def data_efficiency(study: run_folders.Study) -> Picture | None:
  """Score against the number of labelled examples, a line for each method."""
  runs = [r for r in study.runs if r.on_grid and "labelled" in r.place]
  runs = [run for run in runs if has_score(study, run)]
  labels = ordered(study, runs, "labelled")
  if len(labels) < 2:
    return None
  counts = [run_folders.examples_count(label) for label in labels]
  xs: Sequence[Any] = range(len(labels))
  if all(counts):
    xs = counts
  panels = {
    (("size", size), ("decoding", _HOW[how])): (size, how)
    for size in ordered(study, runs, "size") or [None]
    for how in _HOW
  }
  picture, axes = grid_of_panels(panels, height=3.4, width=4.8, columns=2)
  for panel, (regime, (size, how)) in zip(axes, panels.items(), strict=True):
    present = ordered(study, runs, "method")
    for i, method in enumerate(present):
      points = []
      for x, label in zip(
        beside(xs, i, len(present), bool(all(counts))), labels, strict=True
      ):
        place = {"method": method, "labelled": label}
        place |= {"size": size} if size else {}
        values = run_folders.scores(
          (r for r in runs if place.items() <= r.place.items()),
          f"{how}/{study.metric}",
        )
        if values:
          points.append((x, run_folders.estimate(values)))
      draw_estimates(panel, points, style_of(study, method), method)
    if all(counts):
      panel.set_xscale("log")
      panel.xaxis.set_minor_locator(ticker.NullLocator())
    panel.set_xticks(xs, labels)
    panel.set(title=regime_title(regime), xlabel="labelled examples")
    panel.set_ylabel(axis_label(study))
    panel.grid(alpha=0.3)
  legend_below(picture, *axes)
  return Picture(
    "data_efficiency",
    "Data efficiency",
    f"{axis_label(study)} against the number of labelled examples."
    f" {seeds_note(runs)}",
    picture,
  )


# ---- what figures share ------------------------------------------------------


def axis_label(study: run_folders.Study) -> str:
  """The metric, and which way is better."""
  name = study.metric.replace("_", " ")
  name = name.upper() if len(name) <= 4 else name
  return f"{name} ({'lower' if study.lower_is_better else 'higher'} is better)"


def has_score(study, run) -> bool:
  """Whether the run was scored by the study's metric."""
  return any(f"{how}/{study.metric}" in run.scores for how in _HOW)


def has_method(runs, method) -> bool:
  """Whether a run is of that method."""
  return any(run.place["method"] == method for run in runs)


def ordered(study, runs, axis) -> list[str]:
  """Points of an axis that the runs have, in the study's order."""
  present = {run.place[axis] for run in runs if axis in run.place}
  return [label for label in study.axes.get(axis, ()) if label in present]


def regimes_of(study, runs) -> dict[tuple, list[run_folders.Run]]:
  """Runs by student size and labelled examples, in the study's order.

  A run without one of them, such as the teacher's, is in every regime.
  """
  names = [a for a in ("size", "labelled") if ordered(study, runs, a)]
  found = {}
  places = [()]
  for axis in names:
    places = [
      (*p, (axis, label))
      for p in places
      for label in ordered(study, runs, axis)
    ]
  for place in places:
    members = [r for r in runs if all(r.place.get(a, x) == x for a, x in place)]
    if any(all(a in r.place for a, _ in place) for r in members):
      found[place] = members
  return found


def most_labelled(study, place) -> bool:
  """Whether a place has as many labelled examples as any, as the paper's do."""
  labels = study.axes.get("labelled", ())
  if not labels or "labelled" not in place:
    return True
  count = lambda label: run_folders.examples_count(label) or float("inf")
  return count(place["labelled"]) == max(map(count, labels))


def regime_title(regime) -> str:
  """A panel's heading, such as "small, 3k labelled, greedy"."""
  words = {"labelled": "{} labelled"}
  return ", ".join(
    words.get(axis, "{}").format(label) for axis, label in regime if label
  )


def seeds_note(runs, what="Thin lines") -> str:
  """What the intervals are, and a warning where there are few seeds."""
  counts = {
    len(members)
    for members in run_folders.groups(
      runs, lambda run: tuple(run.place.items())
    ).values()
  }
  few, many = min(counts), max(counts)
  if many == 1:
    return "One seed: no interval can be given, differences may be chance."
  text = f"{few} to {many}" if few != many else f"{many}"
  note = f"{what}: 95 % t-intervals of the mean over {text} seeds."
  if few < 4:
    note += " So few seeds make wide intervals"
    note += ", and one seed none." if few == 1 else "."
  return note


def style_of(study, method) -> dict[str, Any]:
  """Colour and marker of a method, the same in every figure."""
  names = list(study.axes["method"])
  place = names.index(method)
  return {
    "color": COLORS[place % len(COLORS)],
    "marker": _MARKERS[place % len(_MARKERS)],
  }


def grid_of_panels(panels, *, height, width, columns=None, **options):
  """A figure with a panel for each of `panels`; sizes in inches of one."""
  # More than three are read two by two: a page's width is what there is.
  columns = min(columns or (3 if len(panels) < 4 else 2), len(panels))
  rows = -(-len(panels) // columns)
  picture = figure.Figure(
    figsize=(width * columns, height * rows + 0.7), layout="constrained"
  )
  axes = picture.subplots(rows, columns, squeeze=False, **options).ravel()
  for panel in axes:
    panel.spines[["top", "right"]].set_visible(False)
  for panel in axes[len(panels) :]:
    panel.set_visible(False)
  return picture, list(axes[: len(panels)])


def legend_below(picture, *panels):
  """One legend for all panels, each name once."""
  found = {}
  for panel in panels:
    for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
      found.setdefault(label, handle)
  if found:
    picture.legend(
      list(found.values()),
      list(found),
      loc="outside lower center",
      ncols=min(max(1, int(picture.get_figwidth() // 1.9)), len(found)),
      frameon=False,
    )


def beside(xs, i, count, log) -> list[float]:
  """Places of line `i` of `count`, a little apart so that intervals are seen."""
  shift = 0.01 * (i - (count - 1) / 2)
  if log:
    return [x * (max(xs) / min(xs)) ** shift for x in xs]
  return [x + shift * (max(xs) - min(xs)) for x in xs]


def draw_bar(panel, y, values, color):
  """The mean as a bar, its interval, and the seeds as dots."""
  summary = run_folders.estimate(values)
  panel.barh(y, summary.mean, height=0.36, color=color, alpha=0.85)
  if summary.low is not None:
    panel.plot(
      [summary.low, summary.high], [y, y], color="black", linewidth=1.3
    )
  panel.plot(values, [y] * len(values), ".", color="black", markersize=4)


def zoom(panel):
  """Starts the axis near the least bar, where bars would look alike from 0."""
  lows = [bar.get_width() for bar in panel.patches if bar.get_width()]
  if lows and min(lows) > 0 and min(lows) > 0.6 * max(lows):
    panel.set_xlim(left=min(lows) - 0.5 * (max(lows) - min(lows)) - 0.02)


def draw_heat_map(panel, shape, cells, theirs, lower_is_better):
  """Cells with their means, intervals, the paper's; the better, the darker."""
  sign = -1 if lower_is_better else 1
  table = np.full(shape, np.nan)
  for place, summary in cells.items():
    table[place] = sign * summary.mean
  panel.imshow(table, cmap="Blues", aspect="auto")
  middle = np.nanmean([np.nanmin(table), np.nanmax(table)])
  for (row, column), summary in cells.items():
    text = f"{summary.mean:.1f}"
    if summary.high is not None:
      text += f"\n± {summary.high - summary.mean:.1f}"
    color = "white" if table[row, column] > middle else "black"
    style = {"ha": "center", "color": color, "size": 9}
    paper = theirs.get((row, column))
    panel.text(column, row - 0.1 * bool(paper), text, va="center", **style)
    if paper:
      panel.text(
        column, row + 0.45, f"{paper:.1f}", va="bottom", style="italic", **style
      )


def draw_curves(panel, lines, style, label):
  """The mean of several curves where all have a point, and their range."""
  common = sorted(set.intersection(*({x for x, _ in line} for line in lines)))
  table = np.array([[dict(line)[x] for x in common] for line in lines])
  panel.plot(common, table.mean(0), **style, markersize=3.5, label=label)
  if len(lines) > 1:
    panel.fill_between(
      common,
      table.min(0),
      table.max(0),
      color=style["color"],
      alpha=0.15,
      linewidth=0,
    )


def draw_estimates(panel, points, style, label):
  """A line through means, with their intervals."""
  if not points:
    return
  xs, summaries = zip(*points, strict=True)
  panel.plot(
    xs, [s.mean for s in summaries], **style, markersize=4.5, label=label
  )
  for x, summary in points:
    if summary.low is not None:
      panel.plot(
        [x, x],
        [summary.low, summary.high],
        color=style["color"],
        linewidth=1.2,
        alpha=0.7,
      )
