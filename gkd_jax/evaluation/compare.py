"""Confidence intervals of a metric, and paired tests between two evaluations.

Both resample examples with `scipy.stats`. Each example has a row of statistics,
and the metric is a function of their sums over examples. That is exact for
corpus metrics such as error rates (errors and symbols) or BLEU (n-gram counts),
which are not means over examples. A mean has a score and a 1 as statistics. A
metric function that nothing of the kind is known of is called itself on the
resampled examples.

Sources: percentile bootstrap (Efron 1979; Koehn 2004 for pairs) and paired
approximate randomisation (Riezler and Maxwell 2005), as in sacrebleu.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as scipy_stats

from gkd_jax.evaluation import eval_folders
from gkd_jax.tasks import example_statistics

Metric = Callable[[np.ndarray], np.ndarray]
"""Sums of statistics `[R, K]` to values `[R]`."""
Values = Callable[[np.ndarray], np.ndarray]
"""Numbers of examples `[R, n]` to the metric's values on these, `[R]`."""
# How often an example was drawn, for a number of resamples at a time, which
# bounds the memory.
_BATCH_NUMBERS = 4_000_000
# Of a metric function that is called on each resample.
_FUNCTION_RESAMPLES = 1_000
# Of a run's own scores, at its end.
_WITHIN_RUN_RESAMPLES = 2_000


class Interval(NamedTuple):
  """A value and the ends of its confidence interval, in the metric's unit."""

  value: float
  low: float
  high: float


class PairedResult(NamedTuple):
  """The difference between two runs on the same examples.

  Attributes:
    difference: metric of the second run minus that of the first.
    low: lower end of its paired bootstrap interval.
    high: upper end.
    p_value: two-sided, for the hypothesis that the runs do not differ.
    resampled: what was resampled, in words; empty if it is not known.
  """

  difference: float
  low: float
  high: float
  p_value: float
  resampled: str = ""


def bootstrap_interval(
  scores: np.ndarray,
  *,
  metric: Metric = example_statistics.ratio,
  level: float = 0.95,
  num_resamples: int = 10_000,
  seed: int = 0,
) -> Interval:
  """Returns the percentile bootstrap interval of a metric over examples.

  >>> bootstrap_interval(np.array([2.0, 2.0, 2.0]))
  Interval(value=2.0, low=2.0, high=2.0)

  Args:
    scores: scores `[n]`, whose mean is the metric; or statistics `[n, K]`, such
      as errors and symbols of an error rate.
    metric: function of the sums of statistics; see `Metric`.
    level: of confidence, in (0, 1).
    num_resamples: resamples of n examples, drawn with replacement.
    seed: of the draws.

  Returns:
    The metric of all examples, and the ends of its interval.

  Raises:
    ValueError: less than two examples, another shape, a number that is not
      finite, or a setting out of its range.
  """
  stats = _statistics("scores", scores)
  _check_settings(level, num_resamples)
  values = _of_sums(metric, stats)
  return _interval(values, len(stats), level, num_resamples, seed)


def intervals(
  statistics: Sequence[Mapping[str, example_statistics.Statistics]],
  values: Mapping[str, float],
) -> dict[str, list[float] | None]:
  """Returns the ends of 95 % bootstrap intervals over the examples of one run.

  They say how far another draw of examples would move a score, and nothing of
  another seed.

  Args:
    statistics: of each example, see `Evaluator.example_statistics`.
    values: metric name to value.

  Returns:
    Metric name to low and high, of the metrics whose statistics give the value;
    None where resamples do not differ, since then they say nothing of certainty.
  """
  run = eval_folders.Evaluation(
    "", [{"statistics": dict(row)} for row in statistics], dict(values), {}
  )
  found = {}
  for name in values:
    table = run.statistics(name)
    if table is None or len(table[0]) < 2:
      continue
    stats, form = table
    interval = bootstrap_interval(
      stats,
      metric=example_statistics.FORMS[form][1],
      num_resamples=_WITHIN_RUN_RESAMPLES,
    )
    differ = interval.low < interval.high
    found[name] = [interval.low, interval.high] if differ else None
  return found


def paired_test(
  a: np.ndarray,
  b: np.ndarray,
  *,
  metric: Metric = example_statistics.ratio,
  level: float = 0.95,
  num_resamples: int = 10_000,
  seed: int = 0,
) -> PairedResult:
  """Tests whether two runs differ on the same examples in the same order.

  The p-value is that of approximate randomisation: the statistics of the two
  runs are swapped for each example with probability 1/2, and p is the fraction
  of swaps whose difference is at least as large as the observed one. All 2^n
  swaps are tried if these are at most `num_resamples`; otherwise p is
  (c + 1) / (R + 1) for c of R random swaps. (sacrebleu does not count
  differences that are equal to the observed one.)

  >>> paired_test(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0])).p_value
  0.25

  Args:
    a: `[n]` scores or `[n, K]` statistics of the first run.
    b: those of the second.
    metric: see `bootstrap_interval`.
    level: of the interval of the difference.
    num_resamples: of the interval and of the p-value.
    seed: of the draws.

  Returns:
    The difference b - a, its paired bootstrap interval, and the p-value.

  Raises:
    ValueError: as `bootstrap_interval`, or if the shapes differ.
  """
  a, b = _statistics("a", a), _statistics("b", b)
  if a.shape != b.shape:
    raise ValueError(
      "expected two runs on the same examples, got statistics of shapes"
      f" {a.shape} and {b.shape}; set the folders of two evaluations of one split"
    )
  _check_settings(level, num_resamples)
  values = _of_sums(metric, np.concatenate([a, b]))
  return _paired(values, len(a), level, num_resamples, seed)


