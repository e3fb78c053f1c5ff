"""`gkd compare` resamples the task's own metric, whatever it is made of."""

import json

import nightly
import numpy as np
import pytest
import scipy.stats
import seqio
import written_outputs

from gkd_jax import data, files
from gkd_jax.evaluation import compare
from gkd_jax.tasks import few_shot, text_metrics

NUMBER = 24
WORDS = ["ein", "Haus", "am", "See", "heute", "und", "morgen", "da"]


def sentences(rng):
  """Targets, and two runs that change their words at random."""
  targets = [
    " ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(NUMBER)
  ]

  def run(rate):
    return [
      " ".join(
        str(rng.choice(WORDS)) if rng.random() < rate else word
        for word in text.split()
      )
      for text in targets
    ]

  return targets, run(0.2), run(0.4)


def answers(rng, right, wrong):
  """A run's outputs, right for a share of the targets."""
  return [
    [right(i) if rng.random() < share else wrong for i in range(NUMBER)]
    for share in (0.8, 0.5)
  ]


def case_sentences(rng):
  targets, *runs = sentences(rng)
  return {"targets": targets}, runs


def case_chains(rng):
  targets = [f"{i}+1={i + 1};#{i + 1}" for i in range(NUMBER)]
  return {"targets": targets}, answers(rng, targets.__getitem__, "1+1=3;x")


def case_numbers(rng):
  targets = [
    f"{i} + 1 = {i + 1}. The answer is {i + 1}." for i in range(NUMBER)
  ]
  return {"targets": targets}, answers(
    rng, targets.__getitem__, "1 + 1 = 3. The answer is 3."
  )


