"""What a run writes and shows, against hand-worked numbers."""

import io
import json
import struct
import time

import numpy as np
import pytest
import rich.console
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

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
    "step 6/10 loss 1.7500 1 examples/s 10 tokens/s on-policy 50% ETA 0:16"
  )


def test_a_loss_that_is_not_finite_is_null_in_json(tmp_path, clock):
  with training.TrainLog(str(tmp_path), 0, 1) as log:
    log.add(metrics(np.nan, 1.0, 1), "data", BATCH)
    clock[0] += 1.0
    log.write(1)
  assert rows(tmp_path)[0]["loss"] is None


def test_means_are_over_the_steps_that_were_not_skipped(tmp_path, clock):
  def step(loss, skipped):
    count = np.float32(skipped), np.float32(1)
    rate = np.float32(0.5 + 0.25 * (skipped == 35)), np.float32(1)
    more = {"skipped_updates": count, "learning_rate": rate}
    return metrics(loss, 2.0, 10) | more

  windows = [
    # The second update was skipped for its gradient, the fourth for its loss.
    [step(6.0, 33), step(1e30, 34), step(2.0, 34), step(np.nan, 35)],
    [step(3.0, 35), step(5.0, 35)],
    [step(np.inf, 36), step(np.nan, 37)],
  ]
  with training.TrainLog(str(tmp_path), 0, 8) as log:
    done = 0
    for window in windows:
      for features in window:
        log.add(features, "data", BATCH)
      clock[0] += 10.0
      done += len(window)
      log.write(done)
  first, second, third = rows(tmp_path)
  assert first["loss"] == (6 + 2) / (2 + 2) and first["skipped_updates"] == 35
  assert first["learning_rate"] == 0.5
  # Tokens went through the model in all steps.
  assert first["tokens_per_second"] == (4 * 5 + 4 * 10) / 10
  assert second["loss"] == 2.0 and second["skipped_updates"] == 35
  assert third["loss"] is None and third["skipped_updates"] == 37
  assert third["learning_rate"] == 0.5


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
    log.evaluation(1, {}, [])  # of prompts alone
  assert capsys.readouterr().out.splitlines()[::2] == [
    "step 1 evaluation: wer 12.35",
    "step 1 evaluation: no scores; outputs are in examples.jsonl",
  ]
  assert rows(tmp_path)[0] == {"step": 1, "eval/wer": 12.345}
  (line,) = (tmp_path / "examples.jsonl").read_text().splitlines()
  assert json.loads(line) == {"step": 1, **example}
  # As GitHub's Markdown shows text: no tag, no emphasis, no other column.
  marked = example | {"student": "c\n<b>d</b> *e*"}
  assert logs._markdown([marked]).splitlines() == [
    "| input | reference | student |",
    "| --- | --- | --- |",
    "| a\\|b | ['x', 'y'] | c &lt;b>d&lt;/b> \\*e\\* |",
  ]
  final = json.loads((tmp_path / "final.json").read_text())
  assert final["greedy"] == {"wer": 1.0} and final["seconds"] >= 0


def test_tensorboard_has_scalars_and_examples(tmp_path, clock):
  with training.TrainLog(str(tmp_path), 0, 2) as log:
    log.add(metrics(6.0, 4.0, 1), "data", BATCH)
    clock[0] += 1.0
    log.write(2)
    log.evaluation(2, {"wer": 50.0}, [{"input": "a"}])
  events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
  # TensorFlow 2 stores scalars as tensors.
  read = lambda tag: [
    (event.step, tensor_util.make_ndarray(event.tensor_proto).item())
    for event in events.Tensors(tag)
  ]
  assert read("loss") == [(2, 1.5)] and read("eval/wer") == [(2, 50.0)]
  assert read("examples") == [(2, b"| input |\n| --- |\n| a |")]


def test_wandb_offline_has_the_history_and_goes_on(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="needs wandb, extra `wandb`")
  monkeypatch.setenv("WANDB_MODE", "offline")
  (tmp_path / "config.gin").write_text("BATCH_SIZE = 64\ntrain.x = 1\n")
  for start, loss in ((0, 1.5), (2, 0.5)):
    with training.TrainLog(
      str(tmp_path), start, 4, wandb_project="distillation"
    ) as log:
      log.add(metrics(loss, 1.0, 1), "data", BATCH)
      log.write(start + 2)
      log.evaluation(start + 2, {"wer": 50.0}, [])
    time.sleep(1)  # wandb names a folder by the second
  # One run of two processes: the second continues the first.
  paths = sorted(
    tmp_path.glob("wandb/offline-*/*.wandb"), key=lambda p: p.stat().st_mtime
  )
  runs = [wandb_records(path) for path in paths]
  assert len(runs) == 2
  for records, step, loss in zip(runs, ("2", "4"), ("1.5", "0.5"), strict=True):
    (run,) = records["run"]
    assert run.project == "distillation"
    assert run.run_id == (tmp_path / "wandb_run.txt").read_text()
    settings = {item.key: item.value_json for item in run.config.update}
    assert settings["BATCH_SIZE"] == '"64"' and "train.x" not in settings
    (row,) = records["history"]
    values = {item.nested_key[0]: item.value_json for item in row.item}
    assert values["_step"] == step and values["loss"] == loss
    assert float(values["eval/wer"]) == 50.0


def wandb_records(path):
  """Kind to the records of wandb's offline file, a LevelDB log of protobufs."""
  from wandb.proto import wandb_internal_pb2

  data, position, record = path.read_bytes(), 7, b""
  found = {}
  while position + 7 <= len(data):
    left = 2**15 - position % 2**15
    if left < 7:  # blocks end with padding
      position += left
      continue
    size, kind = struct.unpack("<HB", data[position + 4 : position + 7])
    record += data[position + 7 : position + 7 + size]
    position += 7 + size
    if kind in (1, 4):  # a whole record, or its last part
      parsed = wandb_internal_pb2.Record.FromString(record)
      name = parsed.WhichOneof("record_type")
      found.setdefault(name, []).append(getattr(parsed, name))
      record = b""
  return found
