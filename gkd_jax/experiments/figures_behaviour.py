"""Figures of what students do: diversity, reward, divergence by position."""

import functools
import itertools
import os
import re

import numpy as np
from matplotlib import ticker

from gkd_jax import files
from gkd_jax.experiments import figures, run_folders

_DIVERSITY = re.compile(r"(.*/)?self_?bleu\w*", re.IGNORECASE)
# Where the names of points that may coincide stand around them.
_CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))
_SOURCES = {
  "student_samples": ("-", "on its own samples"),
  "data": ("--", "on the data"),
}


def quality_diversity(study: run_folders.Study) -> figures.Picture | None:
  """Score against Self-BLEU, a line for each method over temperatures."""
  points: dict[str, dict[str, list]] = {}
  runs = []
  for run in study.runs:
    found = _quality_and_diversity(study, run)
    if found:
      runs.append(run)
      line = points.setdefault(_line_name(run), {})
      line.setdefault(run.place.get("temperature", ""), []).append(found)
  if not points:
    return None
  picture, (panel,) = figures.grid_of_panels([()], height=4.4, width=7)
  for i, (name, line) in enumerate(points.items()):
    style = {
      "color": figures.COLORS[i % len(figures.COLORS)],
      "marker": "osD^vP*Xh"[i % 9],
    }
    means = {t: np.mean(pairs, axis=0) for t, pairs in line.items()}
    xs, ys = zip(*sorted(map(tuple, means.values())), strict=True)
    panel.plot(xs, ys, **style, label=name)
    for temperature, (x, y) in means.items():
      panel.annotate(
        temperature, (x, y), xytext=(4, 4), textcoords="offset points", size=8
      )
  panel.set(xlabel="Self-BLEU (higher is less diverse)")
  panel.set_ylabel(figures.axis_label(study))
  panel.grid(alpha=0.3)
  figures.legend_below(picture, panel)
  return figures.Picture(
    "quality_diversity",
    "Quality and diversity",
    "Score against Self-BLEU of several outputs of each input; the numbers at"
    " the points are sampling temperatures. Means over seeds, without intervals.",
    picture,
  )


def rl_tradeoff(study: run_folders.Study) -> figures.Picture | None:
  """Reward against the divergence to the teacher, a point for each α."""
  runs = [run for run in study.runs if "alpha" in run.place]
  last = {run.folder: run_folders.late_means(run.folder) for run in runs}
  runs = [r for r in runs if run_folders.divergence_of(last[r.folder])]
  if not runs:
    return None
  # On-policy GKD asks for no reward, so that its run may not know one.
  trained = all("reward" in last[run.folder] for run in runs)
  key = f"sampled/{study.metric}"
  if not trained:
    runs = [run for run in runs if key in run.scores]
  if not runs:
    return None
  name = run_folders.divergence_of(last[runs[0].folder]) or ""
  picture, (panel,) = figures.grid_of_panels([()], height=4.4, width=7)
  lines = run_folders.groups(
    runs, lambda r: tuple((k, v) for k, v in r.place.items() if k != "alpha")
  )
  for i, members in enumerate(lines.values()):
    color = figures.COLORS[i % len(figures.COLORS)]
    value = lambda run: (
      last[run.folder]["reward"] if trained else run.scores[key]
    )
    means = []
    alphas = figures.ordered(study, members, "alpha")
    for alpha, corner in zip(alphas, itertools.cycle(_CORNERS)):
      seeds = [r for r in members if r.place["alpha"] == alpha]
      x = run_folders.estimate(last[r.folder][name] for r in seeds)
      y = run_folders.estimate(map(value, seeds))
      means.append((x.mean, y.mean))
      _draw_cross(panel, x, y, color, f"α = {alpha}", corner)
    panel.plot(
      *zip(*means, strict=True), "o-", color=color, label=_line_name(members[0])
    )
  panel.set_xlabel(
    f"{_words(name)} to the teacher, nats a token of own samples"
  )
  panel.set_ylabel(
    "reward"
    if trained
    else f"{figures.axis_label(study)},\nsampled, test split"
  )
  panel.grid(alpha=0.3)
  figures.legend_below(picture, panel)
  return figures.Picture(
    "rl_tradeoff",
    "Reward against divergence to the teacher",
    "RL + GKD with weight α on the divergence: α = 1 is on-policy GKD, α = 0"
    " plain RL. The divergence"
    + (" and the reward are means" if trained else " is the mean")
    + " over the last fifth of training."
    f" {figures.seeds_note(runs)}",
    picture,
  )


