"""A `jax.profiler` trace of a few training steps."""

import os
from typing import Any

import jax

from gkd_jax import files


class Profiler:
  """Traces the steps of `PROFILE_STEPS` into a run's folder.

  A context manager; the trace is written when its last step is done, or when the
  run ends before it. TensorBoard's profile plugin and Perfetto show it, with the
  step's parts as named scopes: sample, teacher, student, loss, update. Of several
  processes each traces its own devices.

  Args:
    model_dir: of the run; the trace is in `plugins/profile` there.
    steps: (first, last), counted from 1 as in the log; None traces nothing.
  """

  def __init__(self, model_dir: str, steps: tuple[int, int] | None):
    self._model_dir = os.fspath(files.absolute(model_dir))
    self._steps = steps
    self._tracing = False

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_):
    self._stop()

  def before(self, step: int) -> None:
    """Starts the trace before its first step.

    Args:
      step: steps done so far.
    """
    if self._steps and not self._tracing and step + 1 == self._steps[0]:
      jax.profiler.start_trace(self._model_dir)
      self._tracing = True

  def after(self, step: int, outputs: Any) -> None:
    """Writes the trace after its last step.

    Args:
      step: steps done before this one.
      outputs: arrays of the step, which is waited for.
    """
    if self._tracing and self._steps and step + 1 == self._steps[1]:
      jax.block_until_ready(outputs)
      self._stop()

  def _stop(self):
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
