"""Training in several processes, and stopping all of them at one step."""

import inspect
import os
import signal
import sys

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
  """The end of a run after a signal: saved, but not at its last step.

  The exit status is not 0, so that whatever runs the program restarts it.
  """

  def __init__(self, number: int = signal.SIGTERM):
    super().__init__(128 + number)


class StopSignal:
  """A context manager that turns SIGTERM and Ctrl-C into a stop at a common step.

  In a single process the signal sets a flag. Of several processes any one may
  get the signal; JAX's coordination service then chooses the step at which all
  of them stop, so that all save the same checkpoint. A second Ctrl-C ends the
  process at once.

  Attributes:
    number: the signal that came first, `signal.SIGTERM` or `signal.SIGINT`.
  """

  def __init__(self):
    self.number = signal.SIGTERM
    self._flag = False
    self._alone = jax.process_count() == 1

  def __enter__(self) -> "StopSignal":
    self._old = {}
    # A shell lets programs in the background ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
      self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
    # With several processes JAX's own handler must stay.
    if self._alone:
      self._old[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._set)
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def asked(self, step: int) -> bool:
    """Returns whether to save and stop after `step`; to be called each step."""
    if self._alone:
      return self._flag
    return multihost_utils.reached_preemption_sync_point(step)

  def _set(self, *_):
    self._flag = True

  def _interrupt(self, *_):
    # The next one ends the process even while it compiles.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    self.number = signal.SIGINT
    self._flag = True
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    print(
      f"{show_cursor}\ninterrupted: saves after this step and stops; Ctrl-C again"
      " ends at once, without saving",
      file=sys.stderr,
      flush=True,
    )
    if not self._alone:
      os.kill(os.getpid(), signal.SIGTERM)
