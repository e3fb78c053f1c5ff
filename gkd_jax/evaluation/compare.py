"""Intervals of a metric, and tests of a difference between two runs.

All resample examples. What an example brings along is its row of statistics,
which add up over examples, and the metric is a function of their sums: exact for
corpus metrics such as error rates (errors and symbols) or BLEU (n-gram counts),
whose value is not a mean over examples. A mean is the case of a score and a 1.

Sources: percentile bootstrap (Efron 1979) and paired bootstrap (Koehn 2004);
paired approximate randomisation (Riezler and Maxwell 2005), as in sacrebleu.

Two evaluations of one split, compared example by example.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gkd_jax import files
from gkd_jax.tasks import example_statistics

Metric = Callable[[np.ndarray], np.ndarray]
"""Sums of statistics `[R, K]` to values `[R]`."""
# Numbers that are resampled at a time, which bounds the memory.
_CHUNK = 4_000_000


class Interval(NamedTuple):
  """A value and the ends of its confidence interval, in the metric's unit."""

  value: float
  low: float
  high: float


class PairedResult(NamedTuple):
  """How two runs differ on the same examples.

  Attributes:
    difference: metric of the second run minus that of the first.
    low: lower end of its paired bootstrap interval.
    high: upper end.
    p_value: two-sided, of the hypothesis that the runs do not differ.
  """

  difference: float
  low: float
  high: float
  p_value: float


def ratio(sums: np.ndarray) -> np.ndarray:
  """Sum of the first statistic over that of the second, `[R, 2]` to `[R]`."""
  return sums[:, 0] / sums[:, 1]


def bootstrap_interval(
  scores: np.ndarray,
  *,
  metric: Metric = ratio,
  level: float = 0.95,
  num_resamples: int = 10_000,
  seed: int = 0,
) -> Interval:
  """The percentile bootstrap interval of a metric over examples.

  >>> bootstrap_interval(np.array([2.0, 2.0, 2.0]))
  Interval(value=2.0, low=2.0, high=2.0)

  Args:
    scores: `[n]` one score for each example, whose mean is the metric; or
      statistics `[n, K]`, such as errors and symbols of an error rate.
    metric: of the sums of statistics; see `Metric`.
    level: of confidence, in (0, 1).
    num_resamples: drawn with replacement, n examples each.
    seed: of the draws.

  Returns:
    The metric of all examples, and quantiles of the resamples' metrics.

  Raises:
    ValueError: no examples, another shape, a number that is not finite, or a
      setting out of its range.
  """
  stats = _statistics("scores", scores)
  _check_settings(level, num_resamples)
  values = [
    metric(sums[0]) for sums in _resampled([stats], num_resamples, seed)
  ]
  low, high = _quantiles(np.concatenate(values), level)
  return Interval(float(metric(stats.sum(0)[None])[0]), low, high)


def paired_test(
  a: np.ndarray,
  b: np.ndarray,
  *,
  metric: Metric = ratio,
  method: str = "randomization",
  level: float = 0.95,
  num_resamples: int = 10_000,
  seed: int = 0,
) -> PairedResult:
  """Tests whether two runs differ, on the same examples in the same order.

  "randomization" swaps the two runs' statistics example by example, each with
  probability 1/2; p is the share of swaps whose difference is at least as large
  as the one seen. All 2^n swaps are counted where they are no more than
  `num_resamples`, as with a few seeds; else p is (c + 1) / (R + 1) of R random
  ones. "bootstrap" takes the share of resamples whose difference is as far from
  the one seen as that is from 0, likewise with (c + 1) / (R + 1).

  A difference equal to the one seen counts. sacrebleu's p leaves those out, and
  is one-sided for the bootstrap: about half of this one.

  >>> paired_test(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0])).p_value
  0.25

  Args:
    a: `[n]` scores or `[n, K]` statistics of the first run.
    b: those of the second.
    metric: see `bootstrap_interval`.
    method: "randomization" or "bootstrap", of the p-value.
    level: of the interval of the difference.
    num_resamples: of the interval and of the p-value.
    seed: of the draws.

  Returns:
    The difference b - a, its paired bootstrap interval, and the p-value.

  Raises:
    ValueError: as `bootstrap_interval`, or runs of different shapes.
  """
  a, b = _statistics("a", a), _statistics("b", b)
  if a.shape != b.shape:
    raise ValueError(
      "expected two runs on the same examples, got statistics of shapes"
      f" {a.shape} and {b.shape}; set the folders of two evaluations of one split"
    )
  if method not in ("randomization", "bootstrap"):
    raise ValueError(
      "expected a method 'randomization' or 'bootstrap', got"
      f" {method!r}; set method"
    )
  _check_settings(level, num_resamples)
  seen = float((metric(b.sum(0)[None]) - metric(a.sum(0)[None]))[0])
  differences = np.concatenate(
    [
      metric(of_b) - metric(of_a)
      for of_a, of_b in _resampled([a, b], num_resamples, seed)
    ]
  )
  low, high = _quantiles(differences, level)
  # Sums of other orders differ in their last digits.
  least = abs(seen) * (1 - 1e-9)
  if method == "bootstrap":
    count = int(np.sum(np.abs(differences - seen) >= least))
    p_value = (count + 1) / (num_resamples + 1)
  else:
    p_value = _randomization(a, b, metric, least, num_resamples, seed)
  return PairedResult(seen, low, high, p_value)


