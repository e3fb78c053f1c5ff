"""`gkd infer` into shards, killed and started again, and training on them."""

import json
import pathlib
import signal
import socket

import command_line
import numpy as np
import pytest
import seqio
import tensorflow as tf

from gkd_jax.tasks import teacher_shards

TASK = "arithmetic_cot_1k"
LENGTHS = {"inputs": 16, "targets": 24}
SHARDS = 60


@pytest.fixture(autouse=True)
def _no_task_stays():
  yield
  if (name := f"{TASK}_distilled") in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(name)


@pytest.fixture(name="teacher", scope="module")
def _teacher(tmp_path_factory):
  return command_line.save_toy_teacher(tmp_path_factory.mktemp("teacher"))


def infer(teacher, prefix, *flags, **macros):
  settings = {
    "CHECKPOINT_PATH": str(teacher),
    "MIXTURE_OR_TASK_NAME": TASK,
    "TASK_FEATURE_LENGTHS": LENGTHS,
    "EVAL_NUM_EXAMPLES": 240,
    "OUTPUT_PATH": str(prefix),
    "BATCH_SIZE": 4,
    "NUM_SHARDS": SHARDS,
    "NUM_SAMPLES": 2,
    "SAMPLING_TEMPERATURE": 1.0,
    "TOP_K": 3,
  }
  return [
    "infer",
    "--gin_file=models/toy.gin",
    "--gin_file=runs/teacher_data.gin",
    "--gin.STUDENT=%TOY_TEACHER",
    *flags,
    *command_line.gin(**settings | macros),
  ]


def shard_bytes(prefix):
  paths = teacher_shards.shard_paths(str(prefix), SHARDS)
  return [pathlib.Path(p).read_bytes() for p in paths]


@pytest.fixture(name="whole", scope="module")
def _whole(teacher, tmp_path_factory):
  """The shards of an uninterrupted run."""
  prefix = tmp_path_factory.mktemp("data") / "whole"
  done = command_line.gkd(*infer(teacher, prefix))
  assert done.returncode == 0, done.stderr
  assert "outputs for 240 examples" in done.stdout
  return prefix


# test_only_missing_shards_are_written_again, in tests/evaluation, kills nothing.
@pytest.mark.nightly
def test_kills_lose_and_double_nothing(teacher, whole, tmp_path):
  prefix = tmp_path / "out"
  rng = np.random.default_rng()
  finished = [0]
  for kill in range(5):
    # Another shard in every run of the test; pytest shows it if it fails.
    stop = int(rng.integers(1, 8))
    print(f"kill {kill} after {stop} more shards")
    process = command_line.start(*infer(teacher, prefix))
    for line in process.stdout:
      stop -= line.startswith("shard ")
      if not stop:
        process.kill()
        break
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    paths = teacher_shards.shard_paths(str(prefix), SHARDS)
    finished.append(sum(pathlib.Path(p).exists() for p in paths))
  print(f"finished shards: {finished}")
  assert finished == sorted(set(finished)) and finished[-1] < SHARDS
  # Unfinished data are no data.
  with pytest.raises(ValueError, match="run `gkd infer` again to finish"):
    teacher_shards.check_shards(str(prefix))
  done = command_line.gkd(*infer(teacher, prefix))
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("\nshard ") + done.stdout.startswith("shard ") == (
    SHARDS - finished[-1]
  )
  assert shard_bytes(prefix) == shard_bytes(whole)
  assert len(list(tmp_path.iterdir())) == SHARDS + 1
  manifest, paths = teacher_shards.check_shards(str(prefix))
  parse = teacher_shards.record_parser(manifest)
  keys = [
    (int(r["example_index"]), int(r["sample_number"]))
    for r in tf.data.TFRecordDataset(list(paths)).map(parse).as_numpy_iterator()
  ]
  assert keys == [(i, n) for i in range(240) for n in range(2)]


def test_other_settings_are_one_sentence(teacher, whole, capsys):
  said = command_line.refused(capsys, *infer(teacher, whole, SEED=1))
  assert "got SEED 1 instead of 0; set SEED" in said


@pytest.mark.parametrize(
  ("file", "loss"),
  [
    pytest.param("sft", "cross_entropy", marks=pytest.mark.nightly),
    ("stored_teacher", "forward_kl"),
  ],
)
def test_a_student_trains_on_the_shards(whole, tmp_path, capsys, file, loss):
  files = [f"--gin_file=runs/{file}.gin"]
  if file == "sft":
    files.append("--gin_file=runs/distilled_task.gin")
  command_line.here(
    "train",
    "--gin_file=models/toy.gin",
    *files,
    "--gin.STUDENT=%TOY_STUDENT",
    *command_line.gin(
      MODEL_DIR=str(tmp_path),
      TEACHER_DATA_PATH=str(whole),
      ORIGINAL_TASK=TASK,
      TASK_FEATURE_LENGTHS=LENGTHS,
      TRAIN_STEPS=2,
      EVAL_NUM_EXAMPLES=2,
      LOG_PERIOD=1,
    ),
  )
  # No teacher in memory.
  said = capsys.readouterr().out
  assert "student " in said and "\nteacher " not in said
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  losses = [r["loss"] for r in rows if "loss" in r]
  assert len(losses) == 2 and losses[1] != losses[0]
  for row in rows:
    if "loss" in row:
      assert row[loss] > 0 and row["skipped_updates"] == 0
  # The original's metrics, on its own validation split.
  assert any("eval/answer_accuracy" in r for r in rows)
  examples = (tmp_path / "examples.jsonl").read_text().splitlines()
  for example in map(json.loads, examples):
    # The reference is the task's: it ends in the right answer.
    value = eval(example["input"])
    assert example["reference"].endswith(f"#{value}")


@pytest.mark.nightly
def test_two_processes_share_the_shards(teacher, whole, tmp_path):
  prefix = tmp_path / "out"
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = [
    command_line.start(
      *infer(
        teacher,
        prefix,
        f"--coordinator_address=localhost:{port}",
        "--process_count=2",
        f"--process_index={index}",
      )
    )
    for index in range(2)
  ]
  results = [p.communicate() for p in processes]
  for index, (process, (out, errors)) in enumerate(
    zip(processes, results, strict=True)
  ):
    assert process.returncode == 0, errors[:6000]
    # Every other shard each.
    numbers = [
      int(line.split()[1])
      for line in out.splitlines()
      if line.startswith("shard ")
    ]
    assert numbers == [*range(index + 1, SHARDS + 1, 2)]
  assert shard_bytes(prefix) == shard_bytes(whole)
