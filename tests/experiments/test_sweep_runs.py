"""Running a grid: each cell once, whatever happens."""

import csv
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import sweep_folders

from gkd_jax.experiments import sweep_runner, sweeps

ROOT = pathlib.Path(__file__).parents[2]

# ---- running: a stand-in for `gkd` that does what a cell of a grid does ------

PROGRAM = """
import json, os, signal, sys, time
folder = next(a.split("=", 1)[1].strip("'") for a in sys.argv if "_DIR=" in a)
flags = dict(a.split("=", 1) for a in sys.argv if a.startswith("--gin."))
with open(os.path.join(folder, "starts"), "a") as f:
  f.write("%s\\n" % json.dumps(sorted(os.sched_getaffinity(0))))
with open(os.path.join(folder, "pid"), "w") as f:
  f.write(str(os.getpid()))
print("last words of", folder, flush=True)
if flags.get("--gin.FAIL"):
  sys.exit(7)
begun = os.path.join(folder, "begun")
if flags.get("--gin.SLOW") and not os.path.exists(begun):
  open(begun, "w").close()
  time.sleep(float(flags["--gin.SLOW"]))
if not flags.get("--gin.SILENT"):
  final = {"greedy": {"wer": 2.5}, "seconds": 1.5, "params": 9, "split": "test"}
  with open(os.path.join(folder, "final.json"), "w") as f:
    json.dump(final, f)
"""

GRID = """
seeds = 2
[axes.kind]
good = {GOOD = 1}
bad = {FAIL = 1}
slow = {SLOW = 60}
[stages.first]
axes = ["kind"]
[stages.second]
axes = ["kind=good,bad"]
macros = {INITIAL_CHECKPOINT_PATH = "{first}"}
"""


@pytest.fixture
def stand_in(tmp_path):
  (tmp_path / "program.py").write_text(PROGRAM)
  return [sys.executable, str(tmp_path / "program.py")]


def run(cells, output, stand_in, jobs=1):
  sweep_runner.prepare(cells, str(output), {})
  return sweep_runner.run(cells, str(output), jobs=jobs, program=stand_in)


def starts(output):
  return {
    str(path.parent.relative_to(output)): len(path.read_text().splitlines())
    for path in sorted(output.glob("*/*/starts"))
  }


def test_a_failed_cell_is_told_of_and_stops_only_what_needs_it(
  tmp_path, stand_in, capsys
):
  text = GRID.replace("SLOW = 60", "SILENT = 1")
  cells = sweeps.cells(sweep_folders.read(tmp_path, text))
  output = tmp_path / "out"
  assert not run(cells, output, stand_in)
  begun = {
    f"first/{k}_seed{s}" for k in ("good", "bad", "slow") for s in (0, 1)
  }
  begun |= {"second/good_seed0", "second/good_seed1"}
  assert starts(output) == dict.fromkeys(begun, 1)
  printed = capsys.readouterr().out
  assert "first/bad_seed1: failed with exit status 7\n  last words" in printed
  assert "second/bad_seed0: not run: it needs first/bad_seed0" in printed
  assert "first/slow_seed0: ended without final.json" in printed
  assert "4 of 10 cells finished, 6 failed or left out" in printed
  with open(output / "cells.csv") as f:
    rows = {row["cell"]: row for row in csv.DictReader(f)}
  row = rows["second/good_seed1"]
  assert (row["status"], row["kind"], row["seed"]) == ("finished", "good", "1")
  assert (row["greedy/wer"], row["seconds"], row["params"]) == (
    ("2.5", "1.5", "9")
  )
  assert rows["first/bad_seed0"]["status"] == "not finished"
  # Mended: what failed and what was left out runs, the rest does not.
  (tmp_path / "program.py").write_text(PROGRAM.replace("sys.exit(7)", "pass"))
  assert not run(cells, output, stand_in)
  again = starts(output)
  assert again["first/good_seed0"] == again["second/good_seed0"] == 1
  assert again["first/bad_seed0"] == 2 and again["second/bad_seed0"] == 1


