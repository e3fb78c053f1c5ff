"""The evaluations of a training run; one that fails costs no step."""

import json
import os
import traceback
from typing import Any

from gkd_jax import partitioning
from gkd_jax.checkpoints import parameters
from gkd_jax.evaluation import compare, evaluate, metric_values


class RunEvaluations:
  """Evaluations of a run's student.

  The metrics are tried on two references of each task, so that what is wrong with
  them is known before the first step.

  Args:
    model: see `train.train`.
    teacher_params: the teacher's parameters.
    task: from `data.load_task`.
    dataset: `training.DatasetConfig`.
    settings: `training.EvalConfig`.
    mesh: see `partitioning.make_mesh`.
    best_metric: metric that an evaluation must have, or None.

  Attributes:
    warnings: a line for each metric without a value on the references.
    failed: evaluations that failed so far.

  Raises:
    ValueError: two metrics have one name, or none has that of `best_metric`.
  """

  def __init__(
    self,
    model: Any,
    teacher_params: Any,
    *,
    task: Any,
    dataset: Any,
    settings: Any,
    mesh: Any,
    best_metric: str | None = None,
  ):
    self._model, self._teacher_params = model, teacher_params
    self._settings = settings
    self._make = lambda **kwargs: evaluate.Evaluator(
      task,
      dataset.task_feature_lengths,
      settings.batch_size,
      mesh,
      converter=model.student.FEATURE_CONVERTER_CLS,
      special_tokens=model.student.special_tokens,
      use_cached=dataset.use_cached,
      **kwargs,
    )
    self._periodic = None
    if settings.split is not None:
      periodic = self._make(
        split=settings.split, num_examples=settings.num_examples
      )
      # Of a split without an example, the evaluator has said so.
      self._periodic = periodic if periodic.num_examples else None
    self._best_metric = best_metric
    self.warnings: list[str] = []
    self.failed = 0
    self._said: set[str] = set()  # metrics that are left out
    self._metrics: list[str] = []
    if self._periodic is not None:
      values = self._periodic.try_metrics()
      metric_values.check_best_metric(best_metric, values)
      self.warnings = [f"on two references, {x}" for x in values.problems()]
      self._said |= {*values.left_out}
      self._metrics = [*values.numbers]

  def table(self) -> list[tuple[str, str]]:
    """Returns what is evaluated, as `training.preflight.table`."""
    if self._periodic is None:
      return []
    number, split = self._periodic.num_examples, self._settings.split
    by = f"by {', '.join(self._metrics)}" if self._metrics else "without scores"
    return [("evaluation", f"{number:,} examples of {split!r}, {by}")]

  def at(self, step: int, params: Any, log: Any) -> dict[str, float]:
    """Returns the scores of the student's greedy outputs, {} if there are none.

    Logs the scores and five outputs. An error, of the evaluation or of one of
    its metrics, is logged and counted.

    Args:
      step: steps done.
      params: the student's.
      log: `training.TrainLog`.

    Raises:
      Exception: whatever fails, with `EVAL_ERRORS_STOP`.
    """
    if self._periodic is None:
      return {}
    scores: dict[str, float] = {}
    try:
      decoded = self._decode(self._periodic, params)
      errors = self._evaluate(self._periodic, decoded, step, log, scores)
    except Exception as error:
      errors = [error]
    words = "; ".join(map(_in_words, errors))
    failed, scores = _agreed(words, scores)
    if errors and os.environ.get("GKD_TRACEBACK"):
      traceback.print_exception(errors[0])
    if failed:
      if self._settings.errors_stop:
        raise errors[0] if errors else RuntimeError(failed)
      self.failed += 1
      log.failed_evaluation(step, failed, self.failed)
    return scores

  def final(self, params: Any, seed: int, log: Any) -> None:
    """Scores all of `final_split`, greedy and sampled at temperature 1.

    With the scores go their 95 % bootstrap intervals over the examples.

    Args:
      params: the student's.
      seed: of sampling.
      log: `training.TrainLog`.
    """
    split = self._settings.final_split
    if not split:
      return
    evaluator = self._make(split=split)
    result: dict[str, Any] = {
      "params": parameters.count_array_elements(params),
      "split": split,
    }
    student = self._model.student.with_decode_fn()
    # All programs first: an error of a metric keeps no other process waiting.
    decoded = {
      name: evaluator.decode(
        student,
        params,
        seed=seed,
        decoder_params={"temperature": temperature},
      )
      for name, temperature in (("greedy", 0.0), ("sampled", 1.0))
    }
    intervals: dict[str, list[float] | None] = {}
    for name, outputs in decoded.items():
      results = evaluator.predictions(student, outputs)
      result[name] = evaluator.score(results)
      statistics = evaluator.example_statistics(results)
      found = compare.intervals(statistics, result[name])
      intervals |= {f"{name}/{metric}": ends for metric, ends in found.items()}
    log.final(result | {"intervals": intervals})

  def _decode(self, evaluator, params):
    """Returns the student's outputs and the teacher's first, {} without one."""
    model = self._model
    student = evaluator.decode(model.student, params)
    if model.teacher is None:
      return student, {}
    return student, evaluator.decode(
      model.teacher, self._teacher_params, limit=5
    )

  def _evaluate(self, evaluator, decoded, step, log, scores):
    """Fills in the scores, and returns the errors of metrics without values."""
    model = self._model
    results = evaluator.predictions(model.student, decoded[0])
    values = evaluator.values(results)
    scores |= values.numbers
    teacher = evaluator.predictions(model.teacher, decoded[1])
    examples = []
    for name, result in results.items():
      for i in range(min(5, len(result.inputs))):
        examples.append(
          {
            "input": result.inputs[i],
            "reference": result.targets[i],
            "teacher": teacher[name].predictions[i] if teacher else None,
            "student": result.predictions[i],
          }
        )
    log.evaluation(step, scores, examples, values.texts)
    for name, reason in values.left_out.items():
      if name not in self._said:  # once in a run
        log.say(f"left out: {name}: {reason}")
      self._said.add(name)
    metric_values.check_best_metric(self._best_metric, values)
    return [*values.failed.values()]


def _agreed(words, scores):
  """Returns what failed in any process, and the scores of the first one.

  Whether a checkpoint is the best, and is saved, has to be the same in all.
  """
  said = partitioning.of_processes(json.dumps([words, scores]))
  found = [json.loads(text) for text in said]
  reasons: dict[str, list[int]] = {}
  for index, (reason, _) in enumerate(found):
    reasons.setdefault(reason, []).append(index)
  if len(reasons) > 1:
    named = [
      f"process {', '.join(map(str, indices))}: {reason}"
      for reason, indices in reasons.items()
      if reason
    ]
    return "; ".join(named), found[0][1]
  return words, found[0][1]


def _in_words(error: Exception) -> str:
  """Returns an error in one line, with the place that raised it."""
  place = traceback.extract_tb(error.__traceback__)[-1]
  text = " ".join(str(error).split())[:300]
  name = os.path.basename(place.filename)
  return f"{type(error).__name__}: {text} ({name}:{place.lineno})"
