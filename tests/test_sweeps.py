"""Grids: which cells there are, and that each is run once, whatever happens."""

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

import gin
from gkd_jax import (
  gin_utils,
  main,
  precompile,
  sweep_check,
  sweep_runner,
  sweeps,
  train,
)

ROOT = pathlib.Path(__file__).parent.parent

METHODS = """
seeds = [3, 5]
gin_file = ["task.gin"]
[macros]
TRAIN_STEPS = 7
MIXTURE_OR_TASK_NAME = "task_{labelled}"
[axes]
labelled = ["1k", "all"]
[axes.size]
small = {STUDENT = "%SMALL"}
base = {STUDENT = "%BASE"}
[axes.method]
SeqKD = {gin_file = "seqkd.gin", env = {OUTPUTS = "{outputs}/o.jsonl"}}
"on-policy KD" = {gin_file = "gkd.gin", STUDENT_DATA_FRACTION = 1.0}
"self-distillation" = {gin_file = "gkd.gin", TEACHER_CHECKPOINT_PATH = "{sft:labelled=all}"}
[stages.outputs]
command = "infer"
axes = ["labelled"]
seeds = false
gin_file = "infer.gin"
macros = {OUTPUT_PATH = "{dir}/o.jsonl", MIXTURE_OR_TASK_NAME = "task_{labelled}"}
[stages.sft]
axes = ["size", "labelled"]
gin_file = "sft.gin"
[stages.methods]
axes = ["method", "size=small", "labelled"]
gin_file = "stage.gin"
macros = {INITIAL_CHECKPOINT_PATH = "{sft}", TRAIN_STEPS = 9}
"""


def read(tmp_path, text):
  path = tmp_path / "sweep.toml"
  path.write_text(text)
  return sweeps.read(str(path))


@pytest.fixture
def methods(tmp_path):
  found = sweeps.cells(read(tmp_path, METHODS), ["BATCH_SIZE = 4"])
  return {cell.name: cell for cell in found}


def test_a_cell_is_bound_to_its_point_and_to_the_cells_that_it_needs(methods):
  cell = methods["methods/SeqKD_small_labelled-1k_seed5"]
  assert cell.gin_files == ("seqkd.gin", "stage.gin", "task.gin")
  assert cell.settings == {
    "MODEL_DIR": "'{output}/methods/SeqKD_small_labelled-1k_seed5'",
    "SEED": "5",
    "TRAIN_STEPS": "9",  # the stage's, not that of all
    "INITIAL_CHECKPOINT_PATH": "'{output}/sft/small_labelled-1k_seed5'",
    "STUDENT": "%SMALL",
    "MIXTURE_OR_TASK_NAME": "'task_1k'",
    "BATCH_SIZE": "4",
  }
  assert set(cell.needs) == {
    "sft/small_labelled-1k_seed5",
    "outputs/labelled-1k",
  }
  assert cell.environment("/o") == {"OUTPUTS": "/o/outputs/labelled-1k/o.jsonl"}
  assert "--gin.STUDENT=%SMALL" in cell.arguments("/o")
  own = methods["methods/self-distillation_small_labelled-1k_seed3"]
  assert own.settings["TEACHER_CHECKPOINT_PATH"] == (
    "'{output}/sft/small_all_seed3'"
  )
  assert set(own.needs) == {
    "sft/small_labelled-1k_seed3",
    "sft/small_all_seed3",
  }
  outputs = methods["outputs/all"]
  assert outputs.arguments("/o") == [
    "infer",
    "--gin_file=infer.gin",
    "--gin.OUTPUT_PATH='/o/outputs/all/o.jsonl'",
    "--gin.MIXTURE_OR_TASK_NAME='task_all'",
  ]


def test_the_grid_is_whole_and_a_seed_is_done_before_the_next(methods):
  names = list(methods)
  # 2 outputs, then for each of 2 seeds 4 SFT cells and 3 x 2 of methods.
  assert len(names) == 2 + 2 * (4 + 6)
  assert [methods[n].seed for n in names] == [None] * 2 + [3] * 10 + [5] * 10
  for i, name in enumerate(names):
    assert all(names.index(need) < i for need in methods[name].needs)


