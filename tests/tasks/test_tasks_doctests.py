"""The examples in the tasks' docstrings.

pytest would import the folder `tasks` a second time under that name, and every
task would be registered twice; so its doctests run here, by their real names.
"""

import doctest
import importlib
import pkgutil

import pytest

from gkd_jax import tasks

MODULES = sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))


def test_modules_are_found():
  assert {"arithmetic", "calculator", "g2p", "text_metrics"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
  module = importlib.import_module(f"gkd_jax.tasks.{name}")
  assert doctest.testmod(module).failed == 0


def test_examples_are_run():
  module = importlib.import_module("gkd_jax.tasks.calculator")
  assert doctest.testmod(module).attempted >= 3
