"""Scalars of a run: metrics.jsonl, TensorBoard, a progress bar or lines.

The cache of compiled programs, and the seconds to the first step.
"""

import collections
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
from clu import metric_writers

import gkd_jax
from gkd_jax import files, types


def use_cache(folder: str | None = None) -> str:
  """Keeps compiled programs on disk, so that a second start is short.

  Args:
    folder: where; "" keeps none; None is `JAX_COMPILATION_CACHE_DIR`, or the
      user's cache, one folder for each machine, whose processor they are for.

  Returns:
    The folder, "" without one.
  """
  given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  if folder is None and given is not None:
    return given  # JAX has read it
  if folder is None:
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(user, "gkd_jax", f"compiled-{platform.node()}")
  folder = folder and os.fspath(files.absolute(folder))
  jax.config.update("jax_compilation_cache_dir", folder or None)
  return folder


def first_step(metrics: object) -> str:
  """Waits for the first step's `metrics`, and says how long all took."""
  jax.block_until_ready(metrics)
  return (
    f"first step {time.monotonic() - gkd_jax.STARTED:.1f} s after the start,"
    f" {_spent[_COMPILING]:.1f} s of it compiling;"
    f" {_spent[_READ]:.0f} programs from the cache"
  )


_COMPILING = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_hits"
_spent: collections.Counter = collections.Counter()


def _add(event, amount=1.0, **_):
  _spent[event] += amount


# From the import on, so that nothing that is compiled is left out.
jax.monitoring.register_event_duration_secs_listener(_add)
jax.monitoring.register_event_listener(_add)
# Metrics of distillation and of SFT whose weight is the number of tokens.
_PER_TOKEN = ("top1_agreement", "accuracy")