def case_phonemes(rng):
  spoken = ["K AE T", "D AO G IH", "AH"] * (NUMBER // 3)
  columns = {"targets": spoken, "references": [f"{s}|T" for s in spoken]}
  return columns, answers(rng, spoken.__getitem__, "K AE AE T")


def case_groups(rng):
  letters = ["A", "B", "C", "D"] * (NUMBER // 4)
  groups = ["large"] * 15 + ["small"] * 6 + ["tiny"] * 3
  columns = {"targets": letters, "group": groups}
  return columns, answers(rng, letters.__getitem__, "E")


# Of each shipped task: its examples and two runs.
SHIPPED = {
  "wmt14_en_de_bytes": case_sentences,
  "xsum_bytes": case_sentences,
  "flan_rte_bytes": case_sentences,
  "gsm8k_cot_bytes": case_numbers,
  "g2p_cmudict": case_phonemes,
  "arithmetic_cot": case_chains,
  "mmlu_bytes": case_groups,
  "bbh_bytes": case_groups,
}


def resampled(metric, values, **options):
  """scipy's interval of a function of chosen examples."""
  return scipy.stats.bootstrap(
    (np.arange(NUMBER),),
    metric,
    vectorized=False,
    method="percentile",
    rng=np.random.default_rng([0, 0]),
    **options,
  ).confidence_interval


# A metric of each kind of outputs.
@pytest.mark.parametrize(
  "name",
  nightly.of(
    SHIPPED,
    [
      *("xsum_bytes", "gsm8k_cot_bytes", "g2p_cmudict", "arithmetic_cot"),
      "mmlu_bytes",
    ],
  ),
)
def test_intervals_are_those_of_the_shipped_metric_itself(name, tmp_path):
  columns, runs = SHIPPED[name](np.random.default_rng(0))
  columns["inputs"] = [str(i) for i in range(NUMBER)]
  shipped = data.load_task(name)
  task = written_outputs.add_task(
    f"compared_{name}",
    columns,
    shipped.metric_fns,
    shipped.postprocess_fn,
  )
  folders = [str(tmp_path / str(i)) for i in range(2)]
  scores = [
    written_outputs.evaluate(*pair, outputs)
    for pair, outputs in zip(((f, task) for f in folders), runs, strict=True)
  ]
  results = compare.compare(*folders, num_resamples=40)
  assert set(results) == set(scores[0])
  rows = files.read_json_lines(f"{folders[0]}/predictions.jsonl")
  targets = [
    tuple(row["target"]) if "group" in columns else row["target"]
    for row in rows
  ]
  pick = lambda texts, chosen: [texts[i] for i in chosen]
  for metric, (a, b, paired) in results.items():
    # To all digits.
    assert (a.value, b.value) == (scores[0][metric], scores[1][metric])
    assert paired.difference == b.value - a.value
    assert "calls" not in paired.resampled
    if metric.startswith("accuracy/"):
      continue  # of a group: its examples alone are drawn

    def whole(chosen, metric=metric):
      for function in shipped.metric_fns:
        found = function(pick(targets, chosen), pick(runs[0], chosen))
        if metric in found:
          return found[metric]
      raise KeyError(metric)

    low, high = resampled(whole, a, n_resamples=40)
    assert (a.low, a.high) == pytest.approx((low, high), rel=1e-6), metric


def test_a_mean_over_groups_is_not_the_mean_over_examples(tmp_path):
  # A is right for all 8 of one group and none of the 2 of the other: 50. B for 4
  # and for both: 75. Over examples A would be better, 80 against 60.
  columns = {
    "inputs": [str(i) for i in range(10)],
    "targets": ["x"] * 10,
    "group": ["large"] * 8 + ["small"] * 2,
  }
  task = written_outputs.add_task(
    "two_groups",
    columns,
    [few_shot.grouped_exact_match],
    few_shot.grouped_target,
  )
  a, b = str(tmp_path / "a"), str(tmp_path / "b")
  written_outputs.evaluate(a, task, ["x"] * 8 + ["y"] * 2)
  written_outputs.evaluate(b, task, ["x"] * 4 + ["y"] * 4 + ["x"] * 2)
  found = compare.compare(a, b, "accuracy")["accuracy"]
  assert (found.a.value, found.b.value) == (50, 75)
  assert found.paired.difference == 25
  assert found.paired.resampled == "mean over groups of examples"
  # As the metric itself, a resample without a group is the other one's mean.
  assert found.a.high == 100 and found.paired.low < 0


def test_chrf_is_that_of_the_corpus(tmp_path):
  # A long text with errors and a short one without: the mean over texts is far
  # from chrF of the corpus.
  columns = {
    "inputs": ["0", "1"],
    "targets": ["a long sentence about a house and a lake", "yes"],
  }
  task = written_outputs.add_task("two_texts", columns, [text_metrics.chrf])
  outputs = ["a song sentience aboard the horse and a cake", "yes"]
  folder = str(tmp_path)
  scores = written_outputs.evaluate(folder, task, outputs)
  single = [
    text_metrics.chrf([t], [o])["chrf"]
    for t, o in zip(columns["targets"], outputs, strict=True)
  ]
  (found,) = compare.compare(folder, folder).values()
  assert found.a.value == scores["chrf"]
  assert abs(np.mean(single) - scores["chrf"]) > 10
  # Resamples are one of the two texts, or both.
  assert (found.a.low, found.a.high) == pytest.approx((single[0], single[1]))


def rank_correlation(targets, predictions):
  """Raises on one example, as many a statistic does."""
  if len(targets) < 2:
    raise ValueError("a correlation needs two examples")
  found = scipy.stats.spearmanr(
    [float(t) for t in targets], [float(p) for p in predictions]
  )
  return {"spearman": seqio.metrics.Scalar(100 * found.statistic)}


def test_a_metric_that_is_undefined_on_one_example_is_called_itself(
  tmp_path, capsys
):
  rng = np.random.default_rng(1)
  numbers = rng.permutation(NUMBER)
  columns = {
    "inputs": [str(i) for i in range(NUMBER)],
    "targets": [str(i) for i in numbers],
  }
  task = written_outputs.add_task("correlated", columns, [rank_correlation])
  runs = [
    [f"{x:.2f}" for x in numbers + rng.normal(0, spread, NUMBER)]
    for spread in (2, 12)
  ]
  folders = [str(tmp_path / str(i)) for i in range(2)]
  scores = [
    written_outputs.evaluate(folder, task, outputs)["spearman"]
    for folder, outputs in zip(folders, runs, strict=True)
  ]
  (found,) = compare.compare(*folders, num_resamples=60).values()
  assert (found.a.value, found.b.value) == tuple(scores)
  assert found.paired.resampled == "examples, 60 calls of the metric"
  assert "calls of the metric" in compare.table({"spearman": found})

  def of_run(chosen, run=0):
    texts = [runs[run][i] for i in chosen]
    return rank_correlation(numbers[chosen], texts)["spearman"].value

  settings = {"n_resamples": 60}
  low, high = resampled(of_run, found, **settings)
  assert (found.a.low, found.a.high) == pytest.approx((low, high))
  low, high = resampled(
    lambda chosen: of_run(chosen, 1) - of_run(chosen), found, **settings
  )
  assert (found.paired.low, found.paired.high) == pytest.approx((low, high))
  assert found.paired.p_value < 0.05
  # What cannot be had is left out with a line, and the rest is compared.
  seqio.TaskRegistry.remove("correlated")
  assert compare.compare(*folders) == {}
  assert "left out: spearman: expected a seqio task" in capsys.readouterr().out


def test_bleu_of_several_samples_is_that_of_all_outputs(tmp_path):
  # No four-gram matches: the exponential smoothing depends on how many outputs
  # there are, so that mean counts would give another value.
  outputs = [["a b c x", "a b y z"], ["d e f u", "d v f g"]]
  targets = ["a b c d", "d e f g"]
  pooled = text_metrics.bleu(
    targets * 2, [o[s] for s in (0, 1) for o in outputs]
  )
  rows = [
    {
      "inputs": target,
      "target": target,
      "samples": texts,
      "statistics": {
        "bleu": np.mean(
          [
            text_metrics.example_statistics.bleu(target, t)["bleu"]
            for t in texts
          ],
          axis=0,
        ).tolist()
      },
    }
    for target, texts in zip(targets, outputs, strict=True)
  ]
  (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
  (found,) = compare.compare(str(tmp_path), str(tmp_path)).values()
  assert found.a.value == pytest.approx(pooled["bleu"], rel=1e-12)
