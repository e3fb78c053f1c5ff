"""Gin's files are parsed without the messages of what they import."""

import os
import sys

import pytest

from gkd_jax import gin_utils


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
  gin_utils.import_tensorflow()
  assert "tensorflow" in sys.modules
  os.write(2, b"later")
  assert capfd.readouterr().err == "later"


def test_messages_of_a_failed_start_are_shown(tensorflow, capfd):
  tensorflow("raise ImportError('broken')")
  with pytest.raises(ImportError, match="broken"):
    gin_utils.import_tensorflow()
  assert capfd.readouterr().err == "oneDNN\n"
