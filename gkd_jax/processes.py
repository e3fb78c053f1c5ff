"""Starting as one of several processes, and what is said when one is lost.

JAX's coordination service, which process 0 keeps, hears a sign of life of every
process. When one is silent for long, or process 0 itself is gone, JAX
says which and aborts the others (SIGABRT, status 134); a collective of another
kind than gloo's would wait for ever. What to do then is said by a child process,
because an abort leaves Python no time to.
"""

import atexit
import inspect
import subprocess

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
