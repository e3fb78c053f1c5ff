"""A bucket in memory: TensorFlow's `ram://` file system behind etils.epath.

Paths `ram://...` are handled like `gs://...`: epath passes them to
`tf.io.gfile`, which TensorFlow's own code (TFRecords, TensorBoard, iterators)
uses as well. What a bucket cannot do at once fails here: appending to an object
and renaming a folder.
"""

import os
import uuid

from etils import epath
from etils.epath import backend, gpath


class _Bucket(type(backend.tf_backend)):
  """TensorFlow's files, without what a bucket cannot do."""

  def exists(self, path):
    # TensorFlow's also finds `a` where there is `ab` alone.
    folder, name = os.path.split(os.fspath(path).rstrip("/"))
    return super().exists(path) and (
      folder == "ram:/"
      or name in (entry.rstrip("/") for entry in self.listdir(folder))
    )

  def open(self, path, mode):
    assert "a" not in mode, f"{path}: objects of a bucket cannot grow"
    if "w" in mode and self.exists(path):
      self.remove(path)  # TensorFlow's would append
    return super().open(path, mode)

  def rename(self, path, dst):
    assert not self.isdir(path), f"{path}: a bucket has no folders to rename"
    super().rename(path, dst)

  replace = rename


_BUCKET = _Bucket()


@epath.register_path_cls("ram://")
class _RamPath(gpath.PosixGPath):
  """`ram://a/b`, which pathlib keeps as `/ram/a/b`."""

  def __new__(cls, *parts):
    return super().__new__(cls, *_without_scheme(parts))

  def __init__(self, *parts):
    if hasattr(gpath.PosixGPath, "with_segments"):  # Python 3.12 and later
      super().__init__(*_without_scheme(parts))

  @property
  def _uri_scheme(self):
    return "ram" if self.parts[:2] == ("/", "ram") else None

  @property
  def _backend(self):
    return _BUCKET


def _without_scheme(parts):
  joined = "/".join(str(part) for part in parts)
  return (joined.replace("ram://", "/ram/", 1),)


def new() -> str:
  """Makes an empty folder that no other test writes into."""
  folder = f"ram://bucket/{uuid.uuid4().hex}"
  epath.Path(folder).mkdir(parents=True)
  return folder