def _interval(values: Values, n, level, num_resamples, seed) -> Interval:
  """Returns the interval of n examples; see `bootstrap_interval`."""
  rows = np.arange(n)
  found = _bootstrap(values, n, num_resamples, seed)
  return Interval(float(values(rows)), *_ends(found, level))


def _paired(values: Values, n, level, num_resamples, seed) -> PairedResult:
  """Returns the test of the examples from n on against those before n."""

  def difference(rows_a, rows_b):
    return values(rows_b) - values(rows_a)

  rows = np.arange(n)
  found = _bootstrap(
    lambda rows: difference(rows, rows + n), n, num_resamples, seed
  )
  swapped = scipy_stats.permutation_test(
    (rows, rows + n),
    lambda x, y, axis: _size(difference(x, y)),
    permutation_type="samples",
    vectorized=True,
    n_resamples=num_resamples,
    batch=_batch(2 * n),
    alternative="greater",
    rng=np.random.default_rng([seed, 1]),  # not the bootstrap's numbers
  )
  return PairedResult(
    float(difference(rows, rows + n)),
    *_ends(found, level),
    float(swapped.pvalue),
  )


def _bootstrap(values: Values, n, num_resamples, seed) -> np.ndarray:
  """Returns the values of the resamples, as scipy draws them."""
  return scipy_stats.bootstrap(
    (np.arange(n),),
    lambda drawn, axis: values(drawn),
    method="percentile",
    vectorized=True,
    n_resamples=num_resamples,
    batch=_batch(2 * n),
    rng=np.random.default_rng([seed, 0]),
  ).bootstrap_distribution


def _ends(found: np.ndarray, level: float) -> tuple[float, float]:
  """Returns the percentiles, of the resamples on which the metric is defined."""
  outside = 50 * (1 - level)
  low, high = np.nanpercentile(found, [outside, 100 - outside])
  return float(low), float(high)


def _of_sums(metric: Metric, stats: np.ndarray) -> Values:
  """Returns the metric of examples by the sums of their statistics `[n, K]`."""

  def values(rows):
    flat = rows.reshape(-1, rows.shape[-1])
    # How often each resample has each example.
    starts = len(stats) * np.arange(len(flat))[:, None]
    counts = np.bincount(
      (flat + starts).ravel(), minlength=len(flat) * len(stats)
    )
    counts = counts.reshape(len(flat), len(stats)).astype(np.float64)
    return metric(counts @ stats).reshape(rows.shape[:-1])

  return values


def _size(difference: np.ndarray | float) -> np.ndarray:
  # Sums in another order differ in their last digits, but are the same size.
  # Where the metric is undefined, the difference counts as large.
  return np.nan_to_num(np.round(np.abs(difference), 9), nan=np.inf)


