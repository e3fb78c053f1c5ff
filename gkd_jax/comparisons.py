"""Two evaluations of one split, compared example by example."""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gkd_jax import significance
from gkd_jax.tasks import example_statistics


class Comparison(NamedTuple):
  """One metric of two runs, A and B.

  Attributes:
    a: value of A with its bootstrap interval.
    b: that of B.
    paired: the difference B - A, its interval, and the p-value.
  """

  a: significance.Interval
  b: significance.Interval
  paired: significance.PairedResult


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
  if not os.path.exists(path):
    raise ValueError(
      f"expected an evaluation with predictions.jsonl, got {folder!r}; set"
      " the EVAL_OUTPUT_DIR of `gkd eval`"
    )
  with open(path, encoding="utf-8") as lines:
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
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


def interval(folder: str, metric: str, **options: Any) -> significance.Interval:
  """A metric of one evaluation, with its bootstrap interval over examples.

  Args:
    folder: EVAL_OUTPUT_DIR.
    metric: a name in its `predictions.jsonl`.
    **options: of `significance.bootstrap_interval`.

  Raises:
    ValueError: no such metric.
  """
  stats = _of_metric(read_statistics(folder)[1], metric, folder)
  return significance.bootstrap_interval(
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
    **options: of `significance.paired_test`; the intervals of the two values
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
      significance.bootstrap_interval(a, metric=combine, **of_interval),
      significance.bootstrap_interval(b, metric=combine, **of_interval),
      significance.paired_test(a, b, metric=combine, **options),
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
