"""Metrics that raise, and values that are no numbers, cost themselves alone."""

import json
import math

import numpy as np
import pytest
import seqio
import written_outputs

from gkd_jax import data, evaluation, partitioning, training
from gkd_jax.evaluation import metric_values, run_evaluations
from gkd_jax.tasks import text_metrics


def right(targets, predictions):
  pairs = zip(targets, predictions, strict=True)
  return {"right": 100 * float(np.mean([t == p for t, p in pairs]))}


def raises(targets, predictions):
  raise KeyError("no such word")


def texts(targets, predictions):
  return {
    "text": seqio.metrics.Text("# outputs"),
    "bytes": b"caf\xe9",
    "list": [0.5],
    "none": None,
    "nan": math.nan,
    "array": np.float32(2.5),
  }


def nothing(targets, predictions):
  return None


def again(targets, predictions):
  return {"right": 0.0}


def likelihood(targets, scores):
  return {"tokens": -float(np.mean(scores))}


COLUMNS = {"inputs": ["0", "1"], "targets": ["a", "b"]}
LENGTHS = {"inputs": 8, "targets": 8}


def evaluator(task, **options):
  return evaluation.Evaluator(
    data.load_task(task),
    LENGTHS,
    2,
    partitioning.make_mesh(),
    split="test",
    **options,
  )


def test_values_that_are_no_numbers_are_texts_or_left_out(tmp_path, capsys):
  task = written_outputs.add_task(
    "odd_metrics", COLUMNS, [texts, raises, right, nothing]
  )
  values = evaluator(task).try_metrics()
  assert values.numbers == pytest.approx(
    {"nan": math.nan, "array": 2.5, "right": 100.0}, nan_ok=True
  )
  assert values.texts == {"text": "# outputs", "bytes": "caf\ufffd"}
  assert values.problems() == [
    "left out: list: expected a number, got a list",
    "left out: none: expected a number, got None",
    "left out: raises: KeyError: 'no such word'",
    "left out: nothing: TypeError: expected a dictionary of values, got None",
  ]
  # `gkd eval` writes all that there is, and says which metrics have no values.
  with pytest.raises(
    ValueError, match="got none of raises, nothing; set metric_fns of odd_"
  ):
    written_outputs.evaluate(tmp_path, task, ["a", "c"])
  assert all(line in capsys.readouterr().out for line in values.problems()[:1])
  written = json.loads((tmp_path / "metrics.json").read_text())
  assert written == {"nan": None, "array": 2.5, "right": 50.0}
  lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["prediction"] for row in rows] == ["a", "c"]
  assert [row["statistics"]["right"] for row in rows] == [[100, 1], [0, 1]]
  assert {row["task"] for row in rows} == {"odd_metrics"}


def length(targets, predictions):
  return {"length": float(np.mean([*map(len, predictions)]))}


class Log:
  """Collects what a run's evaluations say and log."""

  def __init__(self):
    self.said, self.scores = [], []

  def say(self, line):
    self.said.append(line)

  def evaluation(self, step, scores, *_):
    self.scores.append((step, scores))


def test_what_a_run_leaves_out_is_said_once():
  def later(targets, predictions):
    return {"list": [0.5]} if predictions == ["a", "a"] else {}

  task = written_outputs.add_task(
    "prompts_of_a_run",
    {"inputs": ["0", "1"]},
    [length, text_metrics.exact_match, later],
  )
  model, log = written_outputs.Outputs(), Log()
  evaluations = run_evaluations.RunEvaluations(
    model,
    {},
    task=data.load_task(task),
    dataset=training.DatasetConfig(task, LENGTHS, 2),
    settings=training.EvalConfig(split="test", batch_size=2),
    mesh=partitioning.make_mesh(),
  )
  (warning,) = evaluations.warnings
  assert warning.startswith("on two references, left out: exact_match: expect")
  rows = np.array([[100, 1, 0, 0, 0, 0, 0, 0]] * 2, np.int32)  # "a"
  for step in (1, 2):
    evaluations.at(step, rows, log)
  assert log.scores == [(1, {"length": 1.0}), (2, {"length": 1.0})]
  assert log.said == ["left out: list: expected a number, got a list"]


def test_metrics_that_need_references_are_left_out_of_prompts_alone(
  tmp_path, capsys
):
  prompts = written_outputs.add_task(
    "prompts_to_score",
    {"inputs": COLUMNS["inputs"]},
    [length, text_metrics.exact_match, likelihood],
  )
  pairs = written_outputs.add_task("pairs_to_score", COLUMNS, [right])
  seqio.MixtureRegistry.add("prompts_and_pairs", [prompts, pairs], 1.0)
  # No failure: `gkd eval` has the values that there are.
  scores = written_outputs.evaluate(tmp_path, "prompts_and_pairs", ["a", "xyz"])
  assert scores == {
    "prompts_to_score/length": 2.0,
    "pairs_to_score/right": 50.0,
  }
  alone = "expected references, got prompts alone"
  said = capsys.readouterr().out
  assert f"left out: prompts_to_score/likelihood: {alone}\n" in said
  assert f"left out: prompts_to_score/exact_match: {alone} (Attr" in said
  with pytest.raises(
    ValueError, match="metric of length, got 'exact'; set BES"
  ):
    metric_values.check_best_metric("exact", evaluator(prompts).try_metrics())


