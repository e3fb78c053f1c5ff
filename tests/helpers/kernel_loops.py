"""Which form of a kernel a program has: those of a CPU have a loop."""

import jax


def loops(function, *arguments):
  """Returns the number of loops in a program for all platforms."""
  text = jax.jit(function).lower(*arguments).as_text()
  return text.count("stablehlo.while")
