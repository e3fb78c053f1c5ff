"""Confidence intervals of a metric, and paired tests between two evaluations.

Both resample examples with `scipy.stats`. Each example has a row of statistics,
and the metric is a function of their sums over examples. That is exact for
corpus metrics such as error rates (errors and symbols) or BLEU (n-gram counts),
which are not means over examples. A mean has a score and a 1 as statistics.

Sources: percentile bootstrap (Efron 1979; Koehn 2004 for pairs) and paired
approximate randomisation (Riezler and Maxwell 2005), as in sacrebleu.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as scipy_stats

from gkd_jax import files
from gkd_jax.tasks import example_statistics

Metric = Callable[[np.ndarray], np.ndarray]
"""Sums of statistics `[R, K]` to values `[R]`."""
# Statistics gathered at a time, which bounds the memory.
_BATCH_NUMBERS = 4_000_000


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
  """

  difference: float
  low: float
  high: float
  p_value: float


def ratio(sums: np.ndarray) -> np.ndarray:
  """Returns the first sum over the second, `[R, 2]` to `[R]`."""
  return sums[:, 0] / sums[:, 1]


def bootstrap_interval(
  scores: np.ndarray,
  *,
  metric: Metric = ratio,
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
  value, found = _bootstrap(
    lambda rows: _of_rows(metric, stats, rows),
    stats,
    level,
    num_resamples,
    seed,
  )
  return Interval(value, *map(float, found.confidence_interval))


def paired_test(
  a: np.ndarray,
  b: np.ndarray,
  *,
  metric: Metric = ratio,
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
  both = np.concatenate([a, b])

  def difference(rows_a, rows_b):
    return _of_rows(metric, both, rows_b) - _of_rows(metric, both, rows_a)

  seen, found = _bootstrap(
    lambda rows: difference(rows, rows + len(a)), a, level, num_resamples, seed
  )
  swapped = scipy_stats.permutation_test(
    (np.arange(len(a)), np.arange(len(a), 2 * len(a))),
    lambda x, y, axis: _size(difference(x, y)),
    permutation_type="samples",
    vectorized=True,
    n_resamples=num_resamples,
    batch=_batch(both),
    alternative="greater",
    rng=np.random.default_rng([seed, 1]),  # not the bootstrap's numbers
  )
  low, high = found.confidence_interval
  return PairedResult(seen, float(low), float(high), float(swapped.pvalue))


def _bootstrap(
  value_of: Callable[[np.ndarray], np.ndarray],
  stats: np.ndarray,
  level: float,
  num_resamples: int,
  seed: int,
) -> tuple[float, Any]:
  """Returns the value of all examples, and scipy's percentile bootstrap.

  Args:
    value_of: from numbers of examples `[..., n]` to values `[...]`.
    stats: `[n, K]`.
    level: of confidence.
    num_resamples: see `bootstrap_interval`.
    seed: of the draws.
  """
  rows = np.arange(len(stats))
  found = scipy_stats.bootstrap(
    (rows,),
    lambda drawn, axis: value_of(drawn),
    method="percentile",
    vectorized=True,
    confidence_level=level,
    n_resamples=num_resamples,
    batch=_batch(stats),
    rng=np.random.default_rng([seed, 0]),
  )
  return float(value_of(rows)), found


def _of_rows(metric: Metric, stats: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Returns the metric `[...]` of the examples `rows`, `[..., n]`."""
  sums = stats[rows].sum(axis=-2)
  return metric(sums.reshape(-1, sums.shape[-1])).reshape(sums.shape[:-1])


def _size(difference: np.ndarray | float) -> np.ndarray:
  # Sums in another order differ in their last digits, but are the same size.
  return np.round(np.abs(difference), 9)


def _batch(stats: np.ndarray) -> int:
  """Resamples at a time."""
  return max(1, _BATCH_NUMBERS // stats.size)


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


def read_statistics(folder: str) -> tuple[list[str], dict[str, np.ndarray]]:
  """Reads the statistics of each example that `gkd eval` wrote.

  Args:
    folder: EVAL_OUTPUT_DIR of an evaluation.

  Returns:
    The inputs, and metric name to statistics `[n, K]` of n examples; see
    `example_statistics`. In a mixture these are the examples of the metric's
    task.

  Raises:
    ValueError: if there is no `predictions.jsonl` with statistics.
  """
  path = os.path.join(folder, "predictions.jsonl")
  if not files.absolute(path).exists():
    raise ValueError(
      f"expected an evaluation with predictions.jsonl, got {folder!r}; set"
      " the EVAL_OUTPUT_DIR of `gkd eval`"
    )
  rows: list[dict[str, Any]] = files.read_json_lines(path)
  if not rows or any("statistics" not in row for row in rows):
    raise ValueError(
      f"expected statistics of every example in {path!r}, got lines without;"
      " run `gkd eval` again"
    )
  names = dict.fromkeys(name for row in rows for name in row["statistics"])
  tables = {
    name: np.array(
      [r["statistics"][name] for r in rows if name in r["statistics"]],
      np.float64,
    )
    for name in names
  }
  return [row["inputs"] for row in rows], tables


def compare(
  folder_a: str, folder_b: str, metric: str | None = None, **options: Any
) -> dict[str, Comparison]:
  """Compares two evaluations of the same examples.

  Args:
    folder_a: EVAL_OUTPUT_DIR of the first.
    folder_b: that of the second.
    metric: a name; None for all that both have.
    **options: `level`, `num_resamples` and `seed`, see `paired_test`.

  Returns:
    Metric name to comparison.

  Raises:
    ValueError: if the inputs differ, or there is no such metric.
  """
  inputs_a, tables_a = read_statistics(folder_a)
  inputs_b, tables_b = read_statistics(folder_b)
  if inputs_a != inputs_b:
    raise ValueError(
      "expected two evaluations of the same examples, got"
      f" {len(inputs_a):,} and {len(inputs_b):,} that are not the same inputs in"
      f" the same order in {folder_a!r} and {folder_b!r}; set EVAL_SPLIT and"
      " EVAL_NUM_EXAMPLES alike"
    )
  names = [metric] if metric else [n for n in tables_a if n in tables_b]
  results = {}
  for name in names:
    a = _of_metric(tables_a, name, folder_a)
    b = _of_metric(tables_b, name, folder_b)
    combine = example_statistics.metric_of(a)
    results[name] = Comparison(
      bootstrap_interval(a, metric=combine, **options),
      bootstrap_interval(b, metric=combine, **options),
      paired_test(a, b, metric=combine, **options),
    )
  return results


def report(folders: Sequence[str]) -> str:
  """Returns what `gkd compare A B` prints.

  Raises:
    ValueError: if there are not two folders, or as `compare`.
  """
  if len(folders) != 2:
    raise ValueError(
      f"expected two folders of evaluations, got {len(folders)};"
      " run `gkd compare A B`"
    )
  return table(compare(*folders))


def table(results: dict[str, Comparison]) -> str:
  """Formats comparisons, a line for each metric: 95 % intervals, and p."""
  lines = [f"{'':26}{'A':>22}{'B':>22}{'B - A':>23}{'p':>8}"]
  for name, (a, b, paired) in results.items():
    cells = "".join(
      f"{v:8.2f} [{lo:.2f}, {hi:.2f}]".rjust(22) for v, lo, hi in (a, b)
    )
    change = (
      f"{paired.difference:+8.2f} [{paired.low:+.2f}, {paired.high:+.2f}]"
    )
    lines.append(f"{name:26}{cells}{change:>23}{paired.p_value:8.4f}")
  return "\n".join(lines)


def _of_metric(tables, name, folder):
  if name not in tables:
    raise ValueError(
      f"expected a metric of {', '.join(sorted(tables))} in {folder!r}, got"
      f" {name!r}; set metric"
    )
  return tables[name]