def wait_for(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def is_locked(path):
  with open(path, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False


def sweep_process(tmp_path, stand_in):
  """The same sweep in a process of its own, which may be killed."""
  code = (
    "import sys\n"
    "from gkd_jax.experiments import sweep_runner, sweeps\n"
    "cells = sweeps.cells(sweeps.read(sys.argv[1]))\n"
    "sweep_runner.prepare(cells, sys.argv[2], {})\n"
    "sweep_runner.run(cells, sys.argv[2], jobs=2, program=sys.argv[3:])\n"
  )
  file, output = str(tmp_path / "sweep.toml"), str(tmp_path / "out")
  return subprocess.Popen(
    [sys.executable, "-c", code, file, output, *stand_in],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize("cell_dies_too", [True, False])
def test_a_killed_sweep_goes_on_and_redoes_nothing(
  tmp_path, stand_in, capsys, cell_dies_too
):
  # The slow cell dies with the sweep and is started again, or outlives it and
  # is waited for.
  text = GRID.replace("SLOW = 60", f"SLOW = {60 if cell_dies_too else 4}")
  text = text.replace("bad = {FAIL = 1}", "bad = {BAD = 1}").replace(
    "= 2", "= 1", 1
  )
  cells = sweeps.cells(sweep_folders.read(tmp_path, text))
  output = tmp_path / "out"
  slow = output / "first" / "slow_seed0"
  process = sweep_process(tmp_path, stand_in)
  wait_for((output / "second" / "good_seed0" / "final.json").exists)
  wait_for((slow / "begun").exists)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  assert not (slow / "final.json").exists()
  if cell_dies_too:
    os.kill(int((slow / "pid").read_text()), signal.SIGKILL)
    wait_for(lambda: not is_locked(slow / ".lock"))
  before = starts(output)
  assert run(cells, output, stand_in, jobs=2)
  after = starts(output)
  assert len(after) == 5
  assert after.pop("first/slow_seed0") == 1 + cell_dies_too
  assert set(after.values()) == {1}
  assert before["second/good_seed0"] == 1
  waited = "slow_seed0: is running already, waiting" in capsys.readouterr().out
  assert waited != cell_dies_too


def test_sigterm_reaches_the_cells_and_no_other_is_begun(tmp_path, stand_in):
  text = GRID.replace("good = {GOOD = 1}", "good = {GOOD = 1, SLOW = 60}")
  sweeps.cells(sweep_folders.read(tmp_path, text))
  process = sweep_process(tmp_path, stand_in)
  output = tmp_path / "out"
  wait_for((output / "first" / "good_seed0" / "begun").exists)
  wait_for((output / "first" / "slow_seed0" / "begun").exists)
  process.terminate()
  printed, _ = process.communicate(timeout=20)
  assert process.returncode == 128 + signal.SIGTERM
  assert "stopped; the same command goes on from here" in printed
  assert len(starts(output)) == 3


def test_each_of_the_cells_starts_under_cores_of_its_own(tmp_path, stand_in):
  mine = sorted(os.sched_getaffinity(0))
  groups = sweep_runner.core_groups(2)
  if len(mine) > 1:
    assert sorted(groups[0] + groups[1]) == mine
  else:
    assert groups == [mine, mine]
  assert sweep_runner.core_groups(1) == [mine]
  grid = "[axes]\nX = [1, 2, 3]\n[stages.only]\nmacros = {SLOW = 0.3}"
  output = tmp_path / "out"
  assert run(
    sweeps.cells(sweep_folders.read(tmp_path, grid)), output, stand_in, jobs=2
  )
  used = [
    json.loads((output / f"only/X-{i}_seed0/starts").read_text())
    for i in (1, 2, 3)
  ]
  assert used[:2] == groups and used[2] in groups
  assert sorted(os.sched_getaffinity(0)) == mine


def test_the_printed_commands_do_what_the_sweep_does(tmp_path, stand_in):
  text = GRID.replace("{FAIL = 1}", '{env = {X = "a b"}}').replace("60", "0")
  cells = sweeps.cells(sweep_folders.read(tmp_path, text))
  output = tmp_path / "out"
  sweep_runner.prepare(cells, str(output), {})
  lines = sweep_runner.commands(cells, str(output)).splitlines()
  assert len(lines) == 12
  assert lines[0] == "# wave 1" and lines[7].startswith("# wave 2: after")
  gkd = tmp_path / "gkd"
  gkd.write_text(
    f'#!/bin/sh\necho "$X" >>{tmp_path}/x\nexec {" ".join(stand_in)} "$@"\n'
  )
  gkd.chmod(0o755)
  environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  subprocess.run(["bash", "-ec", "\n".join(lines)], env=environment, check=True)
  assert (tmp_path / "x").read_text().split("\n").count("a b") == 4
  assert sweep_runner.commands(cells, str(output)) == ""
  assert run(cells, output, stand_in)
  assert set(starts(output).values()) == {1}


def test_other_settings_for_a_cell_that_was_begun_are_refused(
  tmp_path, stand_in
):
  output = tmp_path / "out"
  grid = '[axes]\nX = [1, 2]\n[stages.only]\nmacros = {Y = "a"}'
  assert run(sweeps.cells(sweep_folders.read(tmp_path, grid)), output, stand_in)
  # Further points are welcome, and the folder may have moved.
  output = pathlib.Path(shutil.move(output, tmp_path / "moved"))
  more = grid.replace("[1, 2]", "[1, 2, 3]")
  assert run(sweeps.cells(sweep_folders.read(tmp_path, more)), output, stand_in)
  assert set(starts(output).values()) == {1}
  changed = sweeps.cells(
    sweep_folders.read(tmp_path, grid.replace('"a"', '"b"'))
  )
  with pytest.raises(ValueError, match=r"settings that .*X-1_seed0 was begun"):
    run(changed, output, stand_in)
  with pytest.raises(ValueError, match="without quotes"):
    run(changed, tmp_path / "it's", stand_in)
