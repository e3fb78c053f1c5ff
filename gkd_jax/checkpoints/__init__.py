"""Checkpoints: files to parameters and back.

checkpointer    a run's `MODEL_DIR/checkpoint_<step>`, by Orbax
formats         load_params, load_config, load_special_tokens, load_model,
                load_placed from any format
parameters      names, shapes and counts of a configuration's parameters
stored_arrays   arrays that are read lazily, cast, quantized or stacked
orbax_arrays, safetensors_io, huggingface, t5x   one storage format each
export          `gkd import` and `gkd export`
errors          damaged checkpoints, and those of another model
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.checkpoints.checkpointer import (
    Checkpointer,
    SavableIterator,
    has_checkpoint,
    newest_step,
    recorded_data_shards,
    saved_metrics,
  )
  from gkd_jax.checkpoints.errors import (
    check_finite,
    check_matches,
  )
  from gkd_jax.checkpoints.formats import (
    load_config,
    load_model,
    load_params,
    load_placed,
    load_special_tokens,
  )
  from gkd_jax.checkpoints.safetensors_io import (
    save_safetensors,
  )
