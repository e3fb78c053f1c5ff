"""Gin files as text: bindings in gin's order, and which macros nothing reads."""

import pytest

from gkd_jax.command_line import gin_files


def write(folder, **texts):
  for name, text in texts.items():
    (folder / f"{name}.gin").write_text(text)
  return [str(folder)]


def test_bindings_come_in_gins_order(tmp_path):
  paths = write(
    tmp_path,
    a="include 'b.gin'\nX = 1\ns/f.y = %X\n",
    b="X = @f()\nf:\n  z = 2\n",
  )
  found = gin_files.read(["a.gin"], ["X = {'k': (%Y, 3)}"], paths)
  shown = [(b.scope, b.selector, b.argument, b.value) for b in found]
  assert shown == [
    ("", "X", "", gin_files.Reference("f", True)),
    ("", "f", "z", 2),
    ("", "X", "", 1),
    ("s", "f", "y", gin_files.Macro("X")),
    ("", "X", "", {"k": (gin_files.Macro("Y"), 3)}),
  ]
  assert [b.asked for b in found] == [False, False, True, True, True]
  assert [*found[-1].macros()] == ["Y"]


def test_the_first_folder_that_has_a_file_counts(tmp_path, monkeypatch):
  (tmp_path / "runs").mkdir()
  monkeypatch.chdir(tmp_path)
  assert gin_files.find("runs/gkd.gin", gin_files.folders([])).startswith(
    gin_files.shipped()
  )
  write(tmp_path / "runs", gkd="")
  found = gin_files.find("runs/gkd.gin", gin_files.folders([]))
  assert found == str(tmp_path / "runs" / "gkd.gin")


def test_variables_in_names_of_files_and_folders(tmp_path, monkeypatch):
  monkeypatch.setenv("OF_USER", str(tmp_path))
  write(tmp_path, a="include '$OF_USER/b.gin'\n", b="X = 1\nf.x = %X\n")
  for name, paths in (("${OF_USER}/a.gin", []), ("a.gin", ["$OF_USER"])):
    assert [b.selector for b in gin_files.read([name], [], paths)] == ["X", "f"]
  with pytest.raises(
    ValueError, match=r"got [$]NO_ONE in '[$]NO_ONE/a.gin'; set"
  ):
    gin_files.read(["$NO_ONE/a.gin"], [], [])


RUN = "include 'base.gin'\n"
BASE = "A = 1\nB = %A\nf.x = %B\nf.y = %C\nC = 2\n"


@pytest.mark.parametrize(
  ("text", "bindings", "unread"),
  [
    ("A = 3", ["C = 4"], None),
    ("D = 3", [], "D"),
    ("", ["D = 4"], "D"),
    ("", ["a = 4"], "a"),
    # Read by what a user replaces on purpose: the replacement counts.
    ("C = 3", ["f.y = 4"], None),
    ("C = 3", ["m.f.y = 4"], None),
    ("C = 3\nf.y = 5", [], None),
    # In another scope, or another argument, nothing is replaced.
    ("C = 3", ["s/f.y = 4", "f.z = 4"], None),
  ],
)
def test_macros_that_nothing_reads(tmp_path, text, bindings, unread):
  paths = write(tmp_path, run=RUN + text, base=BASE)
  found = gin_files.read(["run.gin"], bindings, paths)
  if unread is None:
    gin_files.check_read(found)
  else:
    with pytest.raises(ValueError, match=f"something reads.*got {unread};"):
      gin_files.check_read(found)


def test_a_macro_that_an_included_file_fixes_is_not_read(tmp_path):
  paths = write(
    tmp_path,
    run="include 'fixes.gin'\nC = 3",
    base=BASE,
    fixes="include 'base.gin'\nf.y = 7\n",
  )
  found = gin_files.read(["run.gin"], [], paths)
  with pytest.raises(ValueError, match="got C;"):
    gin_files.check_read(found)
