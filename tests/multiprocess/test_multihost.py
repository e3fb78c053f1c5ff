"""Several processes and one: the same losses; stops, a loss of one, going on."""

import json
import signal
import socket

import command_line
import numpy as np
import pytest

STEPS = 10
PERIOD = 8  # of checkpoints
TWO_DEVICES = "--xla_force_host_platform_device_count=2"
MAX_STEPS = 400  # none of the processes comes to its end by itself


def settings(folder, **macros):
  return {
    "MODEL_DIR": str(folder / "student"),
    "INITIAL_CHECKPOINT_PATH": str(folder / "first"),
    "TEACHER_CHECKPOINT_PATH": str(folder / "teacher"),
    "MIXTURE_OR_TASK_NAME": "arithmetic_cot_1k",
    "LOG_PERIOD": 1,
    "EVAL_SPLIT": None,
    "CHECKPOINT_PERIOD": PERIOD,
    "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 12},
    "TRAIN_STEPS": MAX_STEPS,
    # As four processes read them: the order of the data is the same in all runs.
    "DATA_SHARDS": 4,
  } | macros


def start(count, folder, **macros):
  """Starts processes that train together."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    command_line.start(
      "train",
      "--gin_file=experiments/smoke.gin",
      f"--coordinator_address=localhost:{port}",
      f"--process_count={count}",
      f"--process_index={index}",
      "--lost_after_s=8",
      **settings(folder, **macros),
    )
    for index in range(count)
  ]


def until(process, step):
  """Waits for the line of a step; returns what was printed until then."""
  printed = []
  for line in process.stdout:
    printed.append(line)
    if line.startswith(f"step {step}/"):
      return "".join(printed)
  raise AssertionError(process.communicate()[1][-3000:])


def alone(folder, **macros):
  """Trains in one process, on two devices."""
  done = command_line.gkd(
    "train",
    "--gin_file=experiments/smoke.gin",
    env={"XLA_FLAGS": f"{command_line.ENV['XLA_FLAGS']} {TWO_DEVICES}"},
    **settings(folder, **macros),
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
    np.random.default_rng([seed, step]).random() < fraction for step in steps
  ]


def stopped_together(count, tmp_path, **macros):
  """Trains in some processes, one of which is told to stop; returns the step."""
  command_line.save_toy_teacher(tmp_path / "teacher")
  command_line.save_toy(tmp_path / "first", 16, 2, 32, seed=1)
  folder = tmp_path / "student"
  processes = start(count, tmp_path, **macros)
  until(processes[0], STEPS)
  processes[1].send_signal(signal.SIGTERM)
  printed = [process.communicate() for process in processes]
  assert [p.returncode for p in processes] == [143] * count, printed
  # Whichever is told to stop, all save the same step.
  stopped = saved(folder)
  assert STEPS <= stopped == max(losses(folder)) < MAX_STEPS
  names = {p.name for p in (folder / f"checkpoint_{stopped}/dataset").iterdir()}
  assert names >= {f"shard_{i}-of-4" for i in range(4)}
  # One process writes: the others print no line of progress.
  assert "loss" in printed[0][0]
  assert not any("loss" in out for out, _ in printed[1:])
  return stopped


def assert_as_one(got, whole, steps, processes):
  """Compares losses with one process's."""
  assert len(steps) >= STEPS or processes == 1
  ours, its = (np.array([x[s] for s in steps]) for x in (got, whole))
  difference = np.abs(ours / its - 1).max()
  print(f"{processes} processes, {len(steps)} steps: {difference:.1e}")
  assert difference <= 1e-5


def test_two_processes_stop_together_and_train_as_one(tmp_path):
  on_policy = {"STUDENT_DATA_FRACTION": 1.0}
  stopped = stopped_together(2, tmp_path, **on_policy)
  whole = tmp_path / "whole"
  alone(tmp_path, TRAIN_STEPS=stopped, MODEL_DIR=str(whole), **on_policy)
  got = losses(tmp_path / "student")
  assert_as_one(got, losses(whole), range(1, stopped + 1), 2)


@pytest.mark.nightly
@pytest.mark.parametrize("count", [2, 4])
def test_processes_stop_two_lose_one_and_one_goes_on(tmp_path, count):
  folder = tmp_path / "student"
  stopped = stopped_together(count, tmp_path)

  # Two go on; one is lost some steps after a checkpoint: the other says so, and ends.
  second = start(2, tmp_path)
  lost = stopped + STEPS + -(stopped + STEPS) % PERIOD + 5
  assert f"at step {stopped}\n" in until(second[0], lost)
  second[1].kill()
  _, errors = second[0].communicate()
  assert second[0].returncode == -signal.SIGABRT
  second[1].communicate()
  assert "another task died" in errors, errors

  # One process, two devices, goes on: the same numbers to the bit.
  before, kept = losses(folder), saved(folder)
  lines = len((folder / "metrics.jsonl").read_text().splitlines())
  end = max(before) + 2
  alone(tmp_path, TRAIN_STEPS=end)
  again = losses(folder, lines)
  assert sorted(again) == [*range(kept + 1, end + 1)]
  both = sorted({*again} & {*before})
  assert len(both) >= 2 and [again[s] for s in both] == [
    before[s] for s in both
  ]

  # And the same as one process that never stopped, on-policy steps included.
  whole = tmp_path / "whole"
  alone(tmp_path, TRAIN_STEPS=end, MODEL_DIR=str(whole))
  whole = losses(whole)
  for processes, steps in (
    (count, range(1, stopped + 1)),
    (2, range(stopped + 1, max(before) + 1)),
    (1, range(kept + 1, end + 1)),
  ):
    if processes > 1:
      assert set(coins(s - 1 for s in steps)) == {True, False}
    got = before if processes > 1 else again
    assert_as_one(got, whole, steps, processes)
