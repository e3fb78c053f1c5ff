"""docs/from_t5x.md: its configs build, and the names in its table exist."""

import importlib
import inspect
import pathlib
import re

import jax
import pytest

import gin
from gkd_jax import optimizers, train
from gkd_jax.command_line import gin_settings

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from_t5x.md").read_text()
OURS = re.findall(r"```gin ours\n(.*?)```", PAGE, re.S)
UNDER_T5X = re.findall(r"```gin t5x\n(.*?)```", PAGE, re.S)
ROWS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", PAGE, re.M)
SHAPES = {"encoder_input_tokens": (1, 8), "decoder_input_tokens": (1, 8)}


@pytest.fixture(autouse=True)
def _clear_gin():
  yield
  gin.clear_config()


def _parse(tmp_path, text):
  path = tmp_path / "page.gin"
  path.write_text(text)
  gin_settings.parse([str(path)], [], [])


def _parameters(model):
  variables = jax.eval_shape(
    lambda: model.get_initial_variables(jax.random.key(0), SHAPES)
  )
  return sum(x.size for x in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("text", OURS)
def test_configs_for_gkd_train_build(tmp_path, text):
  _parse(tmp_path, text)
  bound = gin.get_bindings(train.train)
  # All that `train` needs is bound, and nothing that it does not know.
  inspect.signature(train.train).bind(**bound)
  assert isinstance(bound["optimizer"], optimizers.Optimizer)
  assert bound["train_steps"] in (10000, 40000)
  student = {
    "%T5_1_1_SMALL": 76_961_152,
    "%T5_1_1_BASE": 247_577_856,
  }[re.search(r"STUDENT = (\S+)", text).group(1)]
  # Sizes of the public T5 1.1 checkpoints.
  assert _parameters(bound["model"].student) == student
  if bound["model"].teacher is not None:
    assert _parameters(bound["model"].teacher) == 2_849_757_184
    assert bound["model"].beta == 0.1
    assert bound["teacher_checkpoint_path"] == "/checkpoints/teacher"
  if "piecewise_linear" in text:
    rate = bound["optimizer"].learning_rate
    assert [float(rate(s)) for s in (0, 1000, 10000)] == pytest.approx(
      [0.0, 1e-3, 0.0]
    )


def _resolve(name):
  """An object of gkd_jax by its name, of a class also its arguments."""
  module, *rest = name.split(".")
  found = importlib.import_module(f"gkd_jax.{module}")
  for part in rest:
    if hasattr(found, part):
      found = getattr(found, part)
    else:
      assert part in inspect.signature(found).parameters, name
  return found


def test_names_of_ours_in_the_table_exist():
  macros = set()
  for path in (ROOT / "gin" / "runs").glob("*.gin"):
    macros |= set(re.findall(r"^([A-Z][A-Z0-9_]+) =", path.read_text(), re.M))
  assert len(ROWS) > 25
  for _, name in ROWS:
    if re.fullmatch("[A-Z0-9_]+", name):
      assert name in macros, name
    else:
      _resolve(name)


def test_macros_of_the_t5x_config_are_read_by_its_gin_file():
  (text,) = UNDER_T5X
  shipped = (ROOT / "gin" / "t5x" / "gkd.gin").read_text()
  of_t5x = {t for t, _ in ROWS}
  for name in re.findall(r"^([A-Z][A-Z0-9_]+) =", text, re.M):
    assert f"%{name}" in shipped or name in of_t5x, name


def test_the_tiny_teacher_is_the_network_that_tiny_gin_restores():
  folder = ROOT / "gin" / "t5x"
  gin_settings.parse([str(folder / "tiny_teacher.gin")], ["MODEL_DIR='a'"], [])
  teacher = gin.get_bindings(train.train)["model"].student
  # By hand, T5 1.1 with 24 tokens, width 48, four heads of 8 and an MLP of 64:
  # embedding and head; buckets, norms, attention, MLP of encoder and decoder.
  attention, mlp, buckets = 4 * 48 * 32, 3 * 48 * 64, 32 * 4
  encoder = buckets + 3 * 48 + attention + mlp
  decoder = buckets + 4 * 48 + 2 * attention + mlp
  assert _parameters(teacher) == 2 * 24 * 48 + encoder + decoder
  text = (folder / "tiny.gin").read_text()
  theirs = text[text.index("\nteacher/network.T5Config:") :]
  fields = dict(re.findall(r"^  (\w+) = (\d+)", theirs, re.M))
  assert len(fields) == 6
  for name, value in fields.items():
    assert getattr(teacher.module.config, name) == int(value), name


def test_the_page_installs_the_commits_that_the_goldens_are_of():
  commits = dict(re.findall(r"github\.com/[\w-]+/(\w+)@(\w+)", PAGE))
  assert set(commits) == {"t5x", "airio", "jestimator"}
  golden = (ROOT / "tests" / "golden" / "README.md").read_text()
  assert f"t5x at {commits['t5x']}" in golden
  adapter = (ROOT / "gkd_jax" / "adapters" / "t5x.py").read_text()
  for name, commit in commits.items():
    assert f"/{name}@{commit}" in adapter


def test_the_page_finds_the_gin_files_of_an_installed_package(capsys):
  (code,) = re.findall(r'^python -c "(.*)"$', PAGE, re.M)
  exec(code, {})
  folder = pathlib.Path(capsys.readouterr().out.strip())
  assert (folder / "t5x" / "gkd.gin").is_file()


def test_the_page_says_which_values_of_t5x_the_gin_file_changes():
  shipped = (ROOT / "gin" / "t5x" / "gkd.gin").read_text()
  for line in ("DROPOUT_RATE = 0.0", "RANDOM_SEED = 0"):
    assert line in shipped and f"`{line}`" in PAGE


def test_values_that_differ_are_the_defaults_of_base_gin():
  section = PAGE.split("### Values that differ")[1].split("###")[0]
  rows = re.findall(r"^\| `(\w+)`[^|]* \| (\S+) \| (\S+) \|", section, re.M)
  text = (ROOT / "gin" / "runs" / "base.gin").read_text()
  defaults = dict(re.findall(r"^([A-Z_]+) = (\S+)", text, re.M))
  assert len(rows) == 11
  for name, theirs, ours in rows:
    assert defaults[name] == ours != theirs, name


def test_both_configs_say_the_same():
  (under_t5x,) = UNDER_T5X
  read = lambda text: dict(
    re.findall(r"^([A-Z][A-Z0-9_]+) = ([^#\n]*[^#\s])", text, re.M)
  )
  a, b = read(under_t5x), read(OURS[0])
  assert int(a.pop("TRAIN_STEPS")) - 1_100_000 == int(b["TRAIN_STEPS"])
  assert a.items() <= b.items()
