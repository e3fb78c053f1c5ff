"""The lock of MODEL_DIR: who holds it, and when it is taken over."""

import json
import os
import platform
import time

import pytest
import remote_files

from gkd_jax import files, training
from gkd_jax.training import model_dir


def hold(folder, **changes):
  """Writes the lock of another run; returns its file."""
  held = {
    "host": platform.node(),
    "pid": os.getpid(),
    "start": "2026-01-02 03:04:05",
    "process_start": model_dir._process_start(os.getpid()),
    "beats": 0,
  }
  path = files.absolute(folder) / "run.lock"
  files.write_json(path, held | changes)
  return path


def holder(folder):
  return json.loads((files.absolute(folder) / "run.lock").read_text())


@pytest.mark.parametrize("remote", [False, True])
def test_a_lock_is_held_while_the_run_lasts(tmp_path, remote):
  folder = remote_files.new() if remote else tmp_path / "new" / "run"
  with training.RunLock(folder):
    assert holder(folder)["pid"] == os.getpid()
    with pytest.raises(ValueError) as error, training.RunLock(folder):
      pass
    assert holder(folder)["host"] == platform.node()
  text = str(error.value)
  assert text.startswith("expected ") and "set another MODEL_DIR" in text
  assert f"process {os.getpid()} on {platform.node()} has used since" in text
  assert [p.name for p in files.absolute(folder).iterdir()] == []


@pytest.mark.parametrize(
  "changes",
  [{"pid": 2**22 + 1}, {"process_start": "1"}],
  ids=["no such process", "another process with its number"],
)
def test_the_lock_of_a_process_that_has_ended_is_taken_over(tmp_path, changes):
  hold(tmp_path, **changes)
  with training.RunLock(tmp_path):
    assert holder(tmp_path)["pid"] == os.getpid()


def test_the_lock_of_another_host_is_watched(tmp_path, capsys):
  slept = []

  def renewed(seconds):
    slept.append(seconds)
    if len(slept) == 3:
      hold(tmp_path, host="elsewhere", beats=1)

  hold(tmp_path, host="elsewhere")
  with (
    pytest.raises(ValueError, match=r"on elsewhere has used since 2026-01-02"),
    training.RunLock(tmp_path, beat_s=7.0, sleep=renewed),
  ):
    pass
  assert slept == [7.0] * 3
  assert "waiting 21 s for a sign of life" in capsys.readouterr().out
  # A run that was lost renews nothing.
  with training.RunLock(tmp_path, sleep=slept.append):
    assert holder(tmp_path)["host"] == platform.node()
  assert len(slept) == 6


def test_a_lock_that_was_taken_over_is_left_alone(tmp_path):
  with training.RunLock(tmp_path):
    path = hold(tmp_path, host="elsewhere")
  assert holder(tmp_path)["host"] == "elsewhere" and path.exists()


def test_a_lock_is_renewed(tmp_path):
  with training.RunLock(tmp_path, beat_s=0.001):
    until = time.monotonic() + 30
    while not (beats := holder(tmp_path)["beats"]) and time.monotonic() < until:
      time.sleep(0.001)
  assert beats


def test_changed_settings_are_listed(tmp_path):
  old = "# comment\nA = 1\nB = \\\n    {'x': 1}\nlayer/c.d = @e()\n"
  new = old.replace("A = 1", "A = 2").replace("'x': 1", "'x': 1, 'y': 2")
  new += "F = None\n"
  assert model_dir.changed_settings(tmp_path, old) == []
  training.update_settings(tmp_path, old)
  assert model_dir.changed_settings(tmp_path, old) == []
  assert model_dir.changed_settings(tmp_path, new) == [
    "A = 2 (was 1)",
    "B = {'x': 1, 'y': 2} (was {'x': 1})",
    "F = None (was no value)",
  ]
