"""Figures of scores: method bars, heat maps, learning curves, data efficiency.

Each function takes a study and returns a `Picture`, or None if the runs lack
what it shows. Intervals are `studies.estimate`'s over seeds.
"""

import os

import numpy as np
from matplotlib import ticker

from gkd_jax import files
from gkd_jax.experiments import panels, run_folders, studies


def method_bars(study: studies.Study) -> panels.Picture | None:
  """Draws the score of each method, greedy and sampled, a panel for each regime."""
  runs = [run for run in study.runs if run.on_grid and study.has_score(run)]
  if not runs:
    return None
  regimes = panels.regimes(study, runs)
  methods = study.points("method", runs)
  picture, axes = panels.grid(
    regimes, height=0.42 * len(methods) + 0.9, width=4.6, sharey=True
  )
  has_paper = False
  for panel, (regime, members) in zip(axes, regimes.items(), strict=True):
    for offset, how, color in (
      (-0.19, "greedy", panels.color(0)),
      (0.19, "sampled", panels.color(1)),
    ):
      for y, method in enumerate(methods):
        of_method = [r for r in members if r.place["method"] == method]
        if values := studies.scores(of_method, f"{how}/{study.metric}"):
          _draw_bar(panel, y + offset, values, color)
      panel.barh(0, 0, color=color, label=panels.HOW[how])
    for y, method in enumerate(methods):
      value = _paper_score(study, dict(regime), method)
      if value is not None:
        panel.plot(value, y, "D", color="black", markersize=6)
        has_paper = True
    panel.set_yticks(range(len(methods)), methods)
    panel.set_xlabel(study.metric_label)
    _zoom(panel)
    panel.grid(visible=False, axis="y")
    panel.set_axisbelow(True)
  axes[0].invert_yaxis()
  if has_paper:
    axes[0].plot([], [], "D", color="black", label="the paper's")
  panels.legend_below(picture, axes[0])
  return panels.Picture(
    "methods",
    "Methods",
    f"{study.metric_label} of each method; dots are seeds."
    f" {panels.seeds_note(runs)}"
    + (f" Diamonds: the paper's: {study.paper['task']}." if has_paper else ""),
    picture,
  )


def _paper_score(study, place, method):
  if not study.has_most_labelled(place):
    return None
  scores = study.paper.get("methods", {}).get(studies.method_key(method), {})
  return scores.get(place.get("size", "").removeprefix("t5-"))


def heat_maps(study: studies.Study) -> panels.Picture | None:
  """Draws the mean score for each student-data fraction λ and divergence."""
  runs = [r for r in study.runs if {"lambda", "divergence"} <= set(r.place)]
  runs = [run for run in runs if study.has_score(run)]
  if not runs:
    return None
  fractions = sorted(study.points("lambda", runs), key=float, reverse=True)
  names = study.points("divergence", runs)
  parts = {
    (*regime, ("decoding", text)): (members, how)
    for regime, members in panels.regimes(study, runs).items()
    for how, text in panels.HOW.items()
  }
  picture, axes = panels.grid(
    parts,
    height=0.65 * len(fractions) + 1.3,
    width=0.95 * len(names) + 1.8,
    columns=2,
  )
  has_paper = False
  for panel, (members, how) in zip(axes, parts.values(), strict=True):
    cells, theirs = {}, {}
    for run in members:
      alike = [r for r in members if r.place == run.place]
      if mean := studies.mean_score(alike, f"{how}/{study.metric}"):
        row = fractions.index(run.place["lambda"])
        cell = row, names.index(run.place["divergence"])
        cells[cell] = mean
        if study.has_most_labelled(run.place):
          theirs[cell] = studies.paper_cell(study, run, how)
    shape = len(fractions), len(names)
    _draw_heat_map(panel, shape, cells, theirs, study.lower_is_better)
    has_paper |= any(theirs.values())
    panel.set_xticks(range(len(names)), names, rotation=20, ha="right")
    panel.set_yticks(range(len(fractions)), fractions)
    panel.set_ylabel("λ")
  return panels.Picture(
    "lambda_divergence",
    "Student-data fraction λ and divergence",
    f"Mean {study.metric_label} over seeds; rows are the fraction λ of steps on"
    " the student's own samples, columns the divergence. A darker cell is a"
    " better one; each panel has its own scale."
    f" {panels.seeds_note(runs, 'Numbers with ±')}"
    + (f" In italics {study.paper['grid']['source']}." if has_paper else ""),
    picture,
  )


def learning_curves(study: studies.Study) -> panels.Picture | None:
  """Draws the score on validation examples over training steps."""
  key = f"eval/{study.metric}"
  runs = [run for run in study.runs if run.on_grid]
  curves: dict[str, list[tuple[int, float]]] = {}
  for run in runs:
    rows = run_folders.read_metrics(run.folder)
    curve = [
      (r["step"], r[key]) for r in rows if r.get(key) is not None and r["step"]
    ]
    if curve:
      curves[run.folder] = curve
  if not curves:
    return None
  regimes = panels.regimes(study, [r for r in runs if r.folder in curves])
  levels = [
    (run.place["method"], level)
    for run in runs
    if run.folder not in curves
    and (level := _validation_score(study, run)) is not None
  ]
  picture, axes = panels.grid(regimes, height=3.4, width=4.8)
  for panel, members in zip(axes, regimes.values(), strict=True):
    for method in study.points("method", members):
      lines = [curves[r.folder] for r in members if r.place["method"] == method]
      _draw_curves(panel, lines, panels.method_style(study, method), method)
    for method, level in levels:
      panel.axhline(level, color="grey", linestyle="--", label=method)
    panel.set(xlabel="step", ylabel=study.metric_label)
  panels.legend_below(picture, *axes)
  return panels.Picture(
    "learning_curves",
    "Learning curves",
    f"Greedy {study.metric_label} on validation examples over steps: the mean"
    " of the seeds, and the range from the least to the greatest of them.",
    picture,
  )


