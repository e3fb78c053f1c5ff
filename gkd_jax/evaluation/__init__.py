"""Evaluation: decode, score, compare.

evaluate         Evaluator: decodes a split and computes the task's metrics
metric_values    what a task's metrics return: numbers, texts, failures
eval_folders     reads what gkd eval wrote
metric_functions a metric called on resampled examples
run_evaluations  those of a training run; one that fails costs no step
measurements     calibration, divergence by position, acceptance rate
teacher_data     a teacher's outputs for a whole task as shards
teacher_records  the records of these shards
entailment       a T5 entailment model as a reward
compare          confidence intervals and paired tests of two evaluations
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.evaluation.entailment import (
    EntailmentReward,
  )
  from gkd_jax.evaluation.evaluate import (
    Evaluator,
  )
  from gkd_jax.evaluation.teacher_records import (
    Shards,
  )
