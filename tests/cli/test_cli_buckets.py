"""Every command of `gkd` with its files in a bucket, or under `~`.

Orbax hands arrays to tensorstore, which knows `gs://` but no bucket in memory:
checkpoints of runs are therefore on the disk here, all other files are not.
"""

import functools
import json
import os

import command_line
import pytest
import remote_files
import tensorflow as tf
from command_line import gin

import gkd_jax
from gkd_jax import checkpoints, files
from gkd_jax.tasks import teacher_outputs, teacher_shards

LENGTHS = {"inputs": 16, "targets": 24}
FINAL = "--gin.FINAL_EVAL_SPLIT='test'"


@pytest.fixture(name="empty", autouse=True)
def _empty(tmp_path, monkeypatch):
  """A working directory and a home in which nothing may appear."""
  folder = tmp_path / "working_directory"
  folder.mkdir()
  monkeypatch.chdir(folder)
  monkeypatch.setenv("HOME", str(folder))
  yield folder
  assert not os.listdir(folder)


@pytest.fixture(name="teacher", scope="module")
def _teacher(tmp_path_factory):
  return command_line.save_toy_teacher(tmp_path_factory.mktemp("teacher"))


def names(folder):
  return sorted(p.name for p in files.absolute(folder).iterdir())


def train(teacher, folder, *flags, **macros):
  settings = {
    "MODEL_DIR": folder,
    "TEACHER_CHECKPOINT_PATH": teacher,
    "MIXTURE_OR_TASK_NAME": "arithmetic_cot_1k",
    "TASK_FEATURE_LENGTHS": LENGTHS,
    "EVAL_NUM_EXAMPLES": 4,
    "LOG_PERIOD": 1,
    "EVAL_PERIOD": 2,
    "STUDENT_DATA_FRACTION": 0.0,  # one step to compile, not two
  }
  command_line.here(
    "train",
    "--gin_file=experiments/smoke.gin",
    *flags,
    *gin(**settings | macros),
  )


def decode(mode, checkpoint, *flags, **macros):
  settings = {
    "CHECKPOINT_PATH": checkpoint,
    "MIXTURE_OR_TASK_NAME": "arithmetic_cot",
    "TASK_FEATURE_LENGTHS": LENGTHS,
    "EVAL_NUM_EXAMPLES": 4,
    "BATCH_SIZE": 4,
  }
  command_line.here(
    mode,
    "--gin_file=models/toy.gin",
    f"--gin_file=runs/{mode}.gin",
    "--gin.STUDENT=%TOY_TEACHER",
    *flags,
    *gin(**settings | macros),
  )


def on_disk(monkeypatch, place):
  """Puts the checkpoints of a run on the disk, for Orbax."""
  orbax = checkpoints.Checkpointer
  newest = checkpoints.newest_step
  monkeypatch.setattr(checkpoints, "newest_step", lambda _: newest(place))
  monkeypatch.setattr(
    checkpoints, "Checkpointer", lambda _, **options: orbax(place, **options)
  )


def test_a_run_and_its_report(teacher, tmp_path, monkeypatch, capsys):
  on_disk(monkeypatch, tmp_path / "checkpoints")
  folder = remote_files.new()
  train(teacher, folder, FINAL, TRAIN_STEPS=2)
  assert f"next: gkd report {folder} --output_path" in capsys.readouterr().out
  rows = files.read_json_lines(f"{folder}/metrics.jsonl")
  losses = [row["step"] for row in rows if "loss" in row]
  scores = [
    row["step"] for row in rows if any(x.startswith("eval/") for x in row)
  ]
  assert losses == [1, 2] and scores == [2]
  examples = files.read_json_lines(f"{folder}/examples.jsonl")
  assert [row["step"] for row in examples] == 4 * [2]
  final = files.read_json(f"{folder}/final.json")
  assert final["split"] == "test" and "greedy" in final
  assert 0 < final["start_seconds"] < final["seconds"]
  # After two steps no output is right: values that are all the same, no interval.
  names_of_both = [
    f"{how}/{name}" for how in ("greedy", "sampled") for name in final[how]
  ]
  assert final["intervals"] == dict.fromkeys(names_of_both)
  config = (files.absolute(folder) / "config.gin").read_text()
  assert "STUDENT_DATA_FRACTION = 0.0" in config
  command, version, *_ = config.splitlines()
  assert command.startswith("# gkd train ") and folder in command
  assert version.startswith(f"# gkd {gkd_jax.__version__} (Python 3.")
  events = [n for n in names(folder) if n.startswith("events.out.tfevents")]
  assert len(events) == 1
  tags = {
    value.tag
    for name in events
    for record in tf.data.TFRecordDataset(f"{folder}/{name}")
    for value in tf.compat.v1.Event.FromString(record.numpy()).summary.value
  }
  assert {"loss", "examples"} <= tags
  # The same run, read for a report and written into the bucket.
  output = remote_files.new()
  command_line.here(
    "report",
    f"run={folder}",
    f"--output_path={output}",
    f"--markdown={output}/report.md",
  )
  assert {"index.html", "results.json", "table.txt", "report.md"} <= set(
    names(output)
  )
  assert files.read_json(f"{output}/results.json")["run"]


# tests/test_files.py appends to files of a bucket.
@pytest.mark.nightly
def test_a_run_goes_on(teacher, tmp_path, monkeypatch, capsys):
  on_disk(monkeypatch, tmp_path / "checkpoints")
  folder = remote_files.new()
  train(teacher, folder, TRAIN_STEPS=2)
  before = files.read_json_lines(f"{folder}/metrics.jsonl")
  train(teacher, folder, TRAIN_STEPS=3)
  assert f"resumed {folder} at step 2" in capsys.readouterr().out
  after = files.read_json_lines(f"{folder}/metrics.jsonl")
  assert after[: len(before)] == before
  losses = [row["step"] for row in after if "loss" in row]
  assert losses == [1, 2, 3]


