"""TODO."""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.checkpoints.checkpointer import (
    Checkpointer,
    SavableIterator,
    has_checkpoint,
    load_placed,
    recorded_data_shards,
  )
  from gkd_jax.checkpoints.errors import (
    check_matches,
  )
  from gkd_jax.checkpoints.formats import (
    load_config,
    load_model,
    load_params,
  )
  from gkd_jax.checkpoints.safetensors_io import (
    save_safetensors,
  )
