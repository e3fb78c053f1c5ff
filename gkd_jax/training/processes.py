"""Starting as one of several processes, and what is said when one is lost.

JAX's coordination service, which process 0 keeps, hears a sign of life of every
process. When one is silent for long, or process 0 itself is gone, JAX
says which and aborts the others (SIGABRT, status 134); a collective of another
kind than gloo's would wait for ever. What to do then is said by a child process,
because an abort leaves Python no time to.

Stopping at a step boundary when the machine is about to be taken away.
"""

import atexit
import inspect
import signal
import subprocess

import jax
from jax.experimental import multihost_utils

_WORDS = (
  "gkd: expected all processes to go on, got an end of process {} from outside"
  " or because another was lost: above, JAX names it ('unhealthy' lists numbers,"
  " 'leader' is process 0); start all processes again with the same MODEL_DIR,"
  " as many as you like, and the run goes on from its last checkpoint"
)
# It ends with its parent: `read` gets the line of an ordinary end, or nothing.
_SCRIPT = "trap '' INT TERM HUP; read -r _ || echo \"$1\" >&2"


def initialize(
  coordinator_address: str | None,
  process_count: int | None,
  process_index: int | None,
  lost_after_s: int,
) -> None:
  """`jax.distributed.initialize`, with a short patience and last words.

  To be called before anything imports JAX, so that JAX's own goodbye, which
  waits for the other processes, comes before ours.

  Args:
    coordinator_address: host and port of process 0; None lets JAX find it.
    process_count: of all; None lets JAX find it.
    process_index: this process; None lets JAX find it.
    lost_after_s: seconds without a sign of life, and seconds that a process
      that ended waits for the others.
  """
  shell = ["/bin/sh", "-c", _SCRIPT, "sh"]
  index = "this" if process_index is None else process_index
  watcher = subprocess.Popen(
    [*shell, _WORDS.format(index)], stdin=subprocess.PIPE
  )
  atexit.register(watcher.communicate, b"ended\n")
  import jax

  wanted = {
    "heartbeat_timeout_seconds": lost_after_s,
    "shutdown_timeout_seconds": lost_after_s,
  }
  known = inspect.signature(jax.distributed.initialize).parameters
  jax.distributed.initialize(
    coordinator_address,
    process_count,
    process_index,
    **{name: value for name, value in wanted.items() if name in known},
  )


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
