"""Gin's files are parsed in silence, and what they leave open is named."""

import os
import sys

import pytest

import gin
from gkd_jax.command_line import gin_settings


@pytest.fixture
def tensorflow(tmp_path, monkeypatch):
  """Puts a module in the place of TensorFlow, as if it were not imported."""
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  del sys.modules["tensorflow"]
  # As C++ does, past sys.stderr.
  lines = ["import os", "os.write(2, b'oneDNN\\n')"]
  return lambda *more: (tmp_path / "tensorflow.py").write_text(
    "\n".join((*lines, *more))
  )


def test_tensorflow_starts_silently(tensorflow, capfd):
  tensorflow()
  gin_settings.import_tensorflow()
  assert "tensorflow" in sys.modules
  os.write(2, b"later")
  assert capfd.readouterr().err == "later"


def test_messages_of_a_failed_start_are_shown(tensorflow, capfd):
  tensorflow("raise ImportError('broken')")
  with pytest.raises(ImportError, match="broken"):
    gin_settings.import_tensorflow()
  assert capfd.readouterr().err == "oneDNN\n"


THINGS = """
class Box:
  def __init__(self, width, height=1):
    self.area = width * height

def run(box, size, make=None, name="run"):
  return box.area
"""
FILE = """
from __gin__ import dynamic_registration
import things_of_test as things

WIDTH = %gin.REQUIRED
SIZE = %gin.REQUIRED
OTHER = %gin.REQUIRED
BOX = @a/things.Box()
things.run:
  box = %BOX
  size = {'of': [%SIZE]}
a/things.Box.width = %WIDTH
b/things.Box.width = %OTHER
"""


@pytest.mark.parametrize(
  ("bindings", "names"),
  [
    ([], {"WIDTH", "SIZE"}),
    (["WIDTH = 3"], {"SIZE"}),
    # What another scope reads is not asked for, unless it is built.
    (["WIDTH = 3", "SIZE = 1"], None),
    (["SIZE = 1", "BOX = @b/things.Box()"], {"OTHER"}),
    (["SIZE = 1", "BOX = 3"], None),
    # A function that is passed on uncalled gets its arguments later.
    (["WIDTH = 3", "SIZE = 1", "run.make = @c/things.Box"], None),
    (
      ["WIDTH = 3", "SIZE = 1", "run.make = @c/things.Box()"],
      {"things.Box.width"},
    ),
    (["WIDTH = %SIZE"], {"SIZE"}),
    (["WIDTH = 3", "SIZE = %NOWHERE"], "got %NOWHERE; set NOWHERE"),
    (["WIDTH = 3", "SIZE = %WIDHT"], "such as WIDTH, got %WIDHT; set WIDHT"),
  ],
)
def test_all_that_is_built_has_values(tmp_path, monkeypatch, bindings, names):
  (tmp_path / "things_of_test.py").write_text(THINGS)
  (tmp_path / "my.gin").write_text(FILE)
  monkeypatch.syspath_prepend(tmp_path)
  gin_settings.parse([str(tmp_path / "my.gin")], bindings, [])
  import things_of_test

  try:
    gin_settings.check_values(things_of_test.run)
  except ValueError as error:
    said = str(error)
    if isinstance(names, str):
      assert names in said
    else:
      found = said.split("; set ")[1].split(", ")
      assert {*found} == names
      assert said.startswith("expected a value of each ")
  else:
    assert names is None
  finally:
    gin.clear_config()
