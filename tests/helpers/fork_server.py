"""Processes of `gkd`, or of Python, that start with all imports done.

An interpreter that has imported JAX, TensorFlow and the package waits for command
lines and forks for each: a new process in every respect, with JAX's backends still to
be initialized, in a tenth of a second instead of eight seconds of imports. Run as a
script it is that interpreter; `Process` starts it when it is first needed.
"""

import array
import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading


class Process:
  """A forked process, with the methods of `subprocess.Popen` that tests need.

  Args:
    arguments: of `gkd`; or "-c", Python's code and its arguments.
    cwd: its folder.
    env: its environment, with a PYTHONPATH.
  """

  def __init__(self, arguments, cwd, env):
    # Standard output is read while the process runs, errors at its end.
    output, into = os.pipe()
    self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    status, status_into = os.pipe()
    request = {"arguments": arguments, "cwd": os.fspath(cwd), "env": env}
    _send(_server(), request, [into, self._errors.fileno(), status_into])
    os.close(into)
    os.close(status_into)
    self.stdout = os.fdopen(output)
    self._status = os.fdopen(status)
    self.pid = int(self._status.readline())
    self.returncode = None

  def send_signal(self, number):
    os.kill(self.pid, number)

  def kill(self):
    self.send_signal(signal.SIGKILL)

  def wait(self, timeout=300):
    """Returns the exit status, a signal's number negative, as `Popen` does."""
    if self.returncode is None:
      with _killed_after(timeout, self):
        self.returncode = int(self._status.readline())
    return self.returncode

  def communicate(self, timeout=300):
    """Returns the rest of standard output, and all errors, at the end."""
    with _killed_after(timeout, self):
      output = self.stdout.read()
      self.wait(timeout)
    self._errors.seek(0)
    with self.stdout, self._status, self._errors:
      return output, self._errors.read()


@contextlib.contextmanager
def _killed_after(seconds, process):
  """Kills a process that hangs."""
  timer = threading.Timer(seconds, process.kill)
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


@functools.cache
def _server():
  """The connection to the interpreter that forks."""
  ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
  server = subprocess.Popen(
    [sys.executable, __file__, str(theirs.fileno())],
    pass_fds=[theirs.fileno()],
    # Before JAX is imported: what all processes of the suite share.
    env=os.environ | {"PYTHONPATH": os.path.dirname(__file__) + "/../.."},
  )
  theirs.close()

  def stop():
    ours.close()
    server.wait()

  atexit.register(stop)
  return ours


def _send(connection, request, files):
  message = json.dumps(request).encode()
  rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files)
  connection.sendmsg([message], [rights])


def _serve(connection):
  """Forks for each request; returns the request, in the process that runs it."""
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers end unnoticed
  while True:
    message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    if not message:
      os._exit(0)
    if os.fork():
      for file in files:
        os.close(file)
      continue
    # The keeper waits for the process that it forks, and passes its status on.
    connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    output, errors, status = files
    pid = os.fork()
    if not pid:
      os.close(status)
      for file, number in ((output, 1), (errors, 2)):
        os.dup2(file, number)
        os.close(file)
      return json.loads(message)
    os.close(output)
    os.write(status, f"{pid}\n".encode())
    _, code = os.waitpid(pid, 0)
    os.write(status, f"{os.waitstatus_to_exitcode(code)}\n".encode())
    os._exit(0)


def _main():
  import tensorflow  # noqa: F401

  import gkd_jax
  from gkd_jax import infer, main, train  # noqa: F401
  from gkd_jax.checkpoints import export  # noqa: F401
  from gkd_jax.planning import precompile  # noqa: F401

  request = _serve(socket.socket(fileno=int(sys.argv[1])))
  gkd_jax.STARTED = gkd_jax.time.monotonic()
  os.environ.clear()
  os.environ.update(request["env"])
  os.chdir(request["cwd"])
  sys.path[:0] = [request["cwd"], *os.environ["PYTHONPATH"].split(":")]
  if request["arguments"][0] == "-c":
    _, code, *sys.argv[1:] = request["arguments"]
    exec(code, {})
  else:
    sys.argv[1:] = request["arguments"]
    main.main()


if __name__ == "__main__":
  _main()
