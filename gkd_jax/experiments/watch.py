"""Shows runs while they train: `gkd watch NAME=FOLDER ...`."""

import dataclasses
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console
import rich.live
import rich.progress_bar
import rich.table

from gkd_jax import files
from gkd_jax.experiments import metrics, run_folders

_HOW = ("greedy", "sampled")  # how a finished run was decoded and scored
_LOCK = "run.lock"  # of `training.RunLock`, which imports JAX
_LINE_PERIOD = 15  # seconds between lines where there is no terminal


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a run has come, by the files in its folder.

  Attributes:
    name: of the run.
    started: whether it has written its configuration.
    step: last step that was logged, 0 before the first.
    total: last step of the run, None if it is not known.
    loss: mean of the steps up to `step`.
    scores: scores of the last evaluation, by metric.
    seconds_left: of training, at the speed of the last two log lines.
    final: `final.json` of the finished run: its `seconds`, and its scores as
      `greedy` and `sampled`. None until then.
    ended: whether there is nothing left to do.
  """

  name: str
  started: bool
  step: int
  total: int | None
  loss: float | None
  scores: Mapping[str, float]
  seconds_left: float | None
  final: Mapping[str, Any] | None
  ended: bool

  @property
  def state(self) -> str:
    """What the run does: the time that is left, or why there is none."""
    if self.final:
      return f"finished in {_clock(self.final['seconds'])}"
    if self.ended:
      return "finished"
    if not self.started:
      return "waiting"
    if not self.step:
      return "starting"
    if self.step == self.total:
      return "final evaluation"
    if self.seconds_left is None:
      return "training"
    return f"ETA {_clock(self.seconds_left)}"


def watch(
  items: Sequence[str],
  console: rich.console.Console | None = None,
  sleep: Callable[[float], None] = time.sleep,
) -> None:
  """Shows runs until all of them are finished.

  A run is finished when it has written `final.json`, or, without
  `FINAL_EVAL_SPLIT`, when no process holds it after its last step. A terminal
  shows a table that is redrawn each second. Elsewhere a line is printed every 15
  seconds, and one for each run that ends.

  Args:
    items: `NAME=FOLDER`, or `FOLDER`, of each run; a folder need not exist yet.
    console: where to show them; the default is the standard output.
    sleep: waits for a number of seconds.

  Raises:
    ValueError: if there are no items.
  """
  if not items:
    raise ValueError(
      "expected runs to watch, got none; run `gkd watch RUN ...`"
    )
  folders = dict(map(run_folders.name_and_folder, items))
  console = console or rich.console.Console()
  if console.is_terminal:
    # An orderly exit, so that the terminal's cursor comes back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with rich.live.Live(console=console, auto_refresh=False) as live:
      for runs in _until_finished(folders, sleep):
        live.update(table(runs), refresh=True)
    return
  finished: set[str] = set()
  for second, runs in enumerate(_until_finished(folders, sleep)):
    ended = [r for r in runs if r.ended and r.name not in finished]
    running = [r for r in runs if r.started and not r.ended]
    for run in ended:
      print(line(run), flush=True)
      finished.add(run.name)
    if running and second % _LINE_PERIOD == 0:
      print(" | ".join(map(line, running)), flush=True)


def read(name: str, folder: str) -> Progress:
  """Returns the progress of the run in a folder."""
  macros = run_folders.read_macros(folder)
  rows = run_folders.read_metrics(folder)
  logged = [row for row in rows if "loss" in row]
  total = int(macros["TRAIN_STEPS"]) if "TRAIN_STEPS" in macros else None
  scores = [s for row in rows if (s := run_folders.evaluated(row))]
  step = logged[-1]["step"] if logged else 0
  final = files.read_json(os.path.join(folder, "final.json"))
  ended = final is not None
  if macros.get("FINAL_EVAL_SPLIT", "None") == "None" and step == total:
    ended = not (files.absolute(folder) / _LOCK).exists()
  return Progress(
    name=name,
    started=bool(macros or rows),
    step=step,
    total=total,
    loss=logged[-1]["loss"] if logged else None,
    scores=scores[-1] if scores else {},
    seconds_left=_seconds_left(logged, total),
    final=final,
    ended=ended,
  )


def line(run: Progress) -> str:
  """Returns a run's progress, or its result, in one line."""
  parts = []
  if run.final:
    for how in _HOW:
      scores = run.final.get(how, {})
      if score := _score(scores):
        parts.append(f"{how} {_labelled(score, scores)}")
    return f"{run.name}: {', '.join((run.state, *parts))}"
  if run.step:
    parts.append(f"step {run.step}/{run.total or '?'}")
  if run.loss is not None:
    parts.append(f"loss {run.loss:.4f}")
  if score := _score(run.scores):
    parts.append(_labelled(score, run.scores))
  return f"{run.name}: {' '.join((*parts, run.state))}"


def table(runs: Sequence[Progress]) -> rich.table.Table:
  """Returns a table with a row for each run, which fills in as runs end."""
  score = next((s for run in runs if (s := _score(run.scores))), "")
  label = metrics.of(score).label if score else "score"
  found = rich.table.Table(box=None, pad_edge=False)
  found.add_column("run")
  found.add_column("")
  for title in ("step", "loss", f"{label} so far", *_HOW, ""):
    found.add_column(title, justify="right")
  for run in runs:
    final = run.final or {}
    found.add_row(
      run.name,
      rich.progress_bar.ProgressBar(run.total or 1, run.step, width=20),
      f"{run.step}/{run.total or '?'}" if run.step else "",
      "" if run.loss is None else f"{run.loss:.4f}",
      _number(run.scores.get(score)),
      *(_number(final.get(how, {}).get(score)) for how in _HOW),
      run.state,
    )
  return found


def _until_finished(folders, sleep):
  """Yields the progress of all runs each second, the last time when they end."""
  for second in itertools.count():
    if second:
      sleep(1.0)
    runs = [read(name, folder) for name, folder in folders.items()]
    yield runs
    if all(run.ended for run in runs):
      return


def _seconds_left(logged, total) -> float | None:
  """Returns the seconds of the steps that are left, by the last two lines."""
  if not logged or total is None:
    return None
  ends = [0, *(row["step"] for row in logged)]
  steps, spent = 0, 0.0
  for row, begin in list(zip(logged, ends[:-1], strict=True))[-2:]:
    steps += row["step"] - begin
    spent += (row["step"] - begin) * row["seconds_per_step"]
  return (total - ends[-1]) * spent / steps


def _score(scores: Mapping[str, float]) -> str | None:
  """Returns the metric to show: a headline of the report, or the first."""
  headline = (name for name in metrics.HEADLINES if name in scores)
  return next(headline, next(iter(scores), None))


def _labelled(score: str, scores: Mapping[str, float]) -> str:
  return f"{metrics.of(score).label} {_number(scores[score])}"


def _number(value: float | None) -> str:
  return "" if value is None else f"{value:.1f}"


def _clock(seconds: float) -> str:
  return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
