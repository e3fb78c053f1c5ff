"""TODO."""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.data.batches import (
    SHIPPED_TASKS,
    CutInputs,
    TrainIterator,
    distilled_task,
    feature_converter,
    feature_lengths,
    load_task,
  )
