"""Generalized Knowledge Distillation (arXiv 2306.13649) in JAX and Flax.

  train, infer           the scripts that gin files bind
  models                 a loss, a network and decoding: what can be trained
  network                T5 and decoder-only transformers in flax.linen
  losses, divergences    pure functions of logits and log-probs
  decoding               sampling and beam search
  data, checkpoints      seqio tasks to batches; files to parameters and back
  training, evaluation   the step and its surroundings; a checkpoint's scores
  partitioning, kernels  the device mesh; what one backend is faster at
  planning, experiments  programs for absent devices; sweeps and reports
  optimizers, schedules, types, files, model_folders, checks, tasks

Modules load when they are first used: `import gkd_jax` does not import jax.
"""

import importlib
import importlib.util
import pathlib
import pkgutil
import sys
import time

__version__ = "0.2.0"
STARTED = time.monotonic()  # the time to the first step counts from here

_MODULES = {m.name for m in pkgutil.iter_modules(__path__)} | {"tasks"}


def __getattr__(name):
  if name in _MODULES:
    return importlib.import_module(f"gkd_jax.{name}")
  raise AttributeError(f"module 'gkd_jax' has no attribute {name!r}")


def __dir__():
  return sorted({*globals(), *_MODULES})


def _load_tasks_of_checkout():
  """Loads `gkd_jax.tasks` from the folder beside the package.

  An installed package has its tasks inside (`package_dir` in setup.py).
  """
  package = pathlib.Path(__file__).resolve().parent
  if (package / "tasks").is_dir():
    return
  folder = package.parent / "tasks"
  spec = importlib.util.spec_from_file_location(
    "gkd_jax.tasks",
    folder / "__init__.py",
    submodule_search_locations=[str(folder)],
  )
  assert spec and spec.loader  # of a file's path there is one
  sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(sys.modules[spec.name])


_load_tasks_of_checkout()
