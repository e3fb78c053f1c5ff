"""Grids: which cells there are, their settings, and one from end to end."""

import csv
import os
import pathlib
import subprocess
import sys

import pytest
import sweep_folders

import gin
from gkd_jax import command_line, train
from gkd_jax.command_line import gin_files, gin_settings
from gkd_jax.experiments import sweep_runner, sweeps
from gkd_jax.planning import precompile

ROOT = pathlib.Path(__file__).parents[2]

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


@pytest.fixture
def methods(tmp_path):
  found = sweeps.cells(
    sweep_folders.read(tmp_path, METHODS), ["BATCH_SIZE = 4"]
  )
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
    [
      c.arguments("/o")
      for c in sweeps.cells(sweep_folders.read(tmp_path, text))
    ]
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
    sweeps.cells(sweep_folders.read(tmp_path, METHODS.replace(old, new, 1)))


def test_variables_in_the_name_of_a_sweep_file(tmp_path, monkeypatch):
  monkeypatch.setenv("OF_USER", str(tmp_path))
  (tmp_path / "a.toml").write_text("seeds = 3\n")
  assert sweeps.read("$OF_USER/a.toml") == {"seeds": 3}
  assert sweeps.read("a.toml", ["${OF_USER}"]) == {"seeds": 3}


def test_errors_of_flags():
  with pytest.raises(ValueError, match="set --axis"):
    sweeps.from_flags([], ["BETA"], 1)
  with pytest.raises(ValueError, match="set --sweep_file"):
    sweeps.read("nothing.toml")


SMOKE = """
[macros]
FINAL_EVAL_SPLIT = "test"
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
    (
      "first]",
      "first]\nmacros = {OPTIMIZER = '@nothing()'}",
      "first/B.*nothing",
    ),
    ("FINAL_EVAL_SPLIT", "EVAL_NUM_EXAMPLES", "set FINAL_EVAL_SPLIT"),
  ],
)
def test_wrong_gin_is_found_before_any_cell_is_run(tmp_path, old, new, message):
  cells = sweeps.cells(sweep_folders.read(tmp_path, SMOKE.replace(old, new)))
  if message is None:
    sweep_runner.check_here(cells, "/o", [])
  else:
    with pytest.raises(ValueError, match=message):
      sweep_runner.check_here(cells, "/o", [])
  gin.clear_config()


@pytest.mark.parametrize(
  "file",
  sorted(p.relative_to(ROOT / "gin") for p in (ROOT / "gin").rglob("*.toml")),
)
def test_the_gin_of_shipped_grids_is_right(file):
  definition = sweeps.read(str(file), [gin_files.shipped()])
  cells = sweeps.cells(definition)
  sweep_runner.check_here(cells, "/o", [])
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
  given = command_line.parse(arguments[0], arguments[1:])
  gin_settings.parse(given.gin_file, given.gin_bindings, [])
  return gin_settings.bindings(train.train, precompile.SETTINGS)


@pytest.mark.nightly
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
    "--gin.FINAL_EVAL_SPLIT='validation'",
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
  page = (tmp_path / "page" / "index.html").read_text()
  assert "<dd>gkd sweep --gin_file=experiments/smoke_teacher.gin " in page
