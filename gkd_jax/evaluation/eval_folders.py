"""Reads what `gkd eval` wrote."""

import os
from typing import Any, NamedTuple

import numpy as np

from gkd_jax import files
from gkd_jax.tasks import example_statistics


class Evaluation(NamedTuple):
  """What `gkd eval` wrote into its EVAL_OUTPUT_DIR.

  Attributes:
    folder: the EVAL_OUTPUT_DIR.
    rows: of predictions.jsonl.
    metrics: metric name to value.
    about: of evaluation.json.
  """

  folder: str
  rows: list[dict[str, Any]]
  metrics: dict[str, float | None]
  about: dict[str, Any]

  def names(self) -> list[str]:
    """Returns the names of the task's metrics."""
    of_rows = dict.fromkeys(k for row in self.rows for k in row["statistics"])
    return list(self.about.get("metrics", of_rows))

  def num_samples(self) -> int:
    """Returns the number of samples of each example."""
    return len(self.rows[0].get("samples", [None]))

  def statistics(self, name: str) -> tuple[np.ndarray, str] | None:
    """Returns a metric's statistics `[n, K]` and their form, or None.

    There are none if their sums do not give the metric's value.
    """
    found = [
      r["statistics"][name] for r in self.rows if name in r["statistics"]
    ]
    if not found:
      return None
    stats, form = example_statistics.table(found)
    # Means over samples: their sums are those that the metric was computed of.
    stats *= self.num_samples()
    metric = example_statistics.FORMS[form][1]
    value = self.metrics.get(name)
    of_sums = metric(stats.sum(0)[None])[0]
    if value is not None and not np.isclose(of_sums, value, rtol=1e-6):
      return None
    return stats, form


def read(folder: str) -> Evaluation:
  """Reads an evaluation.

  Args:
    folder: EVAL_OUTPUT_DIR of an evaluation.

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
  metrics, about = (
    files.read_json(os.path.join(folder, name)) or {}
    for name in ("metrics.json", "evaluation.json")
  )
  return Evaluation(folder, rows, metrics, about)
