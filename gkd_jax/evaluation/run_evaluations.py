"""The evaluations of a training run; one that fails costs no step."""

import os
import traceback
from collections.abc import Mapping
from typing import Any

from gkd_jax.checkpoints import parameters
from gkd_jax.evaluation import evaluate


class RunEvaluations:
  """Evaluations of a run's student, with the run's log.

  Args:
    model: see `train.train`.
    teacher_params: the teacher's parameters.
    log: `training.TrainLog`.
    task: from `data.load_task`.
    dataset: `training.DatasetConfig`.
    settings: `training.EvalConfig`.
    mesh: see `partitioning.make_mesh`.
    best_metric: metric that an evaluation must have, or None.
  """

  def __init__(
    self,
    model: Any,
    teacher_params: Any,
    log: Any,
    *,
    task: Any,
    dataset: Any,
    settings: Any,
    mesh: Any,
    best_metric: str | None = None,
  ):
    self._model, self._teacher_params = model, teacher_params
    self._log, self._settings = log, settings
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
    self._periodic = self._make(num_examples=settings.num_examples)
    self._best_metric = best_metric
    self.failed = 0

  def at(self, step: int, params: Any) -> dict[str, float]:
    """Returns the scores of the student's greedy outputs, {} if that fails.

    Logs the scores and five outputs, or the error and how many there were.

    Args:
      step: steps done.
      params: the student's.

    Raises:
      Exception: whatever fails, with `EVAL_ERRORS_STOP`.
    """
    try:
      return self._evaluate(step, params)
    except Exception as error:
      if self._settings.errors_stop:
        raise
      if os.environ.get("GKD_TRACEBACK"):
        traceback.print_exc()
      self.failed += 1
      self._log.failed_evaluation(step, _in_words(error), self.failed)
      return {}

  def final(self, params: Any, seed: int) -> None:
    """Scores all of `final_split`, greedy and sampled at temperature 1.

    Args:
      params: the student's.
      seed: of sampling.
    """
    split = self._settings.final_split
    if not split:
      return
    evaluator = self._make(split=split)
    result: dict[str, Any] = {
      "params": parameters.count_array_elements(params),
      "split": split,
    }
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
      outputs = evaluator.predict(
        self._model.student.with_decode_fn(),
        params,
        seed=seed,
        decoder_params={"temperature": temperature},
      )
      result[name] = evaluator.score(outputs)
    self._log.final(result)

  def _evaluate(self, step, params) -> dict[str, float]:
    model = self._model
    results = self._periodic.predict(model.student, params)
    scores = self._periodic.score(results)
    teacher: Mapping[str, evaluate.Predictions] = {}
    if model.teacher is not None:
      teacher = self._periodic.predict(
        model.teacher, self._teacher_params, limit=5
      )
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
    self._log.evaluation(step, scores, examples)
    if self._best_metric not in (None, *scores):
      raise ValueError(
        f"expected the metric {self._best_metric!r} to choose the best"
        f" checkpoint by, got {sorted(scores)}; set BEST_METRIC"
      )
    return scores


def _in_words(error: Exception) -> str:
  """Returns an error in one line, with the place that raised it."""
  place = traceback.extract_tb(error.__traceback__)[-1]
  text = " ".join(str(error).split())[:300]
  name = os.path.basename(place.filename)
  return f"{type(error).__name__}: {text} ({name}:{place.lineno})"
