"""Paths that a user gives, local or of a bucket.

Folders that appear whole: what is written half is never met by a reader.
"""

import os
import uuid
from collections.abc import Callable, Mapping

from etils import epath


def absolute(path: os.PathLike[str] | str) -> epath.Path:
  """The absolute path, with the home folder filled in.

  A URI such as `gs://bucket/folder` is absolute already; resolving would take
  it for a local name.
  """
  place = epath.Path(path)
  if "://" in os.fspath(place):
    return place
  return place.expanduser().resolve()


def write(
  path: os.PathLike[str] | str,
  files: Mapping[str, Callable[[epath.Path], None]],
  *,
  last: str,
) -> None:
  """Writes files into the folder `path`.

  A new folder appears by one rename. In a folder that exists, other files stay,
  and the file `last`, without which no reader takes the folder, is taken away
  before any other changes and comes back at the end: a kill in between leaves a
  folder that is refused and not one that pairs new files with old ones.

  Args:
    path: the folder.
    files: name to what writes the file at the path that it is given.
    last: one of the names.
  """
  folder = absolute(path)
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = folder.parent / f".{folder.name}.tmp-{uuid.uuid4().hex}"
  temporary.mkdir()
  try:
    for name, write_file in files.items():
      write_file(temporary / name)
    if folder.exists():
      (folder / last).unlink(missing_ok=True)
      for name in sorted(files, key=lambda name: name == last):
        (temporary / name).replace(folder / name)
      temporary.rmdir()
    else:
      temporary.rename(folder)
  except BaseException:
    temporary.rmtree(missing_ok=True)
    raise
