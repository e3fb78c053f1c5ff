"""MODEL_DIR while a run writes to it: its lock, its settings."""

import os
import platform
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gkd_jax import files

_LOCK = "run.lock"
_CONFIG = "config.gin"
_BEAT_S = 20.0  # between two signs of life of a run


class RunLock:
  """A context manager that lets one run at a time write to a folder.

  The file `run.lock` names host, process and start. A lock of a process of this
  host that has ended is taken over. Of another host, only whether the lock is
  renewed shows whether its run is alive: it is watched for three beats.

  Args:
    model_dir: the run's folder, which is created.
    beat_s: seconds between two renewals.
    sleep: waits for some seconds.

  Raises:
    ValueError: another run writes to the folder.
  """

  def __init__(
    self,
    model_dir: files.Path,
    *,
    beat_s: float = _BEAT_S,
    sleep: Callable[[float], object] = time.sleep,
  ):
    self._path = files.absolute(model_dir) / _LOCK
    self._beat_s, self._sleep = beat_s, sleep
    self._ended = threading.Event()
    self._beats: threading.Thread | None = None
    self._mine = {
      "host": platform.node(),
      "pid": os.getpid(),
      "start": time.strftime("%Y-%m-%d %H:%M:%S"),
      "process_start": _process_start(os.getpid()),
      "beats": 0,
    }

  def __enter__(self) -> "RunLock":
    if jax.process_index():  # the first process locks for all
      return self
    if not self._create():
      held = _read(self._path)
      if held is not None and self._is_alive(held):
        raise ValueError(
          f"expected a MODEL_DIR that no other run writes to, got"
          f" {self._path.parent}, which process {held['pid']} on {held['host']}"
          f" has used since {held['start']}; set another MODEL_DIR, or end that"
          " run"
        )
      self._write()
    self._beats = threading.Thread(target=self._beat, daemon=True)
    self._beats.start()
    return self

  def __exit__(self, *_):
    if self._beats:
      self._ended.set()
      self._beats.join()
      if self._is_mine():
        self._path.unlink(missing_ok=True)

  def _create(self) -> bool:
    """Returns whether there was no lock; it is ours then."""
    if not files.is_remote(self._path):
      whole = self._path.with_name(f".{_LOCK}-{os.getpid()}")
      files.write_json(whole, self._mine)
      try:
        os.link(whole, self._path)
        return True
      except FileExistsError:
        return False
      except OSError:  # a file system without links
        pass
      finally:
        whole.unlink()
    # No exclusive creation: of two runs that begin at once, both may see none.
    if self._path.exists():
      return False
    self._write()
    return True

  def _is_alive(self, held: Mapping[str, Any]) -> bool:
    if held["host"] == self._mine["host"]:
      # A number of a process is used again, so its start counts too.
      started = _process_start(held["pid"])
      return started is not None and started == held["process_start"]
    print(
      f"waiting {3 * self._beat_s:.0f} s for a sign of life of process"
      f" {held['pid']} on {held['host']}, which has locked {self._path}",
      flush=True,
    )
    for _ in range(3):
      self._sleep(self._beat_s)
      now = _read(self._path)
      if now is None:
        return False
      if now != held:
        return True
    return False

  def _is_mine(self) -> bool:
    held = _read(self._path) or {}
    return all(held.get(k) == self._mine[k] for k in self._mine if k != "beats")

  def _beat(self):
    while not self._ended.wait(self._beat_s):
      # Not if another run has taken over from a process that stood still.
      if self._is_mine():
        self._mine["beats"] += 1
        self._write()

  def _write(self):
    files.write_json(self._path, self._mine)


def _read(path) -> dict[str, Any] | None:
  try:
    return files.read_json(path)
  except (ValueError, FileNotFoundError):  # being written, or just removed
    return None


def _process_start(pid: int) -> str | None:
  """Returns when a process of this host began, None if there is none."""
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rsplit(")", 1)[1].split()[19]
  except FileNotFoundError:
    pass
  if os.path.exists("/proc/self/stat"):
    return None
  try:  # without /proc: any process of this number
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:
    pass
  return "unknown"


def changed_settings(model_dir: files.Path, config: str) -> list[str]:
  """Returns a line for each setting that differs from the saved one.

  Args:
    model_dir: the run's folder.
    config: the configuration of now, as gin writes it.
  """
  path = files.absolute(model_dir) / _CONFIG
  if not path.exists():
    return []
  old, new = _bindings(path.read_text()), _bindings(config)
  return [
    f"{name} = {new.get(name, 'no value')} (was {old.get(name, 'no value')})"
    for name in sorted({*old, *new})
    if old.get(name) != new.get(name)
  ]


def update_settings(model_dir: files.Path, config: str) -> None:
  """Writes `MODEL_DIR/config.gin`, as T5X does, and prints what has changed.

  Args:
    model_dir: the run's folder.
    config: the configuration, as gin writes it; "" writes nothing.
  """
  if config and jax.process_index() == 0:
    for line in changed_settings(model_dir, config):
      print(f"changed since it was saved: {line}", flush=True)
    files.write_text(files.absolute(model_dir) / _CONFIG, config)


def _bindings(config: str) -> dict[str, str]:
  """Returns the bindings of gin's text, name to value."""
  # Gin breaks a long value after a backslash, or inside brackets.
  text = re.sub(r"\\\n\s*", "", config)
  found: dict[str, str] = {}
  name = None
  for line in text.splitlines():
    if match := re.match(r"([\w./]+) = ?(.*)", line):
      name = match[1]
      found[name] = match[2]
    elif name and line.startswith(" "):
      found[name] += " " + line.strip()
    else:
      name = None
  return found
