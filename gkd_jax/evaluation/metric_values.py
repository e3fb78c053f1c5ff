"""The values of a task's metrics: numbers, texts, and what has no value.

A metric is a user's function. One that raises, or returns what is no number,
costs its own value and nothing else.
"""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gkd_jax.tasks import example_statistics

_NO_REFERENCES = "expected references, got prompts alone"


class Predictions(NamedTuple):
  """Examples and outputs of one task, in the order of the split.

  Attributes:
    inputs: decoded inputs.
    outputs: decoded outputs.
    scores: log-prob of each output in nats, summed over tokens.
    targets: targets for the metrics; None for prompts without targets.
    predictions: postprocessed outputs, the predictions for the metrics.
    target_scores: log-prob of each target in nats, summed over tokens; empty
      unless a metric of the task needs it.
    ended: whether each output has EOS, or was cut.
  """

  inputs: list[str]
  outputs: list[str]
  scores: list[float]
  targets: list[Any]
  predictions: list[Any]
  target_scores: list[float]
  ended: Sequence[bool] = ()


class MetricValues(NamedTuple):
  """What the metrics of a task, or of the tasks of a mixture, return.

  Attributes:
    numbers: metric name to value.
    texts: name to text, such as `seqio.metrics.Text`.
    left_out: name to the reason why its value is neither.
    failed: name of a metric function to the error that it raised.
  """

  numbers: dict[str, float]
  texts: dict[str, str]
  left_out: dict[str, str]
  failed: dict[str, Exception]

  def joined(self, other: "MetricValues", prefix: str) -> "MetricValues":
    """Returns these and another task's values, with a prefix before its names."""
    return MetricValues(
      *(
        mine | {prefix + name: value for name, value in theirs.items()}
        for mine, theirs in zip(self, other, strict=True)
      )
    )

  def problems(self) -> list[str]:
    """Returns a line for each value or function that is left out."""
    reasons = self.left_out | {
      name: f"{type(error).__name__}: {' '.join(str(error).split())}"
      for name, error in self.failed.items()
    }
    return [f"left out: {name}: {reason}" for name, reason in reasons.items()]


def calls(
  task: Any, result: Predictions
) -> list[tuple[Callable[..., Any], example_statistics.Arguments]]:
  """Returns each metric function of a task with its arguments.

  Args:
    task: a seqio task.
    result: its predictions.
  """
  targets, predictions = result.targets, result.predictions
  scores = {"scores": result.scores}
  return [
    *((f, (targets, predictions)) for f in task.predict_metric_fns),
    *((f, (targets, result.target_scores)) for f in task.score_metric_fns),
    *(
      (f, (targets, predictions, scores))
      for f in task.predict_with_aux_metric_fns
    ),
  ]


def of_task(task: Any, result: Predictions) -> MetricValues:
  """Computes a task's metrics.

  On prompts alone, those that need a reference are left out.

  Args:
    task: a seqio task.
    result: its predictions.

  Raises:
    ValueError: if two metric functions return a value of the same name.
  """
  found = MetricValues({}, {}, {}, {})
  sources: dict[str, str] = {}
  alone = all(target is None for target in result.targets)
  for function, arguments in calls(task, result):
    name = function_name(function)
    if alone and function in task.score_metric_fns:
      found.left_out[name] = _NO_REFERENCES
      continue
    try:
      values = function(*arguments)
      if not isinstance(values, Mapping):
        raise TypeError(f"expected a dictionary of values, got {_kind(values)}")
    except Exception as error:
      if alone:
        reason = f" ({type(error).__name__}: {error})"
        found.left_out[name] = _NO_REFERENCES + reason
      else:
        found.failed[name] = error
      continue
    for key, value in values.items():
      if key in sources:
        raise ValueError(
          f"expected metrics of different names of {task.name}, got {key!r}"
          f" from {sources[key]} and from {name}; set metric_fns where the"
          " task is registered"
        )
      sources[key] = name
      number = example_statistics.number(value)
      text = _text(value)
      if number is not None:
        found.numbers[key] = number
      elif text is not None:
        found.texts[key] = text
      else:
        found.left_out[key] = f"expected a number, got {_kind(value)}"
  return found


def check_best_metric(name: str | None, values: MetricValues) -> None:
  """Refuses a BEST_METRIC that the metrics do not return.

  Args:
    name: of the metric; None is no metric.
    values: of an evaluation, such as `Evaluator.try_metrics`.

  Raises:
    ValueError: if all functions returned and none of the values is a number of
      this name. A function that raised may have it on other examples.
  """
  if name is None or name in values.numbers or values.failed:
    return
  known = list(values.numbers)
  near = difflib.get_close_matches(name, known) or sorted(known)
  raise ValueError(
    f"expected a metric of {', '.join(near) or 'the task, which has none'},"
    f" got {name!r}; set BEST_METRIC"
  )


def function_name(function: Callable) -> str:
  """Returns what to call a metric function in a message."""
  while isinstance(function, functools.partial):
    function = function.func
  return getattr(function, "__name__", type(function).__name__)


def _text(value: Any) -> str | None:
  text = getattr(value, "textdata", value)  # seqio.metrics.Text
  if isinstance(text, bytes):
    return text.decode(errors="replace")
  return text if isinstance(text, str) else None


def _kind(value: Any) -> str:
  return "None" if value is None else f"a {type(value).__name__}"
