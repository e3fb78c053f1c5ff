"""Help as a new user asks for it: complete, short, and without heavy imports."""

import re
import subprocess
import sys

import pytest
from command_line import ENV, ROOT, here

from gkd_jax import command_line
from gkd_jax.command_line import gin_files


def test_every_command_has_a_function_and_a_page():
  from gkd_jax import main

  assert {*main.COMMANDS} == {*command_line.COMMANDS}
  for name in command_line.COMMANDS:
    page = command_line.of_command(name)
    for flag in command_line.COMMANDS[name].flags:
      assert re.search(rf"^  --{flag}\b", page, re.M), (name, flag)


def test_every_flag_is_of_a_command():
  used = {f for c in command_line.COMMANDS.values() for f in c.flags}
  assert used == {*command_line.FLAGS}


def test_examples_are_read_by_their_commands():
  import shlex

  for name, command in command_line.COMMANDS.items():
    program, *words = shlex.split(command.example)
    assert (program, words[0]) == ("gkd", name)
    args = command_line.parse(name, [w for w in words[1:] if w != "..."])
    shipped = [f for f in getattr(args, "gin_file", []) if f != "my_run.gin"]
    bindings = getattr(args, "gin_bindings", [])
    gin_files.check_read(gin_files.read(shipped, bindings, []))


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_all_commands_have_a_line(capsys, words):
  here(*words)
  page = capsys.readouterr().out
  for name, command in command_line.COMMANDS.items():
    first = command.summary.split()[0]
    assert re.search(rf"^  {name} +{first}", page, re.M), name
  assert re.search("^example:\n  gkd train --gin_file=", page, re.M)


def test_macros_of_a_run_file_with_defaults_and_comments():
  page = command_line.of_command("train")
  must, rest = page.split("  must be set:\n")[1].split("  runs/files.gin:\n")
  assert must.split() == [
    *("MODEL_DIR", "TASK_FEATURE_LENGTHS", "TRAIN_STEPS"),
  ]
  assert re.search(r"^    TEST_FILES = None$", rest, re.M)
  assert re.search(r"^    BATCH_SIZE = 32$", rest, re.M)
  assert re.search(r"^    LEARNING_RATE = 3e-4$", rest, re.M)
  assert re.search(r"^    MAX_SKIPPED_IN_ROW = 20 +non-finite upda", rest, re.M)
  assert rest.index("runs/gkd.gin:") < rest.index("DIVERGENCE = 'forward_kl'")


def test_macros_of_a_given_file_and_binding(capsys, tmp_path):
  file = tmp_path / "my.gin"
  file.write_text(
    "include 'runs/sft.gin'\nMODEL_DIR = '/a # b'  # where\nBATCH_SIZE = 8\n"
  )
  here("train", f"--gin_file={file}", "--gin.SEED=7", "--help")
  page = capsys.readouterr().out
  assert f"  {file}:" in page and "TEACHER" not in page.split("settings of")[1]
  assert re.search("^    MODEL_DIR = '/a # b' +where$", page, re.M)
  assert "    BATCH_SIZE = 8\n" in page and "BATCH_SIZE = 32" not in page
  assert "  command line:\n    SEED = 7\n" in page


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_pages_fit_the_terminal(monkeypatch, columns):
  monkeypatch.setenv("COLUMNS", str(columns))
  for name in command_line.COMMANDS:
    for line in command_line.of_command(name).splitlines():
      # What is to be copied, or one word that is longer, stays whole.
      copied = line.startswith("  gkd ") or len(line.split()) <= 4
      assert len(line) <= columns or copied, line


def test_help_and_wrong_names_import_nothing_heavy():
  code = (
    "import sys\n"
    "from gkd_jax import main\n"
    "for words in (['--help'], ['train', '-h'], ['eval', '--help'],\n"
    "              ['--version'], ['trian'], ['train'], ['path', 'g2p'],\n"
    "              ['compare'], ['report'], ['watch'], ['sweep'], ['export'],\n"
    "              ['train', '--gin_file=nope.gin'],\n"
    "              ['train', '--gin_file=runs/gkd.gin', '--gin.MODEL_DIR=/a'],\n"
    "              ['eval', '--gin_file=runs/eval.gin', '--gin.SEEDS=1']):\n"
    "  try:\n"
    "    main.main(['gkd', *words])\n"
    "  except SystemExit as error:\n"
    "    assert error.code == 2, words\n"
    "  heavy = {'jax', 'tensorflow', 'numpy', 'seqio', 'matplotlib'}\n"
    "  assert not heavy & {*sys.modules}, (words, heavy & {*sys.modules})\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=ENV,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr and done.stderr.count("\n") == 11


def test_a_run_says_what_its_files_and_flags_set(tmp_path):
  data = tmp_path / "data.gin"
  data.write_text("TRAIN_FILES = 'a.jsonl'  # mine\nBETA = 0.1\n")
  mine = tmp_path / "mine.gin"
  mine.write_text(
    f"include 'experiments/smoke.gin'\ninclude '{data}'\n"
    "train.train.seed = 3\nMETRICS = (\n  'rouge',\n)\n"
  )
  bindings = [
    "TRAIN_STEPS = 7",
    "teacher/network.Transformer.scan_layers = True",
  ]
  page = command_line.of_run([str(mine)], bindings, [])
  first, *lines = page.splitlines()
  assert first.startswith("settings, besides the defaults")
  own = lines[lines.index(f"  {data}:") :]
  # BETA replaces the value of the shipped experiment; no default is listed.
  assert [line.strip() for line in own] == [
    f"{data}:",
    "TRAIN_FILES = 'a.jsonl'",
    "BETA = 0.1",
    f"{mine}:",
    "train.train.seed = 3",
    "METRICS = (...)",
    "command line:",
    "TRAIN_STEPS = 7",
    "teacher/network.Transformer.scan_layers = True",
  ]
  assert lines[0] == "  experiments/smoke.gin:"
  assert "    DIVERGENCE = 'jsd'" in lines
  assert "BETA = 0.5" not in page and "OPTIMIZER" not in page


def test_the_version_names_what_it_stands_on(capsys):
  import jax

  import gkd_jax

  here("--version")
  said = capsys.readouterr().out
  assert said.startswith(f"gkd {gkd_jax.__version__} (Python 3.")
  assert f"jax {jax.__version__}," in said


def test_the_version_names_the_commit_of_a_checkout(monkeypatch, tmp_path):
  import gkd_jax

  monkeypatch.setattr(
    gkd_jax, "__file__", str(tmp_path / "gkd_jax/__init__.py")
  )
  assert "commit" not in command_line.version()
  git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
  (tmp_path / "file").write_text("1")
  for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
    subprocess.run([*git, *words], check=True)
  head = (tmp_path / ".git/HEAD").read_text().split()[1]
  commit = (tmp_path / ".git" / head).read_text()[:7]
  assert re.search(rf", commit {commit}\w*\)$", command_line.version())
  (tmp_path / "file").write_text("2")
  assert command_line.version().endswith("+)")
