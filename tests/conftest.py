"""Shared by all tests: eight fake CPU devices and strict shapes.

The flags are set before JAX starts, so that a sharding test needs no
accelerator, and a broadcast that nobody asked for is an error.
"""

import atexit
import gc
import os
import shutil
import tempfile
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

# The suite is compilation for the most part: unoptimised code compiles twice as
# fast, without XLA's fusion emitters again three times, in one part instead of 32
# in three quarters of the time, and computes the same to rounding. Eight devices on
# a machine with other work can wait for each other for longer than XLA does by
# default before it aborts. Workers of pytest inherit the flags: with the same flags
# twice they would not find the programs of a single process in the cache.
if "--xla_backend_optimization_level=0" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    " --xla_cpu_collective_call_terminate_timeout_seconds=300"
  )
  # Later versions may not know a flag, and end at one that they do not know.
  os.environ["XLA_FLAGS"] += (
    " --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
    if metadata.version("jaxlib").startswith("0.10.")
    else ""
  )

# A program is compiled once for all tests and the processes that they start: the
# first process of pytest makes the folder, its workers and theirs inherit it. Who
# sets JAX_COMPILATION_CACHE_DIR keeps the programs for the next run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  cache = tempfile.mkdtemp(prefix="gkd_jax_programs")
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
  """Puts the longest files first, so that no process waits for one at the end."""
  longest = ("multiprocess", "cli", "gin", "planning", "training", "models")
  rank = {folder: i for i, folder in enumerate(longest)}
  items.sort(key=lambda item: rank.get(item.path.parent.name, len(longest)))


def pytest_collection_finish():
  """Lets the garbage collector pass over what the imports made: it all stays."""
  gc.freeze()
  gc.set_threshold(100_000, 50, 50)
