"""Intervals and tests against scipy, sacrebleu, and counting by hand."""

import itertools

import numpy as np
import pytest
import sacrebleu
import scipy.stats
from sacrebleu import significance as sacrebleu_significance

from gkd_jax.evaluation import compare
from gkd_jax.tasks import example_statistics


def scores(number=60, seed=0):
  """Two runs that differ by a little, correlated over examples."""
  rng = np.random.default_rng(seed)
  common = rng.normal(size=number)
  return common + rng.normal(size=(2, number)) * [[0.5], [0.6]] + [[0], [0.25]]


def test_interval_of_two_examples_is_counted_by_hand():
  # Of the 4 resamples of (0, 1), the means are 0, 1/2, 1/2, 1: the quantiles at
  # 20 % and 30 % on either side are certain.
  values = np.array([0.0, 1.0])
  wide = compare.bootstrap_interval(values, level=0.6)
  narrow = compare.bootstrap_interval(values, level=0.4)
  assert wide == (0.5, 0.0, 1.0)
  assert narrow == (0.5, 0.5, 0.5)


def test_intervals_within_a_run_are_counted_by_hand():
  statistics = [
    # A rate of errors: 1 of 4 symbols, 3 of 4.
    {
      "rate": [100.0, 4.0],
      "mean": [1.0, 1.0],
      "other": [1.0, 1.0],
      "one": [5, 1],
    },
    {"rate": [300.0, 4.0], "mean": [2.0, 1.0], "other": [2.0, 1.0]},
  ]
  values = {"rate": 50.0, "mean": 1.5, "other": 2.0, "one": 5.0, "none": 1.0}
  # Of the 4 resamples, one has the first example twice, one the second: more than
  # 2.5 % each. "other" is no mean, "one" is of one example.
  assert compare.intervals(statistics, values) == {
    "rate": [25.0, 75.0],
    "mean": [1.0, 2.0],
  }
  # Alike in every resample, which is no certainty.
  same = [{"wrong": [0.0, 1.0]}] * 8
  assert compare.intervals(same, {"wrong": 0.0}) == {"wrong": None}
  # Of 8 examples, one of them wrong, all are right in (7/8)^8 = 34 % of the
  # resamples; 4 or more are wrong in 1.1 %, 3 or more in 6.7 %.
  eight = [{"wrong": [float(i == 0), 1.0]} for i in range(8)]
  found = compare.intervals(eight, {"wrong": 0.125})
  assert found == {"wrong": [0.0, 0.375]}


def test_interval_of_a_mean_is_scipys():
  values = scores()[0]
  expected = scipy.stats.bootstrap(
    (values,),
    np.mean,
    n_resamples=40_000,
    confidence_level=0.9,
    method="percentile",
    rng=np.random.default_rng(5),
  ).confidence_interval
  got = compare.bootstrap_interval(values, level=0.9, num_resamples=40_000)
  assert got.value == pytest.approx(values.mean())
  width = expected.high - expected.low
  assert got.low == pytest.approx(expected.low, abs=0.02 * width)
  assert got.high == pytest.approx(expected.high, abs=0.02 * width)


def test_interval_of_an_error_rate_is_scipys_of_a_ratio_of_sums():
  rng = np.random.default_rng(3)
  symbols = rng.integers(1, 30, 80)
  errors = rng.binomial(
    symbols, np.minimum(0.9, 2 / symbols)
  )  # rarer in long ones
  expected = scipy.stats.bootstrap(
    (errors, symbols),
    lambda e, s, axis: e.sum(axis) / s.sum(axis),
    n_resamples=40_000,
    paired=True,
    vectorized=True,
    method="percentile",
    rng=np.random.default_rng(5),
  ).confidence_interval
  got = compare.bootstrap_interval(
    np.stack([errors, symbols], 1), num_resamples=40_000
  )
  assert got.value == pytest.approx(errors.sum() / symbols.sum())
  width = expected.high - expected.low
  assert got.low == pytest.approx(expected.low, abs=0.02 * width)
  assert got.high == pytest.approx(expected.high, abs=0.02 * width)
  # The mean of the words' own rates is another number, outside of the interval.
  assert np.mean(errors / symbols) > got.high


