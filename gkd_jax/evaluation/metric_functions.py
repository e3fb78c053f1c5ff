"""A task's metric function on resampled examples of two evaluations.

For metrics without statistics of examples: neither means nor functions of sums,
such as a correlation. The function gets what `gkd eval` wrote, which has to give
the value that `gkd eval` got.
"""

from collections.abc import Callable, Mapping

import numpy as np
import seqio

from gkd_jax import data
from gkd_jax.evaluation import eval_folders, metric_values
from gkd_jax.tasks import example_statistics

# Share of resamples on which a metric may be undefined.
_MAX_UNDEFINED = 0.1


def of_evaluations(
  a: eval_folders.Evaluation, b: eval_folders.Evaluation, name: str
) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
  """Returns a metric as a function of resampled examples.

  Args:
    a: an evaluation.
    b: another one of the same examples.
    name: of the metric.

  Returns:
    A function of numbers of examples `[..., n]` to values `[...]`, and n: the
    examples of a are 0 to n - 1, those of b are n to 2 n - 1. A value is NaN
    where the metric is undefined.

  Raises:
    ValueError: if the function is not found, or gives another value.
  """
  task, key = _task_of(a.about, name)
  whole, places = [], []
  start = 0
  for run in (a, b):
    rows = [r for r in run.rows if r["task"] == task.name]
    samples = run.num_samples()
    function, arguments = _call(task, key, rows, samples, run.metrics[name])
    whole.append(arguments)
    size = samples * len(rows)
    # Example i's samples, which stand one block after another.
    places.append(
      start + np.arange(size).reshape(samples, len(rows)).transpose()
    )
    start += size
  arguments = [_joined(*pair) for pair in zip(*whole, strict=True)]
  counts = [len(place) for place in places]
  known: dict[bytes, float] = {}

  def value(row):
    where = np.concatenate(
      [
        places[0][row[row < counts[0]]].ravel(),
        places[1][row[row >= counts[0]] - counts[0]].ravel(),
      ]
    )
    at = where.tobytes()
    if at not in known:
      known[at] = _number(function, key, arguments, where.tolist())
    return known[at]

  def values(rows):
    flat = rows.reshape(-1, rows.shape[-1])
    found = np.array([value(row) for row in flat])
    undefined = np.mean(np.isnan(found))
    if undefined > _MAX_UNDEFINED:
      raise ValueError(
        "expected a metric that is defined on resampled examples, got no number"
        f" on {undefined:.0%} of them"
      )
    return found.reshape(rows.shape[:-1])

  return values, counts[0]


def _task_of(about, name):
  """Returns the task of a metric, and the metric's name there."""
  if not about:
    raise ValueError(
      "expected the task of the evaluation, got no evaluation.json;"
      " run `gkd eval` again"
    )
  task = data.load_task(
    about["mixture_or_task_name"], about["mixture_or_task_module"]
  )
  tasks = seqio.get_subtasks(task)
  if len(tasks) == 1:
    return tasks[0], name
  # The longest name: that of one task may begin with that of another.
  found = max(
    (t for t in tasks if name.startswith(f"{t.name}/")),
    key=lambda t: len(t.name),
  )
  return found, name.removeprefix(f"{found.name}/")


def _call(task, key, rows, samples, expected):
  """Returns the function that computes a metric, and its arguments."""
  outputs = [r.get("samples", [r["prediction"]]) for r in rows]
  targets = [r["target"] for r in rows]
  result = metric_values.Predictions(
    inputs=[],
    outputs=[],
    scores=[r["score"] for r in rows],
    targets=targets * samples,
    predictions=[texts[s] for s in range(samples) for texts in outputs],
    target_scores=[r["target_score"] for r in rows if "target_score" in r],
  )
  calls = metric_values.calls(task, result)
  if samples > 1:  # of which one score is written
    calls = calls[: len(task.predict_metric_fns)]
  everything = range(len(result.targets))
  for function, arguments in calls:
    found = _number(function, key, arguments, everything)
    if np.isclose(found, expected, rtol=1e-6):
      return function, arguments
  raise ValueError(
    f"expected a metric function that gives {expected:.6g} for"
    " predictions.jsonl, got none; run `gkd eval` again, with a metric that"
    " reads texts and numbers"
  )


def _number(function, key, arguments, rows) -> float:
  """Returns the value for some examples, NaN if it is undefined."""
  try:
    values = function(*example_statistics.pick(arguments, rows))
    number = example_statistics.number(values[key])
  except Exception:
    number = None
  return np.nan if number is None else number


def _joined(first, second):
  """Returns one argument for the examples of both runs."""
  if isinstance(first, Mapping):
    return {k: [*v, *second[k]] for k, v in first.items()}
  return [*first, *second]
