"""Training in several processes, and stopping all of them at one step."""

import inspect
import signal

import jax
from jax.experimental import multihost_utils


def initialize(
  coordinator_address: str | None,
  process_count: int | None,
  process_index: int | None,
  lost_after_s: int,
) -> None:
  """Starts `jax.distributed`, which notices soon when a process is lost.

  JAX then names the lost process and aborts the others (SIGABRT, status 134):
  without that, they would wait for it in a collective for ever.

  Args:
    coordinator_address: host and port of process 0; None lets JAX find it.
    process_count: number of processes; None lets JAX find it.
    process_index: index of this process; None lets JAX find it.
    lost_after_s: seconds without a heartbeat after which a process counts as
      lost, and seconds that a process that ends waits for the others.
  """
  timeouts = {
    "heartbeat_timeout_seconds": lost_after_s,
    "shutdown_timeout_seconds": lost_after_s,
  }
  # The oldest versions of JAX that we support have neither.
  known = inspect.signature(jax.distributed.initialize).parameters
  jax.distributed.initialize(
    coordinator_address,
    process_count,
    process_index,
    **{name: value for name, value in timeouts.items() if name in known},
  )


class Stopped(SystemExit):
  """The end of a run after SIGTERM: saved, but not at its last step.

  The exit status is not 0, so that whatever runs the program restarts it.
  """

  def __init__(self):
    super().__init__(128 + signal.SIGTERM)


class StopSignal:
  """A context manager that turns SIGTERM into a stop at a common step.

  In a single process the signal sets a flag. Of several processes any one may
  get the signal; JAX's coordination service then chooses the step at which all
  of them stop, so that all save the same checkpoint.
  """

  def __init__(self):
    self._flag = False
    self._alone = jax.process_count() == 1

  def __enter__(self) -> "StopSignal":
    # With several processes JAX's own handler must stay.
    if self._alone:
      self._old = signal.signal(signal.SIGTERM, self._set)
    return self

  def __exit__(self, *_):
    if self._alone:
      signal.signal(signal.SIGTERM, self._old)

  def asked(self, step: int) -> bool:
    """Returns whether to save and stop after `step`; to be called each step."""
    if self._alone:
      return self._flag
    return multihost_utils.reached_preemption_sync_point(step)

  def _set(self, *_):
    self._flag = True
