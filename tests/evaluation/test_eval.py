"""`gkd eval` with the shipped pronunciation model, whose errors are few.

Metrics are worked out again from the lines that were written. In one process,
from the gin files as the command line parses them.
"""

import functools
import json

import numpy as np
import pytest

import gin
from gkd_jax import infer
from gkd_jax.command_line import gin_settings
from gkd_jax.evaluation import compare
from gkd_jax.tasks import shipped

NUMBER, FEW = 40, 8


def evaluate(folder, *files, **macros):
  """(metrics, lines of predictions.jsonl) of the model on test words."""
  settings = {
    "CHECKPOINT_PATH": shipped.model_path("g2p_teacher"),
    "MIXTURE_OR_TASK_NAME": "g2p_cmudict",
    "TASK_FEATURE_LENGTHS": {"inputs": 24, "targets": 24},
    "EVAL_SPLIT": "test",
    "EVAL_NUM_EXAMPLES": NUMBER,
    "EVAL_OUTPUT_DIR": str(folder),
  } | macros
  bindings = [f"{name} = {value!r}" for name, value in settings.items()]
  models = [f"{name} = %G2P_TEACHER" for name in ("STUDENT", "TEACHER")]
  if "runs/instruments.gin" not in files:
    models.pop()
  gin_settings.parse(["models/g2p.gin", *files], models + bindings, [])
  scores = gin.get_configurable(infer.evaluate_checkpoint)()
  (written,) = read(folder / "metrics.json")
  assert written == scores
  return scores, read(folder / "predictions.jsonl")


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def edits(a, b):
  """Levenshtein distance by its recursion."""

  @functools.cache
  def distance(i, j):
    if not i or not j:
      return i + j
    return min(
      distance(i - 1, j) + 1,
      distance(i, j - 1) + 1,
      distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]),
    )

  return distance(len(a), len(b))


def nearest(target, prediction):
  """(edits, phonemes) of the nearest pronunciation."""
  pairs = [
    (edits(t.split(), prediction.split()), len(t.split())) for t in target
  ]
  return min(pairs, key=lambda pair: pair[0])


def error_rates(pairs):
  counted = [nearest(*pair) for pair in pairs]
  return {
    "per": 100 * sum(e for e, _ in counted) / sum(n for _, n in counted),
    "wer": 100 * np.mean([e > 0 for e, _ in counted]),
  }


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
  folder = tmp_path_factory.mktemp("eval") / "greedy"
  return folder, *evaluate(folder, "runs/eval.gin")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
  folder = tmp_path_factory.mktemp("eval") / "sampled"
  return folder, *evaluate(
    folder, "runs/eval.gin", SAMPLING_TEMPERATURE=1.5, NUM_SAMPLES=3
  )


def test_metrics_are_those_of_the_written_predictions(greedy):
  _, scores, rows = greedy
  assert len(rows) == NUMBER and all(row["score"] < 0 for row in rows)
  expected = error_rates([(x["target"], x["prediction"]) for x in rows])
  assert 0 < expected["per"] < expected["wer"] < 100
  assert scores == pytest.approx(expected)


def test_several_samples_are_scored_together(greedy, sampled):
  _, scores, rows = sampled
  pairs = [(x["target"], text) for x in rows for text in x["samples"]]
  assert len(pairs) == 3 * NUMBER
  for name, value in error_rates(pairs).items():
    assert scores[name] == pytest.approx(value), name
    assert value > greedy[1][name]  # at this temperature
  assert all(x["prediction"] == x["samples"][0] for x in rows)
  # Samples of one input differ, and not only between inputs.
  assert any(len(set(x["samples"])) == 3 for x in rows)
  assert 10 < scores["self_bleu"] < 90
  with pytest.raises(ValueError, match="set NUM_SAMPLES"):
    evaluate(sampled[0], "runs/eval.gin", NUM_SAMPLES=0)


# tests/decoding/test_sampling.py has its distribution.
@pytest.mark.nightly
def test_top_k_of_one_is_greedy(greedy, tmp_path):
  scores, rows = evaluate(
    tmp_path,
    "runs/eval.gin",
    SAMPLING_TEMPERATURE=1.5,
    SAMPLING_TOP_K=1,
    NUM_SAMPLES=2,
  )
  assert scores["self_bleu"] == 100
  for a, b in zip(rows, greedy[2], strict=True):
    assert a["samples"] == 2 * [b["prediction"]]