class TrainLog:
  """Collects (sum, weight) metrics and writes their quotients.

  A context manager. On a terminal it shows a progress bar, elsewhere a line at
  each call of `write`. Of several processes the first one writes.

  Args:
    model_dir: of the run.
    start: first step.
    total: last step.
    console: where to show progress; the standard output by default.
  """

  def __init__(
    self,
    model_dir: str,
    start: int,
    total: int,
    console: rich.console.Console | None = None,
  ):
    self._dir = files.absolute(model_dir)
    self._total, self._last = total, start
    self._sums: dict[str, list] = {}
    self._on_policy = self._rows = self._tokens = 0
    self._time = self._started = time.monotonic()
    self._first = True
    self._writes = jax.process_index() == 0
    self._writer = self._bar = None
    if not self._writes:
      return
    self._dir.mkdir(parents=True, exist_ok=True)
    self._writer = metric_writers.SummaryWriter(os.fspath(self._dir))
    self._console = console or rich.console.Console()
    if self._console.is_terminal:
      self._bar = _progress_bar(self._console)
      self._task = self._bar.add_task(
        "", total=total, completed=start, status="compiling"
      )
      self._bar.start()

  def __enter__(self) -> "TrainLog":
    return self

  def __exit__(self, *_):
    if self._bar:
      self._bar.stop()
    if self._writer:
      self._writer.close()

  def say(self, text: str):
    """Prints one line, above the progress bar if there is one."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False)
    elif self._writes:
      print(text, flush=True)

  def add(self, metrics: types.Metrics, source: str, batch: Any):
    """Takes one step's metrics; waits for the device after the first alone."""
    if self._first:
      self._first = False
      self.say(first_step(metrics))
    for name, pair in metrics.items():
      self._sums.setdefault(name, []).append(pair)
    self._on_policy += source != "data"
    processes = jax.process_count()
    self._rows += processes * len(batch["decoder_target_tokens"])
    self._tokens += processes * _input_tokens(batch)
    if self._bar:
      self._bar.advance(self._task)

  def write(self, step: int):
    """Writes the means since the last call.

    `tokens_per_second` counts inputs and the outputs trained on, whosesoever
    they are. Inputs of other processes are taken to be as many as this one's.

    Args:
      step: steps done.
    """
    scalars = {}
    outputs = 0.0
    for name, pairs in self._sums.items():
      values = np.sum(np.array(jax.device_get(pairs), np.float64), axis=0)
      scalars[name] = (
        float(values[0] / values[1]) if values[1] else float("nan")
      )
      if name in _PER_TOKEN:
        outputs = values[1]
    seconds = time.monotonic() - self._time
    steps = max(step - self._last, 1)
    scalars |= {
      "seconds_per_step": seconds / steps,
      "examples_per_second": self._rows / seconds,
      "tokens_per_second": (self._tokens + outputs) / seconds,
      "on_policy_steps": self._on_policy / steps,
    }
    self._record(step, scalars)
    status = (
      f"loss {scalars['loss']:.4f}"
      f" {scalars['examples_per_second']:.0f} examples/s"
      f" {scalars['tokens_per_second']:.0f} tokens/s"
      f" on-policy {100 * scalars['on_policy_steps']:.0f}%"
    )
    if self._bar:
      self._bar.update(self._task, completed=step, status=status, refresh=True)
    else:
      left = int((self._total - step) * scalars["seconds_per_step"])
      eta = f"ETA {left // 60}:{left % 60:02d}"
      self.say(f"step {step}/{self._total} {status} {eta}")
    self._sums = {}
    self._on_policy = self._rows = self._tokens = 0
    self._last = step
    self.restart_clock()

  def restart_clock(self):
    """Leaves out of the rates what was done since the last `write`."""
    self._time = time.monotonic()

  def evaluation(
    self,
    step: int,
    scores: Mapping[str, float],
    examples: Sequence[Mapping[str, Any]],
  ):
    """Writes the scores of an evaluation and decoded examples."""
    self._record(step, {f"eval/{k}": v for k, v in scores.items()})
    if self._writer:
      self._writer.write_texts(step, {"examples": _markdown(examples)})
      files.append_json_lines(
        self._dir / "examples.jsonl",
        [{"step": step, **example} for example in examples],
      )
    shown = " ".join(f"{k} {v:.2f}" for k, v in scores.items())
    self.say(f"step {step} evaluation: {shown}")
    self.restart_clock()

  def final(self, result: Mapping[str, Any]):
    """Writes `final.json`, with the seconds since the run was started."""
    result = dict(result) | {"seconds": time.monotonic() - self._started}
    if self._writes:
      files.write_json(self._dir / "final.json", result)
    self.say(f"final: {json.dumps(result)}")

  def _record(self, step, scalars):
    if not self._writer:
      return
    finite = {k: v if np.isfinite(v) else None for k, v in scalars.items()}
    files.append_json_lines(
      self._dir / "metrics.jsonl", [{"step": step, **finite}]
    )
    self._writer.write_scalars(step, scalars)


def _input_tokens(batch) -> int:
  """Tokens of the inputs: the encoder's, or the prompts of decoder-only rows."""
  if "encoder_input_tokens" in batch:
    return int(np.count_nonzero(batch["encoder_input_tokens"]))
  tokens = np.count_nonzero(batch["decoder_target_tokens"])
  return int(tokens - np.count_nonzero(batch["decoder_loss_weights"]))


def _progress_bar(console: rich.console.Console) -> rich.progress.Progress:
  return rich.progress.Progress(
    rich.progress.MofNCompleteColumn(),
    rich.progress.BarColumn(bar_width=20),
    rich.progress.TimeRemainingColumn(),
    rich.progress.TextColumn("{task.fields[status]}"),
    console=console,
    refresh_per_second=2,
  )


def _markdown(examples: Sequence[Mapping[str, Any]]) -> str:
  """Decoded examples as a table, which TensorBoard shows as one."""
  if not examples:
    return ""
  cell = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
  rows = [list(examples[0]), ["---"] * len(examples[0])]
  rows += [[cell(v) for v in example.values()] for example in examples]
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)
