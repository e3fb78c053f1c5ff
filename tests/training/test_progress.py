"""The progress bar, as terminals of three widths show it."""

import io
import re

import jax
import numpy as np
import pytest
import rich.console

from gkd_jax import training
from gkd_jax.training import progress

TOKENS = np.ones((2, 3), np.int32)
BATCH = {"encoder_input_tokens": TOKENS, "decoder_target_tokens": TOKENS}
METRICS = {
  "loss": (np.float32(3), np.float32(2)),
  "accuracy": (np.float32(0), np.float32(10)),
}


@pytest.fixture
def now(monkeypatch):
  """The time; a test moves it."""
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def shown(width, text):
  """The lines of a terminal, the newest last, without escapes."""
  plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
  lines = [line.rstrip() for line in plain.split("\n") if line.strip()]
  assert all(len(line) <= width for line in lines), lines
  return lines


def run(folder, width, now, total=20_000):
  """The last line of a bar after two steps and a log line, four steps later."""
  screen = io.StringIO()
  console = rich.console.Console(
    file=screen, force_terminal=True, width=width, color_system=None
  )
  with training.TrainLog(str(folder), 19_000, total, console) as log:
    now[0] += 60  # the first step compiles
    for _ in range(6):
      log.add(METRICS, "student", BATCH)
      now[0] += 2
    log.write(19_006)
    log._bar.refresh()
  return shown(width, screen.getvalue())[-1]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_count_times_and_loss_are_there_at_each_width(tmp_path, now, width):
  line = run(tmp_path, width, now)
  # 72 seconds so far. After the first step five took 12 seconds, 994 are left.
  assert line.startswith("19006/20000 ")
  assert "1:12, 39:45 left  loss 1.5000" in line
  assert ("examples/s" in line) == (width >= 80)
  assert ("on-policy 100%" in line) == (width == 120)
  assert "…" not in line and "compiling" not in line


def test_one_slow_step_moves_the_time_left_by_its_share(now):
  pace = progress.Pace(0, 100)
  now[0] += 500  # of the first step
  pace.advance()
  assert pace.left() is None
  for _ in range(10):
    now[0] += 1
    pace.advance()
  assert pace.left() == 89 and pace.elapsed() == 510
  now[0] += 23
  assert pace.left() == 89  # nothing is known of a step that runs
  pace.advance()
  assert pace.left() == pytest.approx(88 * 33 / 11)
  now[0] += 11  # the devices were behind
  pace.waited()
  assert pace.left() == pytest.approx(88 * 44 / 11)
  assert pace.elapsed() == 544


def test_compiling_is_said_while_xla_compiles():
  seen = []

  def look(event, value, **_):
    if event == progress._COMPILING:
      seen.append(progress.is_compiling())

  assert not progress.is_compiling()
  jax.monitoring.register_scalar_listener(look)
  try:
    jax.jit(lambda x: x * 2 + 1).lower(1.0).compile()
  finally:
    jax.monitoring.unregister_scalar_listener(look)
  assert seen and all(seen)
  assert not progress.is_compiling()


@pytest.mark.parametrize("width", [60, 80])
def test_the_bar_says_compiling_in_place_of_the_status(tmp_path, now, width):
  screen = io.StringIO()
  console = rich.console.Console(
    file=screen, force_terminal=True, width=width, color_system=None
  )
  with training.TrainLog(str(tmp_path), 0, 9, console) as log:
    for _ in range(3):
      log.add(METRICS, "student", BATCH)
      now[0] += 2
    jax.monitoring.record_scalar(progress._COMPILING, 0.0)
    log._bar.refresh()
    line = shown(width, screen.getvalue())[-1]
    jax.monitoring.record_event_duration_secs(progress._COMPILING, 0.0)
    log._bar.refresh()
  # How long it compiles is not known, so the time that is left is not either.
  assert line.startswith("3/9 ") and line.endswith("0:06, -:-- left  compiling")
  # Two steps after the first took 4 seconds, and 6 are left.
  assert shown(width, screen.getvalue())[-1].endswith("0:06, 0:12 left")
