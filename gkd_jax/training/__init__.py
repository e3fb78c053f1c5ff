"""Training: one update of the student, and what surrounds it.

trainer      the pure step; `jit` on a mesh, `pmap`
train_state  parameters, optimizer state, counts
runs         a run's mesh, abstract arrays and compiled step
preflight    checks and a table before the first step
teacher_check  whether the teacher is a teacher
settings     groups of settings that gin binds
rollouts     batches with sampled outputs and their rewards
logs         metrics.jsonl, TensorBoard, progress, the compilation cache
messages     how a run ended, and what comes next
model_dir    a run's lock and settings in MODEL_DIR
profiling    a trace of a few steps
processes    several processes, SIGTERM and Ctrl-C
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.training.logs import TrainLog
  from gkd_jax.training.model_dir import RunLock, update_settings
  from gkd_jax.training.processes import Stopped, StopSignal
  from gkd_jax.training.profiling import Profiler
  from gkd_jax.training.rollouts import RolloutBatches, check_targets
  from gkd_jax.training.runs import Run, build, check_parts
  from gkd_jax.training.settings import (
    CheckpointConfig,
    DatasetConfig,
    EvalConfig,
    LogConfig,
    PartitionerConfig,
  )
  from gkd_jax.training.train_state import TrainState, abstract_state, create
  from gkd_jax.training.trainer import jit_step, pmap_step, train_step
