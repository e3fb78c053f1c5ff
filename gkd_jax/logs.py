"""Scalars of a run: metrics.jsonl, TensorBoard, and lines on the terminal."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import metric_writers

from gkd_jax import types


def count(params: Any) -> int:
  """Number of parameters of a tree of arrays or shapes."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


def bytes_per_device(params: Any) -> int:
  """Bytes that one device holds of a tree of placed arrays."""
  return sum(
    x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params)
  )


class TrainLog:
  """Collects (sum, weight) metrics and writes their quotients.

  Args:
    model_dir: of the run.
    start: first step.
    total: last step.
  """

  def __init__(self, model_dir: str, start: int, total: int):
    os.makedirs(model_dir, exist_ok=True)
    self._dir, self._total, self._last = model_dir, total, start
    self._writer = metric_writers.SummaryWriter(model_dir)
    self._sums: dict[str, list] = {}
    self._on_policy = self._rows = self._tokens = 0
    self._time = self._started = time.monotonic()
    self._terminal = sys.stdout.isatty()

  def add(self, metrics: types.Metrics, source: str, batch: Any):
    """Takes one step's metrics; does not wait for the device."""
    for name, pair in metrics.items():
      self._sums.setdefault(name, []).append(pair)
    self._on_policy += source != "data"
    tokens = batch["encoder_input_tokens"]
    self._rows += len(tokens)
    self._tokens += int(np.count_nonzero(tokens))
    self._tokens += int(np.count_nonzero(batch["decoder_target_tokens"]))

  def write(self, step: int):
    """Writes the means since the last call."""
    scalars = {}
    for name, pairs in self._sums.items():
      values = np.sum(np.array(jax.device_get(pairs), np.float64), axis=0)
      scalars[name] = (
        float(values[0] / values[1]) if values[1] else float("nan")
      )
    now = time.monotonic()
    seconds, steps = now - self._time, max(step - self._last, 1)
    scalars |= {
      "seconds_per_step": seconds / steps,
      "examples_per_second": self._rows / seconds,
      "tokens_per_second": self._tokens / seconds,
      "on_policy_steps": self._on_policy / steps,
    }
    self._record(step, scalars)
    left = (self._total - step) * scalars["seconds_per_step"]
    line = (
      f"step {step}/{self._total} loss {scalars['loss']:.4f}"
      f" {scalars['examples_per_second']:.0f} examples/s"
      f" {scalars['tokens_per_second']:.0f} tokens/s"
      f" on-policy {100 * scalars['on_policy_steps']:.0f}%"
      f" ETA {int(left // 60)}:{int(left % 60):02d}"
    )
    ending = "\r" if self._terminal and step < self._total else "\n"
    print(line, end=ending, flush=True)
    self._sums = {}
    self._on_policy = self._rows = self._tokens = 0
    self._time, self._last = time.monotonic(), step

  def evaluation(
    self,
    step: int,
    scores: Mapping[str, float],
    examples: Sequence[Mapping[str, Any]],
  ):
    """Writes the scores of an evaluation and decoded examples."""
    self._record(step, {f"eval/{k}": v for k, v in scores.items()})
    self._writer.write_texts(
      step, {"examples": "\n\n".join(map(str, examples))}
    )
    with open(os.path.join(self._dir, "examples.jsonl"), "a") as f:
      for example in examples:
        f.write(json.dumps({"step": step, **example}) + "\n")
    shown = " ".join(f"{k} {v:.2f}" for k, v in scores.items())
    print(f"step {step} evaluation: {shown}", flush=True)
    self._time = time.monotonic()

  def final(self, result: Mapping[str, Any]):
    """Writes `final.json`, with the seconds since the run was started."""
    result = dict(result) | {"seconds": time.monotonic() - self._started}
    path = os.path.join(self._dir, "final.json")
    with open(path + ".tmp", "w") as f:
      json.dump(result, f)
    os.replace(path + ".tmp", path)
    print(f"final: {json.dumps(result)}", flush=True)

  def _record(self, step, scalars):
    finite = {k: v if np.isfinite(v) else None for k, v in scalars.items()}
    with open(os.path.join(self._dir, "metrics.jsonl"), "a") as f:
      f.write(json.dumps({"step": step, **finite}) + "\n")
    self._writer.write_scalars(step, scalars)

  def close(self):
    """Flushes TensorBoard's file."""
    self._writer.close()
