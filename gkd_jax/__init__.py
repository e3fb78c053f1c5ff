"""Generalized Knowledge Distillation (arXiv 2306.13649) in JAX and Flax."""

import os
import time

__version__ = "0.1.0"
STARTED = time.monotonic()  # what the time to the first step counts from

# In a checkout the tasks lie beside the package, not in it, as setup.py's
# `package_dir` says for an installed one. Without this line `gkd_jax.tasks`
# would exist only after an install.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "tasks")):
  __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
