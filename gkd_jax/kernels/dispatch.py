"""Chooses between the plain form of a computation and a CPU's own."""

import math
from collections.abc import Callable
from typing import Any

import jax

from gkd_jax import partitioning


def on_cpu(kernel: Callable[..., Any], plain: Callable[..., Any], *args) -> Any:
  """Calls `kernel` in a program for one CPU device, else `plain`.

  Both are traced; the platform decides when the program is lowered. XLA can
  only split the plain form over a mesh.

  Args:
    kernel: the form that XLA's CPU backend is faster at, or needs less memory
      for.
    plain: a function of the same arguments and results.
    *args: trees of arrays.
  """
  if math.prod(partitioning.auto_axes().values()) > 1:
    return plain(*args)
  return jax.lax.platform_dependent(*args, cpu=kernel, default=plain)