def _batch(examples: int) -> int:
  """Resamples at a time."""
  return max(1, _BATCH_NUMBERS // examples)


def _statistics(name: str, values: np.ndarray) -> np.ndarray:
  """Returns statistics `[n, K]` float64; scores `[n]` get a second column 1."""
  values = np.asarray(values, np.float64)
  if values.ndim == 1:
    values = np.stack([values, np.ones_like(values)], axis=1)
  if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
    raise ValueError(
      f"expected {name} as finite numbers, [n] or [n, K] with n of at least 2,"
      f" got shape {values.shape}; set the examples that are compared"
    )
  return values


def _check_settings(level, num_resamples):
  if not 0 < level < 1:
    raise ValueError(f"expected a level in (0, 1), got {level}; set level")
  if num_resamples < 1:
    raise ValueError(
      f"expected at least 1 resample, got {num_resamples}; set num_resamples"
    )


class Comparison(NamedTuple):
  """A metric of two runs, A and B.

  Attributes:
    a: value of A with its bootstrap interval.
    b: that of B.
    paired: the difference B - A, its interval, and the p-value.
  """

  a: Interval
  b: Interval
  paired: PairedResult


def compare(
  folder_a: str, folder_b: str, metric: str | None = None, **options: Any
) -> dict[str, Comparison]:
  """Compares two evaluations of the same examples.

  The values are those of `gkd eval`. A metric that cannot be resampled is left
  out with a line, unless it is asked for.

  Args:
    folder_a: EVAL_OUTPUT_DIR of the first.
    folder_b: that of the second.
    metric: a name; None for all that both have.
    **options: `level`, `num_resamples` and `seed`, see `paired_test`.

  Returns:
    Metric name to comparison.

  Raises:
    ValueError: if the inputs differ, there is no such metric, or it cannot be
      resampled.
  """
  a, b = eval_folders.read(folder_a), eval_folders.read(folder_b)
  inputs_a, inputs_b = ([r["inputs"] for r in x.rows] for x in (a, b))
  if inputs_a != inputs_b:
    raise ValueError(
      "expected two evaluations of the same examples, got"
      f" {len(inputs_a):,} and {len(inputs_b):,} that are not the same inputs in"
      f" the same order in {folder_a!r} and {folder_b!r}; set EVAL_SPLIT and"
      " EVAL_NUM_EXAMPLES alike"
    )
  if metric is not None:
    for run in (a, b):
      if metric not in run.names():
        raise ValueError(
          f"expected a metric of {', '.join(sorted(run.names()))} in"
          f" {run.folder!r}, got {metric!r}; set metric"
        )
    return {metric: _compare(a, b, metric, **options)}
  results = {}
  for name in dict.fromkeys([*a.names(), *b.names()]):
    try:
      if name not in a.names() or name not in b.names():
        raise ValueError("expected a metric of both evaluations")
      results[name] = _compare(a, b, name, **options)
    except ValueError as error:
      print(f"left out: {name}: {error}", flush=True)
  return results


def _compare(
  a: eval_folders.Evaluation,
  b: eval_folders.Evaluation,
  name: str,
  level: float = 0.95,
  num_resamples: int = 10_000,
  seed: int = 0,
) -> Comparison:
  """Compares one metric by its statistics, or by its function."""
  _check_settings(level, num_resamples)
  for run in (a, b):
    if run.metrics.get(name, 0.0) is None:
      raise ValueError(f"expected a finite value, got none in {run.folder!r}")
  found = _of_statistics(a, b, name)
  if found is None:
    # Not at the top: it imports TensorFlow.
    from gkd_jax.evaluation import metric_functions

    num_resamples = min(num_resamples, _FUNCTION_RESAMPLES)
    of_both, n = metric_functions.of_evaluations(a, b, name)
    of_a, of_b = of_both, lambda rows: of_both(rows + n)
    resampled = f"examples, {num_resamples:,} calls of the metric"
  else:
    of_a, of_b, of_both, n, resampled = found
  if n < 2:
    raise ValueError(f"expected at least 2 examples, got {n}")
  settings = (n, level, num_resamples, seed)
  first = _with_value(_interval(of_a, *settings), a.metrics.get(name))
  second = _with_value(_interval(of_b, *settings), b.metrics.get(name))
  paired = _paired(of_both, *settings)
  paired = paired._replace(
    difference=second.value - first.value, resampled=resampled
  )
  return Comparison(first, second, paired)


def _with_value(interval, value):
  return interval if value is None else interval._replace(value=value)


def _of_statistics(a, b, name):
  """Returns `Values` of A, of B and of both, their number, and what they are.

  None if a run has no statistics of the metric, or they differ in form.
  """
  tables = a.statistics(name), b.statistics(name)
  if None in tables:
    return None
  (of_a, form), (of_b, form_b) = tables
  if {form, form_b} == {"mean", "ratio"}:
    form = form_b = "ratio"  # one run's denominators are all 1
  if form != form_b or of_a.shape != of_b.shape:
    return None
  resampled, metric = example_statistics.FORMS[form]
  both = [of_a, of_b]
  if a.num_samples() != b.num_samples():  # an example of each weighs alike
    both = [of_a / a.num_samples(), of_b / b.num_samples()]
  values = [_of_sums(metric, x) for x in (of_a, of_b, np.concatenate(both))]
  return *values, len(of_a), resampled


def table(results: dict[str, Comparison]) -> str:
  """Formats comparisons, a line for each metric: 95 % intervals, and p.

  There is "-" for an interval where resamples do not differ.
  """
  lines = [
    f"{'':26}{'A':>22}{'B':>22}{'B - A':>23}{'p':>8}  resampled for interval, p"
  ]
  for name, (a, b, paired) in results.items():
    cells = "".join(
      f"{v:8.2f} {_shown(lo, hi, '')}".rjust(22) for v, lo, hi in (a, b)
    )
    change = f"{paired.difference:+8.2f} {_shown(paired.low, paired.high, '+')}"
    lines.append(
      f"{name:26}{cells}{change:>23}{paired.p_value:8.4f}  {paired.resampled}"
    )
  return "\n".join(lines)


def _shown(low, high, sign):
  return f"[{low:{sign}.2f}, {high:{sign}.2f}]" if low < high else "-"