def _randomization(a, b, metric, least, num_resamples, seed) -> float:
  """Share of swaps with a difference of at least `least`."""
  number = len(a)
  exact = 2**number <= num_resamples
  total = 2**number if exact else num_resamples
  # Another stream than that of the resamples.
  rng = np.random.default_rng([seed, 1])
  count = 0
  for start, size in _chunks(total, number):
    if exact:
      codes = np.arange(start, start + size)[:, None]
      swaps = (codes >> np.arange(number)[None] & 1).astype(np.float64)
    else:
      swaps = rng.integers(2, size=(size, number)).astype(np.float64)
    moved = swaps @ (b - a)
    difference = metric(b.sum(0) - moved) - metric(a.sum(0) + moved)
    count += int(np.sum(np.abs(difference) >= least))
  return count / total if exact else (count + 1) / (total + 1)


def _resampled(
  runs: list[np.ndarray], num_resamples: int, seed: int
) -> Iterator[list[np.ndarray]]:
  """Sums `[R, K]` of each run over the same resampled examples, in parts."""
  rng = np.random.default_rng([seed, 0])
  number = len(runs[0])
  for _, size in _chunks(num_resamples, number):
    chosen = rng.integers(number, size=(size, number))
    # How often each example is drawn: sums are then products of matrices.
    flat = (chosen + number * np.arange(size)[:, None]).ravel()
    counts = np.bincount(flat, minlength=size * number).reshape(size, number)
    yield [counts.astype(np.float64) @ run for run in runs]


def _chunks(total: int, number: int) -> Iterator[tuple[int, int]]:
  """(start, size) of parts of `total` rows of `number` entries."""
  step = max(1, _CHUNK // number)
  for start in range(0, total, step):
    yield start, min(step, total - start)


def _quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
  low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def _statistics(name: str, values: np.ndarray) -> np.ndarray:
  """Statistics `[n, K]` float64; a score becomes a score and a 1."""
  values = np.asarray(values, np.float64)
  if values.ndim == 1:
    values = np.stack([values, np.ones_like(values)], axis=1)
  if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
    raise ValueError(
      f"expected {name} as finite numbers, [n] or [n, K] with n of at least 1,"
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
  """One metric of two runs, A and B.

  Attributes:
    a: value of A with its bootstrap interval.
    b: that of B.
    paired: the difference B - A, its interval, and the p-value.
  """

  a: Interval
  b: Interval
  paired: PairedResult


def read_statistics(folder: str) -> tuple[list[str], dict[str, np.ndarray]]:
  """What each example adds to each metric, as `gkd eval` wrote it.

  Args:
    folder: EVAL_OUTPUT_DIR of an evaluation.

  Returns:
    The inputs, and metric name to statistics `[n, K]` of the n examples; see
    `example_statistics`. Of a mixture, a metric's examples are its task's.

  Raises:
    ValueError: there is no `predictions.jsonl` with statistics.
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


def interval(folder: str, metric: str, **options: Any) -> Interval:
  """A metric of one evaluation, with its bootstrap interval over examples.

  Args:
    folder: EVAL_OUTPUT_DIR.
    metric: a name in its `predictions.jsonl`.
    **options: of `bootstrap_interval`.

  Raises:
    ValueError: no such metric.
  """
  stats = _of_metric(read_statistics(folder)[1], metric, folder)
  return bootstrap_interval(
    stats, metric=example_statistics.metric_of(stats), **options
  )


def compare(
  folder_a: str, folder_b: str, metric: str | None = None, **options: Any
) -> dict[str, Comparison]:
  """Compares two evaluations of the same examples.

  Args:
    folder_a: EVAL_OUTPUT_DIR of the first.
    folder_b: that of the second.
    metric: a name; None for all that both have.
    **options: of `paired_test`; the intervals of the two values
      have their `level`, `num_resamples` and `seed`.

  Returns:
    Metric name to comparison.

  Raises:
    ValueError: other inputs, or no such metric.
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
  of_interval = {k: v for k, v in options.items() if k != "method"}
  results = {}
  for name in names:
    a = _of_metric(tables_a, name, folder_a)
    b = _of_metric(tables_b, name, folder_b)
    combine = example_statistics.metric_of(a)
    results[name] = Comparison(
      bootstrap_interval(a, metric=combine, **of_interval),
      bootstrap_interval(b, metric=combine, **of_interval),
      paired_test(a, b, metric=combine, **options),
    )
  return results


def report(folders: Sequence[str]) -> str:
  """What `gkd compare A B` prints.

  Raises:
    ValueError: not two folders, or as `compare`.
  """
  if len(folders) != 2:
    raise ValueError(
      f"expected two folders of evaluations, got {len(folders)};"
      " run `gkd compare A B`"
    )
  return table(compare(*folders))


def table(results: dict[str, Comparison]) -> str:
  """Comparisons as text, a line for each metric: 95 % intervals, and p."""
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