# As in tests/decoding, by the command.
@pytest.mark.nightly
def test_top_p_of_little_mass_is_greedy(greedy, tmp_path):
  _, rows = evaluate(
    tmp_path, "runs/eval.gin", SAMPLING_TEMPERATURE=1.5, SAMPLING_TOP_P=1e-6
  )
  assert [x["prediction"] for x in rows] == [x["prediction"] for x in greedy[2]]


# As in tests/decoding/test_loops.py, by the command.
@pytest.mark.nightly
def test_slots_give_the_same_outputs(greedy, tmp_path):
  _, rows = evaluate(tmp_path, "runs/eval.gin", DECODE_SLOTS=2)
  assert [x["prediction"] for x in rows] == [x["prediction"] for x in greedy[2]]


def test_beam_search_finds_no_less_likely_outputs(greedy, tmp_path):
  _, rows = evaluate(
    tmp_path,
    "runs/eval.gin",
    "runs/beam.gin",
    DECODER_PARAMS={"alpha": 0.0, "num_decodes": 4},
  )
  gains = [
    a["score"] - b["score"] for a, b in zip(rows, greedy[2], strict=True)
  ]
  assert min(gains) > -1e-4 and max(gains) > 1e-3


# tests/evaluation/test_measurements.py has the values.
@pytest.mark.nightly
def test_instruments_of_a_model_against_itself(greedy, tmp_path):
  scores, rows = evaluate(
    tmp_path,
    "runs/instruments.gin",
    TEACHER_CHECKPOINT_PATH=shipped.model_path("g2p_teacher"),
    EVAL_NUM_EXAMPLES=FEW,
  )
  first = greedy[2][:FEW]
  assert [x["prediction"] for x in rows] == [x["prediction"] for x in first]
  (tables,) = read(tmp_path / "by_position.json")
  for source in ("student_samples", "data"):
    assert scores[f"{source}/acceptance"] == pytest.approx(1, abs=1e-5)
    assert scores[f"{source}/forward_kl"] == pytest.approx(0, abs=1e-5)
    assert tables[source]["count"][0] == FEW
    assert len(tables[source]["reverse_kl"]) == len(tables[source]["count"])
  assert 0 < scores["ece"] < 30
  # The first pronunciation and EOS: what teacher forcing has gone through.
  phonemes = [len(x["target"][0].split()) + 1 for x in rows]
  assert scores["data/length"] == pytest.approx(np.mean(phonemes))
  # `gkd compare` has intervals of what is measured, too.
  assert "examples" not in tables
  name = "student_samples/length"
  result = compare.compare(str(tmp_path), str(tmp_path), name)[name]
  assert result.a.low < result.a.value < result.a.high
  assert result.a.value == pytest.approx(scores[name])


def test_two_evaluations_are_compared(greedy, sampled):
  results = compare.compare(str(greedy[0]), str(sampled[0]))
  assert set(results) == {"per", "wer"}
  for name, (a, b, paired) in results.items():
    assert a.value == pytest.approx(greedy[1][name])
    assert b.value == pytest.approx(sampled[1][name])
    assert paired.difference == pytest.approx(b.value - a.value)
    assert 0 < paired.low < paired.difference < paired.high
    assert paired.p_value < 0.05
    assert a.low < a.value < a.high
    # One run has an output for each example, the other three: they weigh alike.
    swapped = compare.compare(str(sampled[0]), str(greedy[0]), name)
    assert swapped[name].paired.p_value == paired.p_value
  text = compare.table(compare.compare(str(greedy[0]), str(sampled[0])))
  assert f"{greedy[1]['per']:.2f}" in text and "wer" in text


def test_comparisons_of_other_things_are_refused(greedy, tmp_path):
  folder = str(greedy[0])
  with pytest.raises(ValueError, match=r"of per, wer in .* got 'bleu'"):
    compare.compare(folder, folder, "bleu")
  with pytest.raises(ValueError, match="set the EVAL_OUTPUT_DIR"):
    compare.compare(folder, str(tmp_path))
  lines = (greedy[0] / "predictions.jsonl").read_text().splitlines()
  (tmp_path / "predictions.jsonl").write_text("\n".join(lines[::-1]))
  with pytest.raises(ValueError, match="set EVAL_SPLIT"):
    compare.compare(folder, str(tmp_path))
