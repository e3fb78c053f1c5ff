"""`gkd watch`, on folders as runs write them."""

import io
import json

import pytest
import rich.console

from gkd_jax.experiments import watch


def begin(folder, steps=1200, split="'test'"):
  folder.mkdir()
  (folder / "config.gin").write_text(
    f"TRAIN_STEPS = {steps}\nFINAL_EVAL_SPLIT = {split}\n"
  )


def log(folder, *rows):
  with open(folder / "metrics.jsonl", "a") as f:
    for row in rows:
      f.write(json.dumps(row) + "\n")


def trained(step, loss, seconds_per_step):
  return {"step": step, "loss": loss, "seconds_per_step": seconds_per_step}


def finish(folder, wer):
  result = {"seconds": 83.4, "split": "test", "greedy": {"per": 9, "wer": wer}}
  result["sampled"] = {"per": 11, "wer": wer + 5}
  (folder / "final.json").write_text(json.dumps(result))


def test_a_run_from_its_first_file_to_its_last(tmp_path):
  folder = tmp_path / "gkd"
  line = lambda: watch.line(watch.read("gkd", str(folder)))
  assert line() == "gkd: waiting"
  begin(folder)
  assert line() == "gkd: starting"
  log(folder, trained(100, 2.5, 0.4))
  # 1,100 steps of 0.4 seconds are 440 seconds.
  assert line() == "gkd: step 100/1200 loss 2.5000 ETA 7:20"
  log(folder, trained(200, 1.25, 0.2), {"step": 200, "eval/wer": 71.25})
  log(folder, trained(500, 1.0, 0.1))
  # The last two lines: 100 steps of 0.2 and 300 of 0.1 seconds, 0.125 on average;
  # 700 of these are 87.5 seconds.
  assert line() == "gkd: step 500/1200 loss 1.0000 WER 71.2 ETA 1:27"
  log(folder, trained(1200, 0.5, 0.1), {"step": 1200, "eval/wer": 40.0})
  assert line() == "gkd: step 1200/1200 loss 0.5000 WER 40.0 final evaluation"
  finish(folder, 41.0)
  assert line() == "gkd: finished in 1:23, greedy WER 41.0, sampled WER 46.0"


def test_without_a_terminal_a_line_every_15_seconds(tmp_path, capsys):
  first, second = tmp_path / "sft", tmp_path / "gkd"
  seconds = []

  def sleep(wait):
    seconds.append(wait)
    now = sum(seconds)
    if now == 3:
      begin(first)
      log(first, trained(100, 2.0, 0.1))
    if now == 20:
      finish(first, 60.0)
    if now == 29:
      begin(second)
    if now == 31:
      log(second, trained(100, 3.0, 0.1))
    if now == 40:
      finish(second, 50.0)

  watch.watch([f"sft={first}", str(second)], sleep=sleep)
  assert capsys.readouterr().out.splitlines() == [
    "sft: step 100/1200 loss 2.0000 ETA 1:50",  # after 15 seconds
    "sft: finished in 1:23, greedy WER 60.0, sampled WER 65.0",  # after 20
    "gkd: starting",  # after 30
    "gkd: finished in 1:23, greedy WER 50.0, sampled WER 55.0",
  ]
  assert sum(seconds) == 40


def test_a_terminal_gets_a_table_that_fills_in(tmp_path):
  folder = tmp_path / "sft"
  begin(folder)
  log(folder, trained(300, 0.75, 0.1), {"step": 300, "eval/wer": 70.0})
  screen = io.StringIO()
  console = rich.console.Console(file=screen, force_terminal=True, width=100)
  seen = []

  def sleep(_):
    seen.append(screen.getvalue())
    finish(folder, 62.0)

  watch.watch([f"sft={folder}", f"gkd={folder}"], console, sleep)
  (before,) = seen
  after = screen.getvalue()[len(before) :]
  for text in ("WER so far", "300/1200", "0.7500", "70.0", "ETA 1:30"):
    assert text in before
  assert "62.0" not in before and "ETA" not in after
  assert all(text in after for text in ("62.0", "67.0", "finished in 1:23"))


def test_a_run_without_a_final_evaluation_ends_when_it_lets_its_folder_go(
  tmp_path, capsys
):
  folder = tmp_path / "gkd"
  begin(folder, split=None)
  (folder / "run.lock").write_text("{}")
  log(folder, trained(1200, 0.5, 0.1), {"step": 1200, "eval/wer": 40.0})
  watch.watch([str(folder)], sleep=lambda _: (folder / "run.lock").unlink())
  assert capsys.readouterr().out.splitlines() == [
    "gkd: step 1200/1200 loss 0.5000 WER 40.0 final evaluation",
    "gkd: step 1200/1200 loss 0.5000 WER 40.0 finished",
  ]


def test_no_runs_are_an_error():
  with pytest.raises(ValueError, match="expected runs to watch, got none"):
    watch.watch([])
