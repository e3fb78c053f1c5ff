"""The log of a run: metrics.jsonl, TensorBoard, Weights & Biases, progress.

Also the cache of compiled programs, and the time to the first step.
"""

import json
import os
import platform
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
from etils import epath

import gkd_jax
from gkd_jax import files, types
from gkd_jax.training import markdown, progress, rollouts

# Means over output tokens, of distillation and of SFT: their weights count these.
_PER_TOKEN = ("top1_agreement", "accuracy")
# A count of the whole run so far, whose newest value says all.
_SKIPPED = "skipped_updates"


def use_cache(folder: str | None = None) -> str:
  """Keeps compiled programs on disk, so that the next start is faster.

  Args:
    folder: the cache; "" for none. None is `JAX_COMPILATION_CACHE_DIR`, or a
      folder for this machine, whose processor they fit, in the user's cache.

  Returns:
    The folder, or "".
  """
  given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  if folder is None and given is not None:
    return given  # JAX reads the variable itself
  if folder is None:
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(user, "gkd_jax", f"compiled-{platform.node()}")
  folder = folder and os.fspath(files.absolute(folder))
  jax.config.update("jax_compilation_cache_dir", folder or None)
  return folder


def first_step(metrics: object) -> str:
  """Waits for the first step's `metrics`; returns a line about the time taken."""
  jax.block_until_ready(metrics)
  hits = progress.cache_hits()
  return (
    f"first step {time.monotonic() - gkd_jax.STARTED:.1f} s after the start,"
    f" {progress.compile_seconds():.1f} s of it compiling;"
    f" {hits} program{'s' if hits != 1 else ''} from the cache"
  )