def test_few_pairs_are_swapped_in_all_ways():
  a, b = np.array([[3.0, 1.0, 4.0, 1.5, 9.0], [4.0, 2.5, 4.0, 1.0, 11.0]])
  sizes = []
  for signs in itertools.product((1, -1), repeat=5):
    sizes.append(
      abs(sum(s * (y - x) for s, x, y in zip(signs, a, b, strict=True)))
    )
  seen = abs((b - a).sum())
  expected = sum(size >= seen - 1e-12 for size in sizes) / 32
  assert 0 < expected < 1 and sizes.count(seen) > 2  # ties count
  got = compare.paired_test(a, b)
  assert got.p_value == expected
  assert got.difference == pytest.approx((b - a).mean())
  assert compare.paired_test(a, a).p_value == 1.0


def test_many_pairs_are_swapped_at_random():
  a, b = scores()
  expected = scipy.stats.permutation_test(
    (a, b),
    lambda x, y, axis: y.mean(axis) - x.mean(axis),
    permutation_type="samples",
    vectorized=True,
    n_resamples=40_000,
    rng=np.random.default_rng(5),
  ).pvalue
  assert 0.05 < expected < 0.9
  got = compare.paired_test(a, b, num_resamples=40_000)
  assert got.p_value == pytest.approx(expected, abs=0.015)
  # Unpaired, the examples' own spread would hide the difference.
  unpaired = scipy.stats.ttest_ind(a, b).pvalue
  assert unpaired > expected + 0.1


def test_paired_bootstrap_of_a_mean_is_the_normal_distribution():
  a, b = scores(number=400)
  differences = b - a
  error = differences.std() / 20
  z = differences.mean() / error
  got = compare.paired_test(a, b, num_resamples=20_000, level=0.9)
  assert got.p_value == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), abs=0.01)
  half = scipy.stats.norm.ppf(0.95) * error
  for end, sign in ((got.low, -1), (got.high, 1)):
    expected = differences.mean() + sign * half
    assert end == pytest.approx(expected, abs=0.03 * half)


def corpus():
  """References, and two systems that drop or double words at random."""
  rng = np.random.default_rng(1)
  words = list("abcdefghijklm")
  references = [
    " ".join(rng.choice(words, rng.integers(5, 12))) for _ in range(30)
  ]

  def system(rate):
    return [
      " ".join(
        w if rng.random() > rate else str(rng.choice(words))
        for w in line.split()
      )
      for line in references
    ]

  return references, system(0.30), system(0.36)


def test_bleu_is_sacrebleus_in_value_and_in_significance():
  references, first, second = corpus()
  metric = sacrebleu.BLEU(tokenize="intl")
  _, results = sacrebleu_significance.PairedTest(
    [("first", first), ("second", second)],
    {"BLEU": metric},
    [references],
    test_type="ar",
    n_samples=4000,
  )()
  baseline, other = results["BLEU"]
  assert 0.05 < other.p_value < 0.95
  stats = [
    np.array(
      [
        example_statistics.bleu(r, p)["bleu"]
        for r, p in zip(references, system, strict=True)
      ]
    )
    for system in (first, second)
  ]
  values = [example_statistics.corpus_bleu(x.sum(0)[None])[0] for x in stats]
  assert values == pytest.approx([baseline.score, other.score])
  got = compare.paired_test(
    *stats, metric=example_statistics.corpus_bleu, num_resamples=4000
  )
  assert got.difference == pytest.approx(other.score - baseline.score)
  # Two Monte Carlo errors of sqrt(p (1 - p) / 4000), three times.
  assert got.p_value == pytest.approx(other.p_value, abs=0.035)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda f: f([]), "set the examples"),
    (lambda f: f([1.0]), "at least 2"),
    (lambda f: f([1.0, np.nan]), "finite"),
    (lambda f: f([1.0, 2.0], level=1.0), "set level"),
    (lambda f: f([1.0, 2.0], num_resamples=0), "set num_resamples"),
  ],
)
def test_wrong_settings_say_what_to_change(call, message):
  with pytest.raises(ValueError, match=message):
    call(compare.bootstrap_interval)


def test_runs_on_other_examples_are_refused():
  with pytest.raises(ValueError, match="same examples"):
    compare.paired_test(np.ones(3), np.ones(4))


def test_a_table_has_no_interval_where_resamples_do_not_differ():
  same, other = compare.Interval(0, 0, 0), compare.Interval(2, 1, 3)
  paired = compare.PairedResult(2.0, 1.0, 3.0, 0.5)
  line = compare.table({"exact": compare.Comparison(same, other, paired)})
  cells = line.splitlines()[1].split()
  assert cells[:7] == ["exact", "0.00", "-", "2.00", "[1.00,", "3.00]", "+2.00"]