def test_flags_give_the_same_cells_as_a_file(tmp_path):
  flags = sweeps.from_flags(
    ["exp.gin"],
    [
      "STUDENT_DATA_FRACTION=0,0.5",
      "TASK_FEATURE_LENGTHS={'a': 1, 'b': 2}",
      "gin_file=methods/sft.gin,methods/gkd.gin",
      "DIVERGENCE='jsd',forward_kl",
    ],
    2,
  )
  text = """
    seeds = 2
    gin_file = "exp.gin"
    [axes]
    STUDENT_DATA_FRACTION = [0, 0.5]
    TASK_FEATURE_LENGTHS = ["{'a': 1, 'b': 2}"]
    gin_file = ["methods/sft.gin", "methods/gkd.gin"]
    DIVERGENCE = ["jsd", "'forward_kl'"]
    [stages.train]
  """
  cells = sweeps.cells(flags)
  assert len(cells) == 16
  assert cells[1].settings["TASK_FEATURE_LENGTHS"] == "{'a': 1, 'b': 2}"
  assert cells[1].settings["DIVERGENCE"] == "'forward_kl'"
  assert cells[1].gin_files == ("methods/sft.gin", "exp.gin")
  assert [c.arguments("/o") for c in cells] == (
    [c.arguments("/o") for c in sweeps.cells(read(tmp_path, text))]
  )


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ('"{sft}"', '"{stf}"', r"\{stf\} of methods/SeqKD.*earlier stage \(out"),
    ('"{sft}"', '"{methods}"', "earlier stage"),
    ('"{sft:labelled=all}"', '"{sft:labelled=2k}"', "to name one cell"),
    ("size=small", "size=smal", "such as small, got 'smal'"),
    ('["method"', '["metod"', "an axis of stage methods, such as method"),
    ("seeds = false", "seed = false", "such as seeds, got 'seed'"),
    ('"infer"', '"infre"', "command of train, eval, infer, got 'infre'"),
    ("seeds = [3, 5]", "seeds = 0", "a number of seeds"),
    ('"1k", "all"', '"a b", "a-b", "all"', "a folder for each cell"),
    ('"1k", "all"', '"all", "all"', "different values of the axis"),
    (
      '"task_{labelled}"\n[axes]',
      '"task"\n[axes]',
      "the same run sft/small_lab",
    ),
    ("[macros]", "[macros", "expected TOML"),
  ],
)
def test_errors_of_a_file_name_the_setting(tmp_path, old, new, message):
  assert old in METHODS
  with pytest.raises(ValueError, match=message):
    sweeps.cells(read(tmp_path, METHODS.replace(old, new, 1)))


def test_errors_of_flags():
  with pytest.raises(ValueError, match="set --axis"):
    sweeps.from_flags([], ["BETA"], 1)
  with pytest.raises(ValueError, match="set --sweep_file"):
    sweeps.read("nothing.toml")


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
  cells = sweeps.cells(read(tmp_path, text))
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
    "from gkd_jax import sweep_runner, sweeps\n"
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
  cells = sweeps.cells(read(tmp_path, text))
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
  sweeps.cells(read(tmp_path, text))
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
  assert run(sweeps.cells(read(tmp_path, grid)), output, stand_in, jobs=2)
  used = [
    json.loads((output / f"only/X-{i}_seed0/starts").read_text())
    for i in (1, 2, 3)
  ]
  assert used[:2] == groups and used[2] in groups
  assert sorted(os.sched_getaffinity(0)) == mine


def test_the_printed_commands_do_what_the_sweep_does(tmp_path, stand_in):
  text = GRID.replace("{FAIL = 1}", '{env = {X = "a b"}}').replace("60", "0")
  cells = sweeps.cells(read(tmp_path, text))
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
  assert run(sweeps.cells(read(tmp_path, grid)), output, stand_in)
  # Further points are welcome, and the folder may have moved.
  output = pathlib.Path(shutil.move(output, tmp_path / "moved"))
  more = grid.replace("[1, 2]", "[1, 2, 3]")
  assert run(sweeps.cells(read(tmp_path, more)), output, stand_in)
  assert set(starts(output).values()) == {1}
  changed = sweeps.cells(read(tmp_path, grid.replace('"a"', '"b"')))
  with pytest.raises(ValueError, match=r"settings that .*X-1_seed0 was begun"):
    run(changed, output, stand_in)
  with pytest.raises(ValueError, match="without quotes"):
    run(changed, tmp_path / "it's", stand_in)


