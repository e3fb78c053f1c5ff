"""Checks a grid's gin, runs its cells as processes, and resumes a stopped sweep."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from gkd_jax import files
from gkd_jax.experiments import run_folders, sweeps

GKD = (sys.executable, "-m", "gkd_jax.main")
_POLL_SECONDS = 0.2
_TAIL_LINES = 20


@dataclasses.dataclass
class _Running:
  """A cell that runs; without a process, a sweep that was killed started it."""

  cell: sweeps.Cell
  cores: list[int]
  process: subprocess.Popen | None


def sweep(
  definition: Mapping[str, Any],
  output_dir: str | None,
  *,
  bindings: Sequence[str],
  search_paths: Sequence[str],
  options: Sequence[str],
  jobs: int,
  print_commands: bool,
) -> bool:
  """Checks and runs the unfinished cells of a grid, or prints their commands.

  Args:
    definition: see `sweeps.cells`, as `bindings`.
    output_dir: folder of the sweep.
    bindings: further gin bindings.
    search_paths: further folders of gin files.
    options: see `run`, as `jobs`.
    jobs: cells at a time.
    print_commands: whether nothing is run.

  Returns:
    Whether every cell is finished, or printed.

  Raises:
    ValueError: a setting or a cell is wrong.
  """
  if not output_dir:
    raise ValueError("expected a folder, got none; set --output_dir")
  cells = sweeps.cells(definition, bindings)
  output = os.fspath(files.absolute(output_dir))
  if files.is_remote(output):
    raise ValueError(
      "expected a local folder for the cells, which run on this machine under"
      f" locks and logs, got {output}; set --output_dir"
    )
  files.check_folder(output, "--output_dir")
  left = [cell for cell in cells if not is_finished(cell, output)]
  _check_cells(left, output, search_paths)
  prepare(cells, output, definition.get("report", {}))
  if search_paths:
    options = [f"--gin_search_paths={','.join(search_paths)}", *options]
  if print_commands:
    print(commands(cells, output, options))
    return True
  return run(cells, output, jobs=jobs, options=options)


def prepare(
  cells: Sequence[sweeps.Cell], output: str, report: Mapping[str, Any]
):
  """Creates the cells' folders, with `cell.json`, and writes `sweep.json`.

  Args:
    cells: from `sweeps.cells`.
    output: folder of the sweep.
    report: the sweep file's settings of the report, kept in `sweep.json`.

  Raises:
    ValueError: a folder has a cell with other settings, or a gin string cannot
      contain `output`.
  """
  if set(output) & set("'\"\\{}"):
    raise ValueError(
      "expected a folder without quotes, backslashes and braces, got"
      f" {output!r}; set --output_dir"
    )
  for cell in cells:
    folder = os.path.join(output, cell.name)
    path = os.path.join(folder, "cell.json")
    new = json.loads(json.dumps(dataclasses.asdict(cell)))
    old = files.read_json(path)
    if old is not None:
      changed = [k for k in new if old.get(k) != new[k]]
      if changed and has_begun(cell, output):
        raise ValueError(
          f"expected the {', '.join(changed)} that {folder} was begun with,"
          f" {[old.get(k) for k in changed]}, got {[new[k] for k in changed]};"
          " remove that folder, or set another --output_dir"
        )
    files.write_json(path, new)
  axes: dict[str, list[str]] = {}
  for cell in cells:
    for axis, label in cell.axes.items():
      if label not in axes.setdefault(axis, []):
        axes[axis].append(label)
  names = [cell.name for cell in cells]
  sweep = {"axes": axes, "cells": names, "report": dict(report)}
  files.write_json(os.path.join(output, "sweep.json"), sweep)


def has_begun(cell: sweeps.Cell, output: str) -> bool:
  """Whether a sweep ever started the cell, or it is finished."""
  log = os.path.join(output, cell.name, "log.txt")
  return os.path.exists(log) or is_finished(cell, output)


def is_finished(cell: sweeps.Cell, output: str) -> bool:
  """Whether the cell's last file exists, whoever ran it."""
  done = cell.done or "done.json"
  return os.path.exists(os.path.join(output, cell.name, done))


def commands(
  cells: Sequence[sweeps.Cell], output: str, options: Sequence[str] = ()
) -> str:
  """Returns shell lines of the unfinished cells, in the order of their needs."""
  left = [cell for cell in cells if not is_finished(cell, output)]
  waves: dict[str, int] = {}
  for cell in left:
    waves[cell.name] = 1 + max((waves.get(n, 0) for n in cell.needs), default=0)
  lines = []
  for wave in sorted(set(waves.values())):
    after = f": after wave {wave - 1} has finished" if wave > 1 else ""
    lines.append(f"# wave {wave}{after}")
    ready = [cell for cell in left if waves[cell.name] == wave]
    lines += [_shell_line(cell, output, options) for cell in ready]
  return "\n".join(lines)


