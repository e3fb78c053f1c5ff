"""Two processes and one: the same losses, stops, a loss of one, and going on."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

import gin
from gkd_jax import gin_utils, train

ROOT = pathlib.Path(__file__).parent.parent
ENV = {
  **os.environ,
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_backend_optimization_level=0",
  "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(prefix="gkd_jax_cache"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "PYTHONPATH": str(ROOT),
  "TF_CPP_MIN_LOG_LEVEL": "3",
}


TWO_DEVICES = "--xla_force_host_platform_device_count=2"
MAX_STEPS = 400


def settings(folder, teacher, **macros):
  values = {
    "MODEL_DIR": str(folder),
    "TEACHER_CHECKPOINT_PATH": str(teacher),
    "LOG_PERIOD": 1,
    "EVAL_NUM_EXAMPLES": 2,
    "EVAL_PERIOD": MAX_STEPS,
    "CHECKPOINT_PERIOD": 3,
    "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 12},
    "TRAIN_STEPS": MAX_STEPS,
  } | macros
  return [f"{name}={value!r}" for name, value in values.items()]


def pair(folder, teacher):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "gkd_jax.main", "train"),
        "--gin_file=experiments/smoke.gin",
        *(f"--gin.{setting}" for setting in settings(folder, teacher)),
        f"--coordinator_address=localhost:{port}",
        "--process_count=2",
        f"--process_index={index}",
        "--lost_after_s=8",
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=ENV,
    )
    for index in range(2)
  ]


def until(process, step):
  """Waits for the line of a step; returns what was printed until then."""
  printed = []
  for line in process.stdout:
    printed.append(line)
    if line.startswith(f"step {step}/"):
      return "".join(printed)
  raise AssertionError(process.stderr.read()[-3000:])


def alone(folder, teacher, **macros):
  """Trains in one process, on two devices."""
  done = subprocess.run(
    [
      *(sys.executable, "-m", "gkd_jax.main", "train"),
      "--gin_file=experiments/smoke.gin",
      *(f"--gin.{s}" for s in settings(folder, teacher, **macros)),
    ],
    env=ENV | {"XLA_FLAGS": f"{ENV['XLA_FLAGS']} {TWO_DEVICES}"},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]


def losses(folder, begin=0):
  """Step to loss, from line `begin` of the metrics on; the later one counts."""
  lines = (folder / "metrics.jsonl").read_text().splitlines()[begin:]
  rows = [json.loads(line) for line in lines]
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def saved(folder):
  return max(
    int(p.name.split("_")[1]) for p in folder.glob("checkpoint_*[0-9]")
  )


def coins(steps, fraction=0.5, seed=0):
  """The coin, worked out without the package."""
  return [
    np.random.default_rng([seed, step]).random() < fraction
    for step in range(steps)
  ]


@pytest.mark.slow
def test_two_processes_stop_lose_one_and_one_goes_on(tmp_path):
  teacher, folder = tmp_path / "teacher", tmp_path / "student"
  smoke_teacher = "experiments/smoke_teacher.gin"
  gin_utils.parse(
    [smoke_teacher], [f"MODEL_DIR={str(teacher)!r}", "TRAIN_STEPS=1"], []
  )
  gin.get_configurable(train.train)()

  # Whichever process is told to stop, both save the same step.
  first = pair(folder, teacher)
  until(first[0], 2)
  first[1].send_signal(signal.SIGTERM)
  printed = [process.communicate(timeout=600) for process in first]
  assert [p.returncode for p in first] == [143, 143], printed
  stopped = saved(folder)
  assert stopped == max(losses(folder)) < MAX_STEPS
  names = {p.name for p in (folder / f"checkpoint_{stopped}/dataset").iterdir()}
  assert names >= {"shard_0-of-2", "shard_1-of-2"}
  # One process writes: the other prints no line of progress.
  assert "loss" in printed[0][0] and "loss" not in printed[1][0]

  # One is lost: the other says so, and ends.
  second = pair(folder, teacher)
  assert f"at step {stopped}\n" in until(second[0], stopped + 5)
  second[1].kill()
  begin = time.monotonic()
  _, errors = second[0].communicate(timeout=60)
  assert (
    time.monotonic() - begin < 60 and second[0].returncode == -signal.SIGABRT
  )
  second[1].communicate()
  assert "unhealthy" in errors and "process 0 from outside" in errors
  last_words = errors.strip().splitlines()[-1]
  assert last_words.startswith("gkd: expected all processes to go on")

  # One process, two devices, goes on: the same numbers to the bit.
  before, kept = losses(folder), saved(folder)
  lines = len((folder / "metrics.jsonl").read_text().splitlines())
  end = max(before) + 2
  alone(folder, teacher, TRAIN_STEPS=end)
  again = losses(folder, lines)
  assert sorted(again) == [*range(kept + 1, end + 1)]
  both = sorted({*again} & {*before})
  assert len(both) >= 2 and [again[s] for s in both] == [
    before[s] for s in both
  ]

  # And the same as one process that never stopped, on-policy steps included.
  alone(tmp_path / "whole", teacher, TRAIN_STEPS=end, DATA_SHARDS=2)
  whole = losses(tmp_path / "whole")
  assert set(coins(end)) == {True, False}
  np.testing.assert_allclose(
    [(before | again)[s] for s in range(1, end + 1)],
    [whole[s] for s in range(1, end + 1)],
    rtol=1e-5,
  )
