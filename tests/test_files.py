"""Files that are written whole or not at all, on a disk and in a bucket."""

import json
import os

import pytest
import remote_files
import tensorflow as tf

from gkd_jax import files


@pytest.fixture(name="folder", params=["disk", "bucket"])
def _folder(request, tmp_path):
  return remote_files.new() if request.param == "bucket" else str(tmp_path)


def names(folder):
  return sorted(p.name for p in files.absolute(folder).iterdir())


def test_home_and_working_directory_are_filled_in(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert os.fspath(files.absolute("~/run")) == str(tmp_path / "run")
  assert os.fspath(files.absolute("a/../run")) == str(tmp_path / "run")
  for uri in ("gs://bucket/~/run", "ram://bucket/run"):
    assert os.fspath(files.absolute(uri)) == uri
    assert os.fspath(files.absolute(files.absolute(uri) / "x")) == f"{uri}/x"
  # A folder in whose name there is a colon is a folder.
  assert not files.is_remote(tmp_path / "a:" / "b")


def test_variables_are_filled_in(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("OF_USER", "me")
  monkeypatch.setenv("BASE", "gs://bucket/a")
  monkeypatch.delenv("NOT_SET", raising=False)
  for path in ("$HOME/run", "${HOME}/run", "~/run"):
    assert os.fspath(files.absolute(path)) == str(tmp_path / "run")
  for path in ("$HOME/${OF_USER}_$OF_USER/x", "~/${OF_USER}_$OF_USER/x"):
    assert os.fspath(files.absolute(path)) == str(tmp_path / "me_me/x")
  assert os.fspath(files.absolute("$BASE/run")) == "gs://bucket/a/run"
  files.check_folder("$BASE/run", "MODEL_DIR")
  assert os.fspath(files.absolute("gs://$OF_USER/~")) == "gs://me/~"
  # What no shell would take for a variable is part of a name.
  for name in ("a$", "5$7", "a$-b"):
    assert files.absolute(tmp_path / name).name == name
  for path, got in (("a/$NOT_SET/b", "$NOT_SET"), ("${NOT_SET}", "${NOT_SET}")):
    with pytest.raises(ValueError) as error:
      files.absolute(path)
    assert str(error.value) == (
      f"expected environment variables that are set, got {got} in {path!r};"
      " set NOT_SET, or a path without it"
    )


def test_an_unknown_file_system_is_a_sentence():
  with pytest.raises(ValueError, match="gs:// or s3://, got 'nowhere://run'"):
    files.absolute("nowhere://run")


def test_what_is_written_is_read(folder):
  path = os.path.join(folder, "a", "b.json")
  assert files.read_json(path) is None and files.read_json_lines(path) == []
  for value in ({"é": [1, None]}, {"other": 2}):
    files.write_json(path, value)
    assert files.read_json(path) == value
  files.write_json_lines(path, [{"a": 1}, {"path": os}])
  assert files.read_json_lines(path) == [{"a": 1}, {"path": str(os)}]
  files.write_bytes(path, b"\x00\xff")
  assert files.absolute(path).read_bytes() == b"\x00\xff"
  assert names(os.path.join(folder, "a")) == ["b.json"]


def test_a_value_that_cannot_be_written_leaves_the_old_file(
  folder, monkeypatch
):
  path = os.path.join(folder, "a.txt")
  files.write_text(path, "old")
  with pytest.raises(TypeError):
    files.write_json(path, {"a": object()})
  if files.is_remote(folder):
    return
  # A full disk: half is written.
  place = type(files.absolute(path))

  def half(self, content):
    with open(self, "wb") as file:
      file.write(content[: len(content) // 2])
    raise OSError("no space left")

  monkeypatch.setattr(place, "write_bytes", half)
  with pytest.raises(OSError, match="no space"):
    files.write_text(path, "new and longer")
  monkeypatch.undo()
  assert files.absolute(path).read_text() == "old"
  assert names(folder) == ["a.txt"]


def test_lines_are_appended_to_those_of_an_earlier_process(folder):
  path = os.path.join(folder, "metrics.jsonl")
  files.append_json_lines(path, [{"step": 1}, {"step": 2}])
  files.append_json_lines(path, [])
  files.append_json_lines(path, [{"step": 3}])
  text = files.absolute(path).read_text()
  assert [json.loads(x)["step"] for x in text.splitlines()] == [1, 2, 3]
  assert text.endswith("\n")


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_a_line_that_was_cut_off_is_dropped(folder, whole):
  path = os.path.join(folder, "metrics.jsonl")
  before = [{"step": i, "loss": 0.5} for i in range(whole)]
  text = "".join(json.dumps(row) + "\n" for row in before)
  files.write_text(path, text + '{"step": 7, "lo')
  assert files.read_json_lines(path) == before
  files.append_json_lines(path, [{"step": 8}])
  assert files.read_json_lines(path) == [*before, {"step": 8}]
  assert 'lo"' not in files.absolute(path).read_text().replace("loss", "")


def test_a_damaged_line_is_named(folder):
  path = os.path.join(folder, "predictions.jsonl")
  files.write_text(path, '{"a": 1}\n{"a"\n{"a": 3}\n')
  with pytest.raises(ValueError, match=r"in line 2 of .*predictions"):
    files.read_json_lines(path)


def test_a_folder_without_its_last_file_is_never_met_with_mixed_files(folder):
  place = files.absolute(folder) / "model"
  write = lambda text: lambda path: path.write_text(text)
  files.write_folder(
    place, {"config": write("1"), "weights": write("1")}, last="config"
  )
  assert names(place) == ["config", "weights"]
  (place / "README.md").write_text("mine")
  with pytest.raises(RuntimeError):
    files.write_folder(
      place, {"config": write("2"), "weights": _raise}, last="config"
    )
  # On a disk the old folder is untouched; in a bucket it is refused.
  kept = [] if files.is_remote(folder) else ["config"]
  assert [n for n in names(place) if n == "config"] == kept
  seen = []

  def watched(path):
    seen.append(names(place))
    path.write_text("3")

  files.write_folder(
    place, {"config": watched, "weights": write("3")}, last="config"
  )
  assert (
    (place / "config").read_text() == (place / "weights").read_text() == "3"
  )
  if files.is_remote(folder):
    assert seen == [["README.md", "weights"]]
  assert names(place) == ["README.md", "config", "weights"]
  assert names(folder) == ["model"]


def _raise(path):
  raise RuntimeError(path)


def test_tensorflow_reads_the_same_bucket():
  folder = remote_files.new()
  files.write_text(f"{folder}/a/b.txt", "text")
  with tf.io.gfile.GFile(f"{folder}/a/b.txt") as file:
    assert file.read() == "text"
