"""TODO."""

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
