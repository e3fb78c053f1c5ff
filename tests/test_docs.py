"""The documentation names files, flags, macros and modules that exist."""

import itertools
import pathlib
import re

import pytest

from gkd_jax import command_line

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MODES = "|".join(command_line.COMMANDS)
FOLDERS = "docs|gin|gkd_jax|launch|tasks|tests"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def alternatives(name):
  """`a/{b,c}` as `a/b` and `a/c`."""
  parts = [part.split(",") for part in re.split(r"[{}]", name)]
  return ["".join(choice) for choice in itertools.product(*parts)]


@pages
def test_links_lead_to_files(page):
  for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
    assert "://" in link or (page.parent / link).exists(), link


@pages
def test_paths_exist(page):
  found = re.findall(rf"`((?:{FOLDERS})/[^\s`<]*)`", page.read_text())
  for name in itertools.chain(*map(alternatives, found)):
    assert list(ROOT.glob(name.rstrip("/"))), name


@pages
def test_gin_files_are_shipped(page):
  of_user = r"my_|exp\.gin|[ab]\.gin|YOUR_|FILE"
  named = re.findall(r"--(?:gin|sweep)_file=([^\s`',)]+)", page.read_text())
  for name in named + re.findall(
    r"`((?:runs|models)/\w+\.gin)`", page.read_text()
  ):
    if not re.match(of_user, name) and name.strip("."):
      assert (ROOT / name).exists() or (ROOT / "gin" / name).exists(), name


@pages
def test_flags_exist(page):
  if page.stem == "CHANGELOG":
    return  # it names those that are gone
  text = page.read_text().replace("\\\n", " ")
  pattern = rf"(?:^|`|\$ )(gkd ({MODES}) [^`\n]*)"
  for line, command in re.findall(pattern, text, re.M):
    known = {"gin", "help", *command_line.COMMANDS[command].flags}
    for name in re.findall(r" '?--(\w+)", line):
      assert name in known, f"{name} in {line}"


def macros():
  """Macros that shipped gin files set."""
  text = "\n".join(path.read_text() for path in ROOT.glob("gin/**/*.gin"))
  return set(re.findall(r"^([A-Z][A-Z0-9_]+) =", text, re.M))


@pages
def test_macros_exist(page):
  if page.stem == "CHANGELOG":
    return  # it names those that are gone
  text = page.read_text()
  for name in re.findall(r"--gin\.([A-Z_0-9]+)=|`([A-Z_0-9]+) = ", text):
    name = name[0] or name[1]
    assert name in macros() | {"NAME", "X"}, name


def test_the_tree_of_the_architecture_is_that_of_the_package():
  text = (ROOT / "docs/architecture.md").read_text()
  tree = text[text.index("```\ngkd_jax/") :].split("```")[1]
  room, named = "", set()
  for line in tree.splitlines():
    if folder := re.match(r"  (\w+)/", line):
      room = folder[1] + "/"
    elif files := re.match(r"  ( *)((?:\w+\.py(?:, )?)+)", line):
      here = room if files[1] else ""
      named |= {here + name for name in files[2].rstrip().split(", ")}
  package = ROOT / "gkd_jax"
  modules = {p.relative_to(package).as_posix() for p in package.rglob("*.py")}
  assert named == {m for m in modules if not m.endswith("__init__.py")}