def test_import_infer_eval_compare_and_export(teacher, capsys):
  folder = remote_files.new()
  student = f"{folder}/student"
  command_line.here(
    "import", f"--checkpoint_path={teacher}", f"--output_path={student}"
  )
  assert names(student) == ["config.json", "model.safetensors"]
  decode("infer", student, OUTPUT_PATH=f"{folder}/out/outputs.jsonl")
  rows = files.read_json_lines(f"{folder}/out/outputs.jsonl")
  assert len(rows) == 4 and names(f"{folder}/out") == ["outputs.jsonl"]
  # What `infer` wrote is what a task of a teacher's outputs reads.
  columns = teacher_outputs._load_columns(
    "train", path=f"{folder}/out/outputs.jsonl", drop_cut=False
  )
  assert columns["inputs"] == [row["inputs"] for row in rows]
  decode(
    "infer",
    student,
    "--gin_file=runs/teacher_data.gin",
    OUTPUT_PATH=f"{folder}/shards/out",
    NUM_SHARDS=2,
  )
  _, shards = teacher_shards.check_shards(f"{folder}/shards/out")
  assert sum(1 for _ in tf.data.TFRecordDataset(shards)) == 4
  assert len(names(f"{folder}/shards")) == 3
  for name, temperature in (("a", 0.0), ("b", 1.0)):
    decode(
      "eval",
      student,
      EVAL_OUTPUT_DIR=f"{folder}/{name}",
      SAMPLING_TEMPERATURE=temperature,
    )
    assert names(f"{folder}/{name}") == [
      "evaluation.json",
      "metrics.json",
      "predictions.jsonl",
    ]
  capsys.readouterr()
  command_line.here("compare", f"{folder}/a", f"{folder}/b")
  assert "accuracy" in capsys.readouterr().out
  command_line.here(
    "export",
    f"--checkpoint_path={student}",
    f"--output_path={folder}/hf",
    "--format=hf",
  )
  assert names(f"{folder}/hf") == [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
  ]


# tests/planning/test_precompile.py keeps programs on the disk.
@pytest.mark.nightly
def test_programs_for_other_devices():
  folder = remote_files.new()
  command = functools.partial(
    command_line.here,
    "precompile",
    "--gin_file=experiments/smoke.gin",
    "--phases=data",
    f"--output_path={folder}",
    *gin(MODEL_DIR="", TEACHER_CHECKPOINT_PATH=""),
  )
  command()
  assert names(folder) == ["data.program.gz", "precompile.json"]
  first = files.read_json(f"{folder}/precompile.json")
  command()  # from the program that is kept
  assert (
    files.read_json(f"{folder}/precompile.json")["phases"] == (first["phases"])
  )


def test_a_sweep_in_a_bucket_is_refused(capsys):
  said = command_line.refused(
    capsys,
    "sweep",
    "--gin_file=experiments/smoke.gin",
    "--axis=BETA=0.1,0.5",
    "--output_dir=gs://bucket/sweep",
  )
  assert "a local folder" in said and "set --output_dir" in said


def test_a_configuration_in_a_bucket_is_read(teacher):
  folder = remote_files.new()
  files.write_text(
    f"{folder}/config.gin",
    "include 'runs/infer.gin'\nMIXTURE_OR_TASK_NAME = 'arithmetic_cot'\n",
  )
  command_line.here(
    "infer",
    "--gin_file=models/toy.gin",
    f"--gin_file={folder}/config.gin",
    "--gin.STUDENT=%TOY_TEACHER",
    *gin(
      CHECKPOINT_PATH=teacher,
      TASK_FEATURE_LENGTHS=LENGTHS,
      EVAL_NUM_EXAMPLES=2,
      OUTPUT_PATH=f"{folder}/out.jsonl",
    ),
  )
  assert len(files.read_json_lines(f"{folder}/out.jsonl")) == 2


@pytest.mark.nightly
def test_the_home_folder_is_filled_in_once(teacher, tmp_path, monkeypatch):
  home = tmp_path / "home"
  home.mkdir()
  monkeypatch.setenv("HOME", str(home))
  train(teacher, "~/run", FINAL, TRAIN_STEPS=1)
  assert {"config.gin", "metrics.jsonl", "final.json", "checkpoint_1"} <= set(
    names("~/run")
  )
  decode(
    "eval", "~/run", "--gin.STUDENT=%TOY_STUDENT", EVAL_OUTPUT_DIR="~/eval"
  )
  decode(
    "infer", "~/run", "--gin.STUDENT=%TOY_STUDENT", OUTPUT_PATH="~/out.jsonl"
  )
  decode(
    "infer",
    "~/run",
    "--gin_file=runs/teacher_data.gin",
    "--gin.STUDENT=%TOY_STUDENT",
    OUTPUT_PATH="~/shards/out",
    NUM_SHARDS=1,
  )
  command_line.here("export", "--checkpoint_path=~/run", "--output_path=~/st")
  command_line.here("report", "run=~/run", "--output_path=~/report")
  assert sorted(os.listdir(home)) == [
    "eval",
    "out.jsonl",
    "report",
    "run",
    "shards",
    "st",
  ]
  rows = (home / "run" / "metrics.jsonl").read_text().splitlines()
  assert json.loads(rows[0])["step"] == 1