def by_position(study: run_folders.Study) -> figures.Picture | None:
  """Mean divergence to the teacher at each position of the output."""
  tables = {}
  for run in study.runs:
    path = os.path.join(run.folder, "by_position.json")
    table = files.read_json(path)
    if table:
      tables[run.folder] = table
  runs = [run for run in study.runs if run.folder in tables]
  names = {
    name: None
    for table in tables.values()
    for source in _SOURCES
    for name in table.get(source, {})
    if name != "count"
  }
  if not names:
    return None
  panels = {
    (*regime, ("divergence", _words(name))): (members, name)
    for regime, members in figures.regimes_of(study, runs).items()
    for name in names
  }
  picture, axes = figures.grid_of_panels(panels, height=3.6, width=5.2)
  for panel, (regime, (members, name)) in zip(
    axes, panels.items(), strict=True
  ):
    lines = run_folders.groups(
      members, functools.partial(_line_name, regime=regime)
    )
    for i, (method, seeds) in enumerate(lines.items()):
      color = figures.COLORS[i % len(figures.COLORS)]
      for source, (dashes, _) in _SOURCES.items():
        values = [
          tables[run.folder][source][name]
          for run in seeds
          if name in tables[run.folder].get(source, {})
        ]
        if values:
          panel.plot(*_mean_by_position(values), dashes, color=color)
      panel.plot([], [], color=color, label=method)
    for dashes, where in _SOURCES.values():
      panel.plot([], [], dashes, color="black", label=where)
    panel.set(title=figures.regime_title(regime), ylabel="nats a token")
    panel.set(xlabel="position of the output")
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
  figures.legend_below(picture, *axes)
  return figures.Picture(
    "by_position",
    "Divergence by position",
    "Mean divergence to the teacher at each position, on the student's own"
    " samples and on the data. Where training has seen data alone, the first"
    " rises above the second: errors add up (exposure bias). Means over seeds, without intervals.",
    picture,
  )


def _draw_cross(panel, x, y, color, text, corner):
  """A text at the means of two things, and the intervals of both."""
  if x.low is not None:
    panel.plot([x.low, x.high], [y.mean, y.mean], color=color, alpha=0.6)
    panel.plot([x.mean, x.mean], [y.low, y.high], color=color, alpha=0.6)
  panel.annotate(
    text,
    (x.mean, y.mean),
    xytext=(5 * corner[0], 5 * corner[1]),
    textcoords="offset points",
    ha="left" if corner[0] > 0 else "right",
    va="bottom" if corner[1] > 0 else "top",
    size=9,
  )


def _quality_and_diversity(study, run) -> tuple[float, float] | None:
  """(Self-BLEU, score) of a run's evaluation, if it has both."""
  for name, value in run.scores.items():
    match = _DIVERSITY.fullmatch(name)
    if match:
      for prefix in (match[1] or "", "eval/", "sampled/"):
        if prefix + study.metric in run.scores:
          return value, run.scores[prefix + study.metric]
  return None


def _line_name(run, regime=()) -> str:
  """The run's place without what its panel and its points show."""
  hidden = {"temperature", "alpha", *(axis for axis, _ in regime)}
  return ", ".join(v for k, v in run.place.items() if k not in hidden)


def _words(name) -> str:
  return name.replace("_", " ").replace("kl", "KL")


def _mean_by_position(values) -> tuple[np.ndarray, np.ndarray]:
  """Positions from 1, and the mean of lists that may differ in length."""
  table = np.full((len(values), max(map(len, values))), np.nan)
  for row, line in zip(table, values, strict=True):
    row[: len(line)] = [np.nan if x is None else x for x in line]
  seen = ~np.isnan(table).all(0)
  return np.flatnonzero(seen) + 1, np.nanmean(table[:, seen], axis=0)
