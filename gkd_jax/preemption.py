"""Stopping at a step boundary when the machine is about to be taken away."""

import signal

import jax
from jax.experimental import multihost_utils


class Stopped(SystemExit):
  """Ends the program after SIGTERM: saved, not at its last step.

  The status is not 0, so that what runs the program starts it again.
  """

  def __init__(self):
    super().__init__(128 + signal.SIGTERM)


class StopSignal:
  """Turns SIGTERM into an answer that every process gives at the same step.

  A context manager. With one process it is a flag. With several, whichever of
  them is told to stop, JAX's coordination service chooses the step, so that all
  of them save the same one.
  """

  def __init__(self):
    self._flag = False
    self._alone = jax.process_count() == 1

  def __enter__(self) -> "StopSignal":
    # With several processes JAX has its own handler, which must stay.
    if self._alone:
      self._old = signal.signal(signal.SIGTERM, self._set)
    return self

  def __exit__(self, *_):
    if self._alone:
      signal.signal(signal.SIGTERM, self._old)

  def asked(self, step: int) -> bool:
    """Whether to save and stop after `step`; called once for every step."""
    if self._alone:
      return self._flag
    return multihost_utils.reached_preemption_sync_point(step)

  def _set(self, *_):
    self._flag = True
