"""Full cross products: a few combinations in the suite, the others nightly."""

import itertools

import pytest


def besides(chosen, *values):
  """All combinations of `values` as parameters, those not `chosen` nightly."""
  combinations = [*itertools.product(*values)]
  assert {*chosen} <= {*combinations}
  return [
    pytest.param(*x, marks=() if x in chosen else pytest.mark.nightly)
    for x in combinations
  ]


def of(values, chosen):
  """Single values as parameters, those not `chosen` nightly."""
  return [
    pytest.param(x, marks=() if x in chosen else pytest.mark.nightly)
    for x in values
  ]
