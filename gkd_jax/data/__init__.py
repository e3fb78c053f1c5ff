"""From seqio tasks to batches of numpy arrays.

batches: tasks by name, training batches with a position that can be saved.
shards: which shards of the data each process reads.
feature_converters: seqio's, for prompts alone and stored top-k log-probs.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.data.batches import (
    SHIPPED_TASKS,
    CutInputs,
    TrainIterator,
    distilled_task,
    feature_converter,
    feature_lengths,
    has_split,
    load_task,
    target_vocabulary,
    tasks_with_split,
  )
