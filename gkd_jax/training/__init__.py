"""TODO."""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.training.logs import (
    TrainLog,
  )
  from gkd_jax.training.processes import (
    Stopped,
    StopSignal,
  )
  from gkd_jax.training.rollouts import (
    RolloutBatches,
  )
  from gkd_jax.training.train_state import (
    TrainState,
    abstract_state,
    create,
  )
  from gkd_jax.training.trainer import (
    JitExecutor,
    PmapExecutor,
    sampler,
    source_of_step,
    train_step,
  )
