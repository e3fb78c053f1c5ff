"""What a run writes and shows, against hand-worked numbers."""

import io
import json

import numpy as np
import pytest
import rich.console

from gkd_jax import training
from gkd_jax.training import logs

INPUTS = np.array([[5, 6, 1, 0], [7, 1, 0, 0]])
BATCH = {"encoder_input_tokens": INPUTS, "decoder_target_tokens": INPUTS}


@pytest.fixture
def clock(monkeypatch):
  """The time that `logs` reads; a test moves it."""
  now = [100.0]
  monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
  return now


def metrics(loss, weight, tokens):
  pair = lambda a, b: (np.float32(a), np.float32(b))
  return {"loss": pair(loss, weight), "top1_agreement": pair(0, tokens)}


def rows(folder):
  return [
    json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()
  ]


def test_means_and_rates(tmp_path, clock, capsys):
  with training.TrainLog(str(tmp_path), start=4, total=10) as log:
    log.add(metrics(6.0, 2.0, 10), "data", BATCH)
    log.add(metrics(1.0, 2.0, 20), "student", BATCH)
    clock[0] += 4.0

    log.write(6)
    log.add(metrics(8.0, 1.0, 5), "data", BATCH)
    clock[0] += 1.0
    log.write(7)
  first, second = rows(tmp_path)
  assert first == {
    "step": 6,
    "loss": 7 / 4,  # (6 + 1) / (2 + 2): one quotient of sums
    "top1_agreement": 0.0,
    "seconds_per_step": 2.0,
    "examples_per_second": 1.0,  # 4 rows in 4 seconds
    "tokens_per_second": (2 * 5 + 30) / 4,
    "on_policy_steps": 0.5,
  }
  assert second["loss"] == 8.0 and second["seconds_per_step"] == 1.0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("first step ")
  assert lines[1] == (
    "step 6/10 loss 1.7500 1 examples/s 10 tokens/s on-policy 50% ETA 0:08"
  )


def test_a_loss_that_is_not_finite_is_null_in_json(tmp_path, clock):
  with training.TrainLog(str(tmp_path), 0, 1) as log:
    log.add(metrics(np.nan, 1.0, 1), "data", BATCH)
    clock[0] += 1.0
    log.write(1)
  assert rows(tmp_path)[0]["loss"] is None


def test_a_terminal_gets_a_bar(tmp_path):
  screen = io.StringIO()
  console = rich.console.Console(file=screen, force_terminal=True, width=120)
  with training.TrainLog(str(tmp_path), 2, 4, console) as log:
    log.add(metrics(3.0, 2.0, 10), "student", BATCH)
    log.write(3)
    log.say("[a line] above")
    log.add(metrics(3.0, 2.0, 10), "student", BATCH)
    log.write(4)
  shown = screen.getvalue()
  assert "3/4" in shown and "4/4" in shown
  assert "loss 1.5000" in shown and "on-policy 100%" in shown
  assert "tokens/s" in shown and "[a line] above" in shown


def test_examples_are_a_table_and_lines(tmp_path, capsys):
  example = {"input": "a|b", "reference": ["x", "y"], "student": "c\nd"}
  with training.TrainLog(str(tmp_path), 0, 1) as log:
    log.evaluation(1, {"wer": 12.345}, [example])
    log.final({"greedy": {"wer": 1.0}})
  assert rows(tmp_path) == [{"step": 1, "eval/wer": 12.345}]
  (line,) = (tmp_path / "examples.jsonl").read_text().splitlines()
  assert json.loads(line) == {"step": 1, **example}
  assert logs._markdown([example]).splitlines() == [
    "| input | reference | student |",
    "| --- | --- | --- |",
    "| a\\|b | ['x', 'y'] | c d |",
  ]
  final = json.loads((tmp_path / "final.json").read_text())
  assert final["greedy"] == {"wer": 1.0} and final["seconds"] >= 0
  assert "step 1 evaluation: wer 12.35" in capsys.readouterr().out
