"""Paths that a user gives, local or of a bucket."""

import os

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