def _shell_line(cell, output, options):
  environment = cell.environment(output).items()
  words = [f"{name}={shlex.quote(value)}" for name, value in environment]
  words += ["gkd", *map(shlex.quote, [*cell.arguments(output), *options])]
  if cell.done is None:
    marker = os.path.join(output, cell.name, "done.json")
    words.append(f"&& echo '{{}}' >{shlex.quote(marker)}")
  return " ".join(words)


def run(
  cells: Sequence[sweeps.Cell],
  output: str,
  *,
  jobs: int,
  options: Sequence[str] = (),
  program: Sequence[str] = GKD,
) -> bool:
  """Runs the unfinished cells, `jobs` at a time.

  A cell that fails does not stop the others, but those that need it do not run.
  SIGTERM and Ctrl-C are passed on, so that training saves before it stops.

  Args:
    cells: from `sweeps.cells`, prepared.
    output: folder of the sweep.
    jobs: cells at a time; they share the cores of this process out.
    options: further command line arguments of each cell.
    program: the command to start with a cell's arguments.

  Returns:
    Whether every cell is finished.
  """
  # Only files say that a cell is finished, so any process may be killed.
  waiting = [cell for cell in cells if not is_finished(cell, output)]
  if len(waiting) < len(cells):
    done = len(cells) - len(waiting)
    print(f"{done} of {len(cells)} cells are finished already", flush=True)
  failed: dict[str, str] = {}
  running: list[_Running] = []
  free = core_groups(jobs)
  command = lambda cell: [*program, *cell.arguments(output), *options]
  with _forwarded_signals(running) as stopped:
    while (waiting and not stopped) or running:
      while free and not stopped:
        cell = _next_cell(waiting, cells, failed, output)
        if cell is None:
          break
        running.append(_start(cell, output, free.pop(0), command(cell)))
        if stopped and running[-1].process:  # a signal came in between
          running[-1].process.terminate()
      time.sleep(_POLL_SECONDS)
      for item in list(running):
        if stopped and item.process is None:
          running.remove(item)  # another sweep's to stop
          continue
        error = _outcome(item, output)
        if error is None:
          continue
        running.remove(item)
        free.append(item.cores)
        if error and item.process is None:
          waiting.insert(0, item.cell)  # resumes where the other one stopped
          continue
        if error and not stopped:
          failed[item.cell.name] = error
        _say_outcome(
          item.cell, "stopped" if error and stopped else error, output
        )
        run_folders.write_table(output)
  run_folders.write_table(output)
  for name, error in failed.items():
    print(f"\n{name}: {error}", flush=True)
  if stopped:
    print("stopped; the same command goes on from here", flush=True)
    sys.exit(128 + stopped[0])
  print(
    f"{sum(is_finished(cell, output) for cell in cells)} of {len(cells)} cells"
    f" finished, {len(failed)} failed or left out;"
    f" table in {os.path.join(output, 'cells.csv')}",
    flush=True,
  )
  return not failed


def core_groups(jobs: int) -> list[list[int]]:
  """Deals out the cores of this process to `jobs` cells.

  More jobs than cores share them. Lists are empty, and no affinity is set, if the
  system has none.
  """
  if not hasattr(os, "sched_getaffinity"):
    return [[] for _ in range(jobs)]
  cores = sorted(os.sched_getaffinity(0))
  return [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]


def _next_cell(waiting, cells, failed, output) -> sweeps.Cell | None:
  """Takes the first waiting cell whose needs are finished.

  Cells that need one in `failed` are moved there.
  """
  finished = {c.name for c in cells if is_finished(c, output)}
  for cell in list(waiting):
    missing = [name for name in cell.needs if name in failed]
    if missing:
      waiting.remove(cell)
      failed[cell.name] = f"not run: it needs {', '.join(missing)}"
    elif finished.issuperset(cell.needs):
      waiting.remove(cell)
      return cell
  return None


def _say_outcome(cell, error, output):
  """Prints the error's first line, or the greedy scores of a finished cell."""
  if error:
    text = error.splitlines()[0]
  else:
    row = run_folders.read_cell(os.path.join(output, cell.name))
    scores = {k: v for k, v in row.items() if k.startswith("greedy/")}
    text = " ".join(["finished", *(f"{k} {v:.2f}" for k, v in scores.items())])
  print(f"{time.strftime('%H:%M:%S')} {cell.name}: {text}", flush=True)


