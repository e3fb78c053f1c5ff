"""Two processes: one program, the coin of λ, shards of data, one checkpoint."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile

import numpy as np
import pytest

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


def start(folder, teacher, index, port, **macros):
  settings = {
    "MODEL_DIR": str(folder),
    "TEACHER_CHECKPOINT_PATH": str(teacher),
    "LOG_PERIOD": 1,
    "EVAL_NUM_EXAMPLES": 2,
    "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 12},
  } | macros
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "gkd_jax.main", "train"),
      "--gin_file=experiments/smoke.gin",
      *(f"--gin.{name}={value!r}" for name, value in settings.items()),
      f"--coordinator_address=localhost:{port}",
      "--process_count=2",
      f"--process_index={index}",
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=ENV,
  )


def pair(folder, teacher, **macros):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [start(folder, teacher, i, port, **macros) for i in range(2)]


def finish(processes):
  results = [process.communicate(timeout=600) for process in processes]
  for process, (_, errors) in zip(processes, results, strict=True):
    assert process.returncode == 0, errors[-3000:]
  return [out for out, _ in results]


def rows(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  folder = tmp_path_factory.mktemp("two") / "teacher"
  subprocess.run(
    [
      *(sys.executable, "-m", "gkd_jax.main", "train"),
      "--gin_file=experiments/smoke_teacher.gin",
      f"--gin.MODEL_DIR={str(folder)!r}",
      "--gin.TRAIN_STEPS=1",
    ],
    check=True,
    env=ENV,
    capture_output=True,
    timeout=600,
  )
  return folder


def coins(steps, fraction=0.5, seed=0):
  """The coin, worked out without the package."""
  return [
    float(np.random.default_rng([seed, step]).random() < fraction)
    for step in range(steps)
  ]


@pytest.mark.slow
def test_two_processes_train_stop_and_go_on(teacher, tmp_path):
  folder = tmp_path / "student"
  first = pair(folder, teacher, TRAIN_STEPS=400)
  # Whichever process is told to stop, both save the same step.
  for line in first[0].stdout:
    if line.startswith("step 5/"):
      first[1].send_signal(signal.SIGTERM)
      break
  finish(first)
  saved = max(
    int(p.name.split("_")[1]) for p in folder.glob("checkpoint_*[0-9]")
  )
  last = max(r["step"] for r in rows(folder) if "loss" in r)
  assert saved == last < 400
  positions = folder / f"checkpoint_{saved}" / "dataset"
  assert {p.name for p in positions.glob("process_*")} == {
    "process_0-of-2",
    "process_1-of-2",
  }
  printed = finish(pair(folder, teacher, TRAIN_STEPS=saved + 4))
  assert f"at step {saved}" in printed[0]
  trained = [r for r in rows(folder) if "loss" in r]
  assert [r["step"] for r in trained] == [*range(1, saved + 5)]
  # Had the two hosts drawn other coins, their programs would have differed and
  # hung; that it is the right coin, after the resume too, is checked here.
  assert [r["on_policy_steps"] for r in trained] == coins(saved + 4)
  assert all(np.isfinite(r["loss"]) for r in trained)
  # One process writes: nothing twice.
  assert printed[1].count("step ") == printed[1].count("at step")
