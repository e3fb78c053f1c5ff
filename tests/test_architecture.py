"""Who may import whom, and what the step runs without."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parent.parent / "gkd_jax"
ALL = "anything"
# A room, or a module at the top of the package, to what it may import besides
# `checks`, which imports nothing.
MAY_IMPORT = {
  "__init__": "",
  "types": "",
  "checks": "",
  "files": "",
  "model_folders": "files",
  "schedules": "types",
  "optimizers": "schedules types",
  "divergences": "types",
  "partitioning": "types",
  "kernels": "divergences partitioning types",
  "losses": "divergences kernels partitioning types",
  "network": "kernels losses partitioning types",
  "decoding": "kernels losses partitioning types",
  "models": "decoding divergences losses network partitioning schedules types",
  "data": "files model_folders tasks types",
  "training": "data files losses models optimizers partitioning schedules types",
  "checkpoints": "files model_folders network partitioning types",
  "evaluation": "checkpoints data decoding divergences files losses models"
  " partitioning tasks types",
  "architectures": "checkpoints models network",
  "planning": "checkpoints data files losses models network optimizers"
  " partitioning training types",
  "experiments": "command_line files training",
  "command_line": "files",
  "train": "architectures checkpoints data evaluation files models optimizers partitioning"
  " training types",
  "infer": "architectures checkpoints data evaluation files models partitioning tasks types",
  "adapters": "checkpoints decoding losses models partitioning training types",
  "main": ALL,
}


def imports(path):
  """Rooms and top modules of gkd_jax that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split(".")
      if parts[0] == "gkd_jax":
        found |= {parts[1]} if parts[1:] else {a.name for a in node.names}
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith("gkd_jax."):
          found.add(alias.name.split(".")[1])
  return found


def room(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_each_import_is_in_the_table():
  for path in PACKAGE.rglob("*.py"):
    allowed = MAY_IMPORT[room(path)]
    if allowed is not ALL:
      wrong = imports(path) - {*allowed.split(), room(path), "checks"}
      assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_only_the_adapter_imports_t5x():
  importers = {
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ImportFrom | ast.Import)
    for name in [getattr(node, "module", None) or node.names[0].name]
    if name.split(".")[0] == "t5x"
  }
  assert importers == {"adapters/t5x.py"}


def test_tasks_import_nothing_of_the_package_but_tasks():
  for path in (PACKAGE.parent / "tasks").glob("*.py"):
    assert imports(path) <= {"tasks"}, path


def test_the_step_imports_without_tensorflow():
  code = (
    "import sys\n"
    "from gkd_jax import models\n"
    "from gkd_jax.training import trainer\n"
    "models.GKDModel\n"
    "heavy = {'tensorflow', 'seqio', 'gin', 'orbax', 't5x'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_the_package_offers_its_modules_and_imports_no_jax():
  code = (
    "import importlib.util, sys\n"
    "import gkd_jax\n"
    "assert not {'jax', 'tensorflow'} & set(sys.modules), sys.modules.keys()\n"
    "assert callable(gkd_jax.schedules.constant)\n"
    "from gkd_jax.tasks import calculator\n"
    "assert gkd_jax.tasks.calculator is calculator\n"
    "for name in ('tests', 'docs', 'gin', 'launch'):\n"
    "  assert not importlib.util.find_spec(f'gkd_jax.{name}'), name\n"
    "assert not hasattr(gkd_jax, 'tests')\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
