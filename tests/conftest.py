"""Shared by all tests: eight fake CPU devices and strict shapes.

The flags are set before JAX starts, so that a sharding test needs no
accelerator, and a broadcast that nobody asked for is an error.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

# The suite is compilation for the most part: unoptimised code compiles twice as
# fast and computes the same to rounding.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