def _start(cell, output, cores, command) -> _Running:
  """Starts a cell on its cores, or waits for one that a dead sweep started."""
  folder = os.path.join(output, cell.name)
  with open(os.path.join(folder, ".lock"), "w") as lock:
    if not _lock(lock):
      print(f"{cell.name}: is running already, waiting for it", flush=True)
      return _Running(cell, cores, None)
    if is_finished(cell, output):
      return _Running(cell, cores, None)
    print(f"{time.strftime('%H:%M:%S')} {cell.name}: started", flush=True)
    before = _set_cores(cores)
    try:
      with open(os.path.join(folder, "log.txt"), "ab") as log:
        process = subprocess.Popen(
          command,
          stdout=log,
          stderr=subprocess.STDOUT,
          stdin=subprocess.DEVNULL,
          env=_environment(cell, output),
          # Ctrl-C reaches only the sweep, which passes SIGTERM on.
          start_new_session=True,
          # The cell holds the lock to its end, even if the sweep is killed.
          pass_fds=[lock.fileno()],
        )
    finally:
      _set_cores(before)
  return _Running(cell, cores, process)


def _set_cores(cores):
  """Sets the cores that a new child inherits, and returns the old ones.

  XLA's thread pools count cores when they start, so later is too late.
  """
  if not cores:
    return cores
  before = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, cores)
  return before


def _environment(cell, output):
  # The cells share a few programs, which are compiled once for each machine,
  # since they depend on its processor.
  compiled = os.path.join(output, f".compiled-{platform.node()}")
  defaults = {
    "JAX_COMPILATION_CACHE_DIR": compiled,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # a failed cell's last lines are its own
  }
  return defaults | os.environ | cell.environment(output)


def _outcome(item: _Running, output: str) -> str | None:
  """Returns None while a cell runs, "" when it is finished, else the error."""
  cell = item.cell
  folder = os.path.join(output, cell.name)
  status = None
  if item.process is not None:
    status = item.process.poll()
    if status is None:
      return None
  else:
    with open(os.path.join(folder, ".lock"), "w") as lock:
      if not _lock(lock):
        return None
  if status == 0 and cell.done is None:
    files.write_json(os.path.join(folder, "done.json"), {})
  if is_finished(cell, output):
    return ""
  if status:
    reason = f"failed with exit status {status}"
  else:
    reason = f"ended without {cell.done}, which says that it is finished"
    if cell.done == "final.json":
      reason += "; set FINAL_EVAL_SPLIT"
  return f"{reason}\n{_tail(os.path.join(folder, 'log.txt'))}"


def _tail(path):
  """Returns the last lines of a log."""
  if not os.path.exists(path):
    return f"no log in {path}"
  with open(path, errors="replace") as f:
    lines = collections.deque(f, maxlen=_TAIL_LINES)
  return "".join(f"  {line}" for line in lines).rstrip("\n")


def _lock(file: IO) -> bool:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


@contextlib.contextmanager
def _forwarded_signals(running: list[_Running]) -> Iterator[list[int]]:
  """Passes SIGTERM and SIGINT on as SIGTERM; yields a list of those that came."""
  seen: list[int] = []

  def handle(number, frame):
    del frame
    seen.append(number)
    for item in running:
      if item.process is not None:
        item.process.terminate()

  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.signal(number, handle) for number in numbers}
  try:
    yield seen
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _check_cells(cells, output, search_paths) -> None:
  """Does what `check_here` does in a process of its own.

  So the modules that gin imports (JAX, TensorFlow) do not stay in the memory of
  the sweep's process, which may run for days.
  """
  if not cells:
    return
  with concurrent.futures.ProcessPoolExecutor(
    max_workers=1, mp_context=multiprocessing.get_context("spawn")
  ) as pool:
    pool.submit(check_here, cells, output, search_paths).result()


def check_here(
  cells: Sequence[sweeps.Cell], output: str, search_paths: Sequence[str]
):
  """Parses the gin of each cell, which changes gin's state.

  Args:
    cells: those to run.
    output: folder of the sweep.
    search_paths: further folders of gin files.

  Raises:
    ValueError: gin cannot be parsed, nothing reads a macro, or a training cell
      would write no `final.json`.
  """
  from gkd_jax.command_line import gin_settings

  # Seeds differ by a number alone, so one of them is enough.
  firsts: dict[tuple, sweeps.Cell] = {}
  for cell in cells:
    firsts.setdefault((cell.stage, *cell.axes.values()), cell)
  for cell in firsts.values():
    bindings = [f"{k} = {v}" for k, v in cell.bindings(output).items()]
    try:
      gin_settings.parse(cell.gin_files, bindings, search_paths)
    except Exception as error:  # gin raises many kinds
      # The first line is what is wrong, the others say where gin met it.
      reason = str(error).strip().splitlines() or [repr(error)]
      raise ValueError(f"{cell.name}: {reason[0]}") from None
    scored = cell.command == "train" and cell.done == "final.json"
    if scored and not gin_settings.macro("FINAL_EVAL_SPLIT"):
      raise ValueError(
        f"expected a split to score {cell.name} on, got none;"
        " set FINAL_EVAL_SPLIT"
      )