def test_two_metrics_of_one_name_are_refused():
  task = written_outputs.add_task("same_names", COLUMNS, [right, again])
  with pytest.raises(ValueError, match="got 'right' from right and from again"):
    evaluator(task).try_metrics()


def test_a_best_metric_that_the_task_lacks_is_refused():
  task = written_outputs.add_task("one_metric", COLUMNS, [right])
  values = evaluator(task).try_metrics()
  metric_values.check_best_metric("right", values)
  metric_values.check_best_metric(None, values)
  with pytest.raises(
    ValueError, match="metric of right, got 'rigth'; set BEST"
  ):
    metric_values.check_best_metric("rigth", values)
  # A function that raises on two examples may have it on more.
  unknown = metric_values.MetricValues({}, {}, {}, {"f": KeyError()})
  metric_values.check_best_metric("rigth", unknown)


def test_scores_of_targets_are_tried_and_compared(tmp_path):
  task = written_outputs.add_task("scored", COLUMNS, [likelihood])
  assert evaluator(task).try_metrics().numbers == {"tokens": 0}
  # One letter, and no EOS: the feature of the task adds it.
  assert written_outputs.evaluate(tmp_path, task, ["a", "b"]) == {"tokens": 2}


def test_tasks_without_examples_or_split_are_left_out(capsys):
  names = [
    written_outputs.add_task("has_rows", COLUMNS, [right]),
    written_outputs.add_task(
      "has_no_rows",
      {"inputs": np.array([], str), "targets": np.array([], str)},
      [right],
    ),
    written_outputs.add_task("has_train", COLUMNS, [right], splits=("train",)),
  ]
  seqio.MixtureRegistry.add("some_rows", names, 1.0)
  found = evaluator("some_rows")
  assert capsys.readouterr().out.splitlines() == [
    "left out: has_no_rows has no example in 'test'",
    "left out: has_train has no split 'test'",
  ]
  assert found.num_examples == 2
  # Names are those of a mixture, whatever is left out.
  assert found.try_metrics().numbers == {"has_rows/right": 100}
  assert evaluator("has_no_rows").try_metrics().numbers == {}


def test_an_empty_split_is_refused_before_decoding(tmp_path):
  with pytest.raises(ValueError, match="examples in the split 'test' of none"):
    written_outputs.add_task(
      "none",
      {"inputs": np.array([], str), "targets": np.array([], str)},
      [right],
    )
    written_outputs.evaluate(tmp_path, "none", [""])


def raw(output, example, is_target):
  return example["note"].decode() if is_target else output


def test_text_that_is_not_utf8_is_read_and_its_row_named(capsys):
  columns = {
    "inputs": [b"0", b"1"],
    "targets": [b"a", b"caf\xe9"],
    "note": [b"x", b"\xff"],
  }
  task = written_outputs.add_task("latin", columns, [right], raw)
  found = evaluator(task)
  assert capsys.readouterr().out.splitlines() == [
    "not UTF-8, read with U+FFFD: note, targets_pretokenized of row 1 in 'test'"
    " of latin"
  ]
  (result,) = found.predict(
    written_outputs.Outputs(), np.ones((2, 8), np.int32)
  ).values()
  assert result.targets == ["x", "\ufffd"]


def test_several_samples_without_sampling_are_refused(tmp_path):
  task = written_outputs.add_task("greedy", COLUMNS, [right])
  with pytest.raises(
    ValueError, match=r"got 3 at temperature 0\.0; set SAMPLING"
  ):
    written_outputs.evaluate(tmp_path, task, ["a", "b"], num_samples=3)
  assert not list(tmp_path.iterdir())


def test_rouge_lsum_by_hand():
  """Lin 2004, section 3.2: w1 w2 w3 w4 w5 and two sentences of an output.

  The longest common subsequences with `w1 w3 w8 w9 w5` and `w4 w1 w2 w6 w7 w8`
  are w1 w3 w5 and w1 w2. Their union has 4 of the reference's 5 words, and of the
  output's 11: F = 2 * 4 / (5 + 11). As one sentence, the output has w1 w3 w5 in
  this order (w1 w3 w4 too, and w2 only after them): F = 2 * 3 / 16. All 5 words
  are in it: F = 2 * 5 / 16, and no pair of words but w1 w2: F = 2 * 1 / (4 + 10).
  """
  expected = {
    "rouge1": 100 * 10 / 16,
    "rouge2": 100 * 2 / 14,
    "rougeL": 100 * 6 / 16,
    "rougeLsum": 100 * 8 / 16,
  }
  for between in (" . ", "\n"):
    output = f"w1 w3 w8 w9 w5{between}w4 w1 w2 w6 w7 w8"
    found = text_metrics.rouge(["w1 w2 w3 w4 w5"], [output])
    assert found == pytest.approx(expected), between