class TrainLog:
  """Collects the metrics of steps, and writes and shows their means.

  A context manager. Progress is a bar on a terminal, and a line at each call of
  `write` elsewhere. Of several processes only the first one writes.

  Args:
    model_dir: folder of the run: `metrics.jsonl`, `examples.jsonl`,
      `final.json` and TensorBoard's events are written there.
    start: step that the run starts or resumes at.
    total: last step.
    console: where to show progress; the default is the standard output.
    wandb_project: project of Weights & Biases to write to as well (extra
      `wandb`). A resumed run continues its run there.
  """

  def __init__(
    self,
    model_dir: str,
    start: int,
    total: int,
    console: rich.console.Console | None = None,
    wandb_project: str | None = None,
  ):
    self._dir = files.absolute(model_dir)
    self._total, self._last = total, start
    self._started = time.monotonic()
    self._pace = progress.Pace(start, total)
    self._begun, self._start_seconds = False, 0.0
    self._skipped: float | None = None
    self._restart()
    self._writes = jax.process_index() == 0
    self._bar = self._tensorboard = self._wandb = None
    if not self._writes:
      return
    self._dir.mkdir(parents=True, exist_ok=True)
    if wandb_project:
      self._wandb = _wandb_run(wandb_project, self._dir)
    # Not at the top: it imports TensorFlow.
    from flax.metrics import tensorboard

    self._tensorboard = tensorboard.SummaryWriter(self._dir, auto_flush=False)
    console = console or rich.console.Console()
    if console.is_terminal:
      self._bar, self._task = progress.bar(console, start, total, self._pace)
      self._bar.start()

  def __enter__(self) -> "TrainLog":
    return self

  def __exit__(self, *_):
    if self._bar:
      self._bar.stop()
    if self._tensorboard:
      self._tensorboard.close()
    if self._wandb:
      self._wandb.finish()

  def say(self, text: str):
    """Prints a line, above the progress bar if there is one."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False)
    elif self._writes:
      print(text, flush=True)

  def add(self, metrics: types.Metrics, source: str, batch: Any):
    """Adds the metrics of a step; waits for the device after the first only.

    Args:
      metrics: name to (sum, weight).
      source: whose outputs the step trained on, "data" if the data set's.
      batch: rows of this process.
    """
    if not self._begun:
      self._begun = True
      self.say(first_step(metrics))
      self._start_seconds = time.monotonic() - self._started
    self._pace.advance()
    self._steps.append(metrics)
    self._on_policy += source != "data"
    # Other processes are taken to have as many input tokens as this one.
    self._rows += jax.process_count() * len(batch["decoder_target_tokens"])
    self._tokens += jax.process_count() * _input_tokens(batch)
    if self._bar:
      self._bar.advance(self._task)

  def write(self, step: int):
    """Writes the means of the metrics since the last call, and rates.

    Steps whose update was skipped do not count in the means.
    `tokens_per_second` counts the input tokens and the output tokens that were
    trained on, whether of the data or of the student.

    Args:
      step: number of steps done.
    """
    window = jax.device_get(self._steps)
    self._pace.waited()
    scalars = _means(window, self._skipped)
    self._skipped = scalars.get(_SKIPPED)
    outputs = sum(
      float(metrics[name][1])
      for metrics in window
      for name in _PER_TOKEN
      if name in metrics
    )
    seconds = time.monotonic() - self._time
    steps = max(step - self._last, 1)
    scalars |= {
      "seconds_per_step": seconds / steps,
      "examples_per_second": self._rows / seconds,
      "tokens_per_second": (self._tokens + outputs) / seconds,
      "on_policy_steps": self._on_policy / steps,
    }
    self._record(step, scalars)
    self._show(step, scalars)
    self._last = step
    self._restart()

  def evaluation(
    self,
    step: int,
    scores: Mapping[str, float],
    examples: Sequence[Mapping[str, Any]],
    texts: Mapping[str, str] | None = None,
  ):
    """Writes the scores of an evaluation, decoded examples, metrics as texts.

    The time since the last `write` is left out of the rates.
    """
    self._record(step, {f"eval/{k}": v for k, v in scores.items()})
    if self._tensorboard:
      self._tensorboard.text("examples", _markdown(examples), step)
      for name, text in (texts or {}).items():
        self._tensorboard.text(f"eval/{name}", text, step)
      self._tensorboard.flush()
      files.append_json_lines(
        self._dir / "examples.jsonl",
        [{"step": step, **example} for example in examples],
      )
    shown = " ".join(f"{k} {v:.2f}" for k, v in scores.items())
    shown = shown or "no scores; outputs are in examples.jsonl"
    self.say(f"step {step} evaluation: {shown}")
    self._time = time.monotonic()

  def failed_evaluation(self, step: int, error: str, count: int):
    """Writes that an evaluation failed.

    Args:
      step: number of steps done.
      error: what it failed with, in one line.
      count: evaluations that failed so far.
    """
    self._record(step, {"failed_evaluations": float(count)})
    self.say(
      f"step {step} evaluation failed: {error}; the run goes on (set"
      f" EVAL_ERRORS_STOP = True to stop); {count} failed so far"
    )
    self._time = time.monotonic()

  def final(self, result: Mapping[str, Any]):
    """Writes `final.json`, with the seconds since the log was opened.

    Those until the first step was done, most of them of compiling, are
    `start_seconds`.
    """
    result = dict(result) | {"seconds": time.monotonic() - self._started}
    if self._begun:
      result["start_seconds"] = self._start_seconds
    if self._writes:
      files.write_json(self._dir / "final.json", result)
    self.say(f"final: {json.dumps(result)}")

  def _restart(self):
    self._steps: list[types.Metrics] = []
    self._on_policy = self._rows = self._tokens = 0
    self._time = time.monotonic()

  def _record(self, step, scalars):
    if not self._tensorboard:
      return
    # JSON has no NaN.
    finite = {k: v if np.isfinite(v) else None for k, v in scalars.items()}
    row = {"step": step, **finite}
    files.append_json_lines(self._dir / "metrics.jsonl", [row])
    for name, value in scalars.items():
      self._tensorboard.scalar(name, value, step)
    self._tensorboard.flush()
    if self._wandb:
      self._wandb.log(scalars, step=step)

  def _show(self, step, scalars):
    status = [
      f"loss {scalars['loss']:.4f}",
      f"{scalars['examples_per_second']:.0f} examples/s",
      f"{scalars['tokens_per_second']:.0f} tokens/s",
      f"on-policy {100 * scalars['on_policy_steps']:.0f}%",
    ]
    if self._bar:
      self._bar.update(self._task, completed=step, status=status, refresh=True)
    else:
      shown = " ".join(status)
      eta = progress.clock(self._pace.left())
      self.say(f"step {step}/{self._total} {shown} ETA {eta}")


def _means(
  window: Sequence[types.Metrics], skipped: float | None
) -> dict[str, float]:
  """Returns the mean of each metric over the steps that were not skipped.

  Where all were, over the steps at which it is finite. NaN without any.

  Args:
    window: metrics of each step, on the host.
    skipped: updates that were skipped before; None if that is not known.
  """
  used = []
  for metrics in window:
    count = float(metrics[_SKIPPED][0]) if _SKIPPED in metrics else skipped
    used.append(skipped in (None, count))
    skipped = count
  means = {}
  for name in dict.fromkeys(name for metrics in window for name in metrics):
    pairs = np.array(
      [
        (*metrics[name], is_used)
        for metrics, is_used in zip(window, used, strict=True)
        if name in metrics
      ],
      np.float64,
    )
    finite = pairs[np.isfinite(pairs).all(axis=1)]
    counted = finite[finite[:, 2] > 0] if finite[:, 2].any() else finite
    total, weight, _ = counted.sum(axis=0)
    means[name] = float(total / weight) if weight else float("nan")
  if _SKIPPED in means:
    means[_SKIPPED] = skipped
  return means


def _wandb_run(project: str, folder: epath.Path) -> Any:
  """Starts or resumes the run of a MODEL_DIR, with its macros as settings."""
  try:
    import wandb
  except ImportError as error:
    raise ImportError(
      f"expected the package wandb for the project {project!r}, got {error};"
      " run `pip install 'gkd_jax[wandb]'` or set WANDB_PROJECT = None"
    ) from error
  id_file, config_file = folder / "wandb_run.txt", folder / "config.gin"
  if not id_file.exists():
    files.write_text(id_file, uuid.uuid4().hex)
  config = config_file.read_text() if config_file.exists() else ""
  return wandb.init(
    project=project,
    name=folder.name,
    id=id_file.read_text(),
    resume="allow",
    dir=None if files.is_remote(folder) else os.fspath(folder),
    config=dict(re.findall(r"^([A-Z][A-Z0-9_]*) = (.*)$", config, re.M)),
  )


def _input_tokens(batch: Any) -> int:
  """Counts the encoder's tokens, or the prompts' of decoder-only rows."""
  if "encoder_input_tokens" in batch:
    mask = batch.get(types.INPUT_MASK, batch["encoder_input_tokens"])
    return int(np.count_nonzero(mask))
  if "decoder_segment_ids" not in batch:
    return sum(map(len, rollouts.prompts(batch)))
  tokens = np.count_nonzero(batch["decoder_target_tokens"])
  return int(tokens - np.count_nonzero(batch["decoder_loss_weights"]))


def _markdown(examples: Sequence[Mapping[str, Any]]) -> str:
  """Returns decoded examples as a Markdown table, which TensorBoard renders."""
  if not examples:
    return ""
  return markdown.table([examples[0], *(x.values() for x in examples)])
