"""What a gin file builds, without training it."""

PARTS = """
from __gin__ import dynamic_registration
import gin_probe
gin_probe.build:
  model = %MODEL
  optimizer = %OPTIMIZER
  lengths = %TASK_FEATURE_LENGTHS
  batch_size = %BATCH_SIZE
  train_steps = %TRAIN_STEPS
  task = %MIXTURE_OR_TASK_NAME
"""


def build(**parts):
  """The arguments of the training script, as they are."""
  return parts


def parts_of(file, folder, **macros):
  """Parses a shipped gin file and builds what it describes.

  Args:
    file: such as "methods/sft.gin".
    folder: a temporary one.
    **macros: what a user would give with `--gin.NAME=`, as gin source text.
  """
  import gin
  from gkd_jax.command_line import gin_settings

  probe = folder / "probe.gin"
  probe.write_text(PARTS)
  bindings = [f"{name} = {value}" for name, value in macros.items()]
  gin_settings.parse([file, str(probe)], bindings, [])
  return gin.get_configurable(build)()