SMOKE = """
[macros]
"train.train.final_eval_split" = "test"
[axes]
BATCH_SIZE = [8]
[stages.first]
gin_file = "experiments/smoke_teacher.gin"
"""


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("", "", None),
    ("BATCH_SIZE", "BATHC_SIZE", "first/BATHC.*macro that something reads"),
    ("smoke_teacher", "smoke_taecher", "first/BATCH.*expected a gin file"),
    ("first]", "first]\nmacros = {X = '@nothing()'}", "first/B.*nothing"),
    ("final_eval_split", "eval_period", "set train.train.final_eval_split"),
  ],
)
def test_wrong_gin_is_found_before_any_cell_is_run(tmp_path, old, new, message):
  cells = sweeps.cells(read(tmp_path, SMOKE.replace(old, new)))
  if message is None:
    sweep_check.check_here(cells, "/o", [])
  else:
    with pytest.raises(ValueError, match=message):
      sweep_check.check_here(cells, "/o", [])
  gin.clear_config()


@pytest.mark.parametrize(
  "file",
  sorted(p.relative_to(ROOT / "gin") for p in ROOT.rglob("gin/**/*.toml")),
)
def test_the_gin_of_shipped_grids_is_right(file):
  definition = sweeps.read(str(file), [gin_utils.shipped_gin()])
  cells = sweeps.cells(definition)
  sweep_check.check_here(cells, "/o", [])
  # Each once more, as its command says it and with one seed: what a run builds
  # first of all is built, and numbers are numbers.
  last_seed = {(c.stage, *c.axes.values()): c for c in cells}
  for cell in last_seed.values():
    if cell.command == "train":
      built = _built_by(cell.arguments("/o"))
      assert built["model"].config.vocab_size > 0, cell.name
      for name in _NUMBERS:
        try:
          value = gin.query_parameter(f"%{name}")
        except ValueError:  # bound by other methods alone
          continue
        assert isinstance(value, int | float | None), (cell.name, name, value)
  gin.clear_config()


_NUMBERS = (
  *("ALPHA", "BETA", "STUDENT_DATA_FRACTION", "TRAIN_STEPS", "BATCH_SIZE"),
  *("SAMPLING_TEMPERATURE", "TEACHER_TEMPERATURE", "SEED"),
)


def _built_by(arguments):
  """What a command of `gkd train` trains, without parameters or data."""
  flags = [a.partition("=") for a in main._gin_flags(arguments[1:])]
  assert {name for name, _, _ in flags} <= {"--gin_file", "--gin_bindings"}
  given = lambda flag: [value for name, _, value in flags if name == flag]
  gin_utils.parse(given("--gin_file"), given("--gin_bindings"), [])
  return gin_utils.bindings(train.train, precompile.SETTINGS)


@pytest.mark.slow
def test_a_sweep_and_its_report_from_the_command_line(tmp_path):
  def gkd(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "gkd_jax.main", *arguments],
      env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      cwd=tmp_path,
      check=False,
    )

  command = (
    "sweep",
    "--gin_file=experiments/smoke_teacher.gin",
    "--axis=BATCH_SIZE=8",
    "--output_dir=grid",
    "--gin.TRAIN_STEPS=2",
    "--gin.EVAL_NUM_EXAMPLES=8",
    "--gin.train.train.final_eval_split='validation'",
  )
  done = gkd(*command)
  assert done.returncode == 0, done.stdout + done.stderr
  cell = tmp_path / "grid" / "train" / "BATCH-SIZE-8_seed0"
  assert (cell / "checkpoint_2").is_dir()
  with open(tmp_path / "grid" / "cells.csv") as f:
    (row,) = csv.DictReader(f)
  assert row["BATCH_SIZE"] == "8" and row["steps"] == "2"
  written = (cell / "final.json").stat().st_mtime_ns
  again = gkd(*command)
  assert "1 of 1 cells are finished already" in again.stdout
  assert (cell / "final.json").stat().st_mtime_ns == written
  report = gkd("report", "--output_path=page", "grid")
  assert report.returncode == 0, report.stderr
  assert "greedy answer_accuracy" in report.stdout
  assert (tmp_path / "page" / "index.html").exists()