def _validation_score(study, run):
  """Returns the final validation score, also of a model that was not trained."""
  path = os.path.join(run.folder, "final.json")
  final = files.read_json(path) or {}
  return (final.get("validation") or {}).get(study.metric)


def data_efficiency(study: studies.Study) -> panels.Picture | None:
  """Draws the score over the labelled examples, a line for each method."""
  runs = [r for r in study.runs if r.on_grid and "labelled" in r.place]
  runs = [run for run in runs if study.has_score(run)]
  labels = study.points("labelled", runs)
  if len(labels) < 2:
    return None
  counts = [studies.examples_count(label) for label in labels]
  is_log = all(counts)
  xs = counts if is_log else list(range(len(labels)))
  parts = {
    (("size", size), ("decoding", text)): (size, how)
    for size in study.points("size", runs) or [None]
    for how, text in panels.HOW.items()
  }
  picture, axes = panels.grid(parts, height=3.4, width=4.8, columns=2)
  methods = study.points("method", runs)
  for panel, (size, how) in zip(axes, parts.values(), strict=True):
    for i, method in enumerate(methods):
      shifted = _beside(xs, i, len(methods), is_log)
      points = []
      for x, label in zip(shifted, labels, strict=True):
        place = {"method": method, "labelled": label}
        place |= {"size": size} if size else {}
        there = [r for r in runs if place.items() <= r.place.items()]
        if mean := studies.mean_score(there, f"{how}/{study.metric}"):
          points.append((x, mean))
      _draw_estimates(panel, points, panels.method_style(study, method), method)
    if is_log:
      panel.set_xscale("log")
      panel.xaxis.set_minor_locator(ticker.NullLocator())
    panel.set_xticks(xs, labels)
    panel.set(xlabel="labelled examples", ylabel=study.metric_label)
  panels.legend_below(picture, *axes)
  return panels.Picture(
    "data_efficiency",
    "Data efficiency",
    f"{study.metric_label} against the number of labelled examples."
    f" {panels.seeds_note(runs)}",
    picture,
  )


def _beside(xs, i, count, is_log) -> list[float]:
  """Returns the xs of line `i` of `count`, shifted so that intervals show."""
  shift = 0.01 * (i - (count - 1) / 2)
  if is_log:
    return [x * (max(xs) / min(xs)) ** shift for x in xs]
  return [x + shift * (max(xs) - min(xs)) for x in xs]


def _draw_bar(panel, y, values, color):
  """Draws the mean as a bar, its interval, and the seeds as dots."""
  summary = studies.estimate(values)
  panel.barh(y, summary.mean, height=0.36, color=color, alpha=0.85)
  if summary.low is not None:
    panel.plot(
      [summary.low, summary.high], [y, y], color="black", linewidth=1.3
    )
  panel.plot(values, [y] * len(values), ".", color="black", markersize=4)


def _zoom(panel):
  """Starts the axis near the least bar if all bars would look alike from 0."""
  lows = [bar.get_width() for bar in panel.patches if bar.get_width()]
  if lows and min(lows) > 0 and min(lows) > 0.6 * max(lows):
    panel.set_xlim(left=min(lows) - 0.5 * (max(lows) - min(lows)) - 0.02)


def _draw_heat_map(panel, shape, cells, theirs, lower_is_better):
  """Draws means, intervals and the paper's numbers; a better cell is darker."""
  sign = -1 if lower_is_better else 1
  table = np.full(shape, np.nan)
  for place, summary in cells.items():
    table[place] = sign * summary.mean
  panel.grid(visible=False)
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


def _draw_curves(panel, lines, style, label):
  """Draws the mean of curves at the steps that all have, and their range."""
  common = sorted(set.intersection(*({x for x, _ in line} for line in lines)))
  table = np.array([[dict(line)[x] for x in common] for line in lines])
  panel.plot(common, table.mean(0), **style, markersize=3.5, label=label)
  if len(lines) > 1:
    shade = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
    panel.fill_between(common, table.min(0), table.max(0), **shade)


def _draw_estimates(panel, points, style, label):
  """Draws a line through means, with their intervals."""
  if not points:
    return
  xs, summaries = zip(*points, strict=True)
  panel.plot(
    xs, [s.mean for s in summaries], **style, markersize=4.5, label=label
  )
  thin = {"color": style["color"], "linewidth": 1.2, "alpha": 0.7}
  for x, summary in points:
    if summary.low is not None:
      panel.plot([x, x], [summary.low, summary.high], **thin)
