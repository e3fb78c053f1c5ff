"""Figures of what students do: diversity, reward, divergence by position."""

import functools
import itertools
import os

import numpy as np
from matplotlib import ticker

from gkd_jax import files
from gkd_jax.experiments import metrics, panels, studies

# Directions in which the names of points stand, so that close ones do not overlap.
_CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))
_SOURCES = {
  "student_samples": ("-", "on its own samples"),
  "data": ("--", "on the data"),
}


def quality_diversity(study: studies.Study) -> panels.Picture | None:
  """Draws the score over Self-BLEU, a line for each method over temperatures."""
  points: dict[str, dict[str, list]] = {}
  for run in study.runs:
    if found := _diversity_and_score(study, run):
      line = points.setdefault(_line_name(run), {})
      line.setdefault(run.place.get("temperature", ""), []).append(found)
  if not points:
    return None
  picture, (panel,) = panels.grid([()], height=4.4, width=7)
  for i, (name, line) in enumerate(points.items()):
    means = {t: np.mean(pairs, axis=0) for t, pairs in line.items()}
    xs, ys = zip(*sorted(map(tuple, means.values())), strict=True)
    panel.plot(xs, ys, **panels.style(i), label=name)
    for temperature, (x, y) in means.items():
      panel.annotate(
        temperature, (x, y), xytext=(4, 4), textcoords="offset points", size=8
      )
  label = metrics.of("self_bleu").label
  panel.set(xlabel=f"{label} (higher is less diverse)")
  panel.set_ylabel(study.metric_label)
  panels.legend_below(picture, panel)
  return panels.Picture(
    "quality_diversity",
    "Quality and diversity",
    f"Score against {label} of several outputs of each input; the numbers at"
    " the points are sampling temperatures. Means over seeds, without"
    " intervals.",
    picture,
  )


def _diversity_and_score(study, run) -> tuple[float, float] | None:
  """Returns the (Self-BLEU, score) of a run's evaluation, if it has both."""
  for how in ("eval", "sampled"):
    names = f"{how}/self_bleu", f"{how}/{study.metric}"
    if all(name in run.scores for name in names):
      return run.scores[names[0]], run.scores[names[1]]
  return None


def rl_tradeoff(study: studies.Study) -> panels.Picture | None:
  """Draws reward over divergence to the teacher, a point for each α."""
  runs = [run for run in study.runs if "alpha" in run.place]
  late = {run.folder: studies.late_means(run.folder) for run in runs}
  runs = [r for r in runs if studies.divergence_of(late[r.folder])]
  # On-policy GKD needs no reward, and so its run may not have logged one.
  has_reward = all("reward" in late[run.folder] for run in runs)
  key = f"sampled/{study.metric}"
  if not has_reward:
    runs = [run for run in runs if key in run.scores]
  if not runs:
    return None
  name = studies.divergence_of(late[runs[0].folder]) or ""
  value = lambda run: (
    late[run.folder]["reward"] if has_reward else run.scores[key]
  )
  picture, (panel,) = panels.grid([()], height=4.4, width=7)
  lines = studies.groups(
    runs, lambda r: tuple((k, v) for k, v in r.place.items() if k != "alpha")
  )
  for i, members in enumerate(lines.values()):
    color = panels.color(i)
    means = []
    alphas = study.points("alpha", members)
    for alpha, corner in zip(alphas, itertools.cycle(_CORNERS)):
      seeds = [r for r in members if r.place["alpha"] == alpha]
      x = studies.estimate(late[r.folder][name] for r in seeds)
      y = studies.estimate(map(value, seeds))
      means.append((x.mean, y.mean))
      _draw_cross(panel, x, y, color, f"α = {alpha}", corner)
    panel.plot(
      *zip(*means, strict=True), "o-", color=color, label=_line_name(members[0])
    )
  divergence = metrics.of(name)
  panel.set_xlabel(
    f"{divergence.label} to the teacher, {divergence.unit} of own samples"
  )
  panel.set_ylabel(
    "reward" if has_reward else f"{study.metric_label},\nsampled, test split"
  )
  panels.legend_below(picture, panel)
  return panels.Picture(
    "rl_tradeoff",
    "Reward against divergence to the teacher",
    "RL + GKD with weight α on the divergence: α = 1 is on-policy GKD, α = 0"
    " plain RL. The divergence"
    + (" and the reward are means" if has_reward else " is the mean")
    + " over the last fifth of training."
    f" {panels.seeds_note(runs)}",
    picture,
  )


def by_position(study: studies.Study) -> panels.Picture | None:
  """Draws the mean divergence to the teacher at each position of the output."""
  tables = {}
  for run in study.runs:
    path = os.path.join(run.folder, "by_position.json")
    if table := files.read_json(path):
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
  parts = {
    (*regime, ("divergence", metrics.of(name).label)): (members, name)
    for regime, members in panels.regimes(study, runs).items()
    for name in names
  }
  picture, axes = panels.grid(parts, height=3.6, width=5.2)
  for panel, (regime, (members, name)) in zip(axes, parts.items(), strict=True):
    lines = studies.groups(
      members, functools.partial(_line_name, regime=regime)
    )
    for i, (line, seeds) in enumerate(lines.items()):
      color = panels.color(i)
      for source, (dashes, _) in _SOURCES.items():
        values = [
          tables[run.folder][source][name]
          for run in seeds
          if name in tables[run.folder].get(source, {})
        ]
        if values:
          panel.plot(*_mean_by_position(values), dashes, color=color)
      panel.plot([], [], color=color, label=line)
    for dashes, where in _SOURCES.values():
      panel.plot([], [], dashes, color="black", label=where)
    panel.set(xlabel="position of the output", ylabel=metrics.of(name).unit)
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  panels.legend_below(picture, *axes)
  return panels.Picture(
    "by_position",
    "Divergence by position",
    "Mean divergence to the teacher at each position, on the student's own"
    " samples and on the data. Where a student was trained on the data alone,"
    " the first rises above the second: errors add up (exposure bias). Means"
    " over seeds, without intervals.",
    picture,
  )


def _draw_cross(panel, x, y, color, text, corner):
  """Draws a text at the means of two estimates, and the intervals of both."""
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


def _line_name(run, regime=()) -> str:
  """Returns the run's place without what its panel and its points show."""
  hidden = {"temperature", "alpha", *(axis for axis, _ in regime)}
  return ", ".join(v for k, v in run.place.items() if k not in hidden)


def _mean_by_position(values) -> tuple[np.ndarray, np.ndarray]:
  """Returns positions from 1, and the mean of lists of different lengths."""
  table = np.full((len(values), max(map(len, values))), np.nan)
  for row, line in zip(table, values, strict=True):
    row[: len(line)] = [np.nan if x is None else x for x in line]
  seen = ~np.isnan(table).all(0)
  return np.flatnonzero(seen) + 1, np.nanmean(table[:, seen], axis=0)
