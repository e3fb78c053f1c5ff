"""Reads and writes the files of a run, on a local disk or in a bucket.

Every file that is written appears whole or not at all: a reader, or a process
that was killed, sees the old content or the new one. A local file is written
under a temporary name and renamed. An object of a bucket (`gs://`, `s3://`)
appears when its upload ends, so it is written under its own name at once.
"""

import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

Path = os.PathLike[str] | str

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{(\w+)\})")


def expanded(path: Path) -> str:
  """Returns a path with `$NAME`, `${NAME}` and `~` filled in, as a shell does.

  Raises:
    ValueError: an environment variable is not set.
  """
  text = os.fspath(path)

  def value(match):
    name = match[1] or match[2]
    if name not in os.environ:
      raise ValueError(
        f"expected environment variables that are set, got {match[0]} in"
        f" {text!r}; set {name}, or a path without it"
      )
    return os.environ[name]

  return os.path.expanduser(_VARIABLE.sub(value, text))


def absolute(path: Path) -> epath.Path:
  """Returns the absolute path, with what `expanded` fills in.

  A URI such as `gs://bucket/folder` is absolute already.

  Raises:
    ValueError: if the file system of a URI is unknown, or a variable in the path.
  """
  try:
    place = epath.Path(expanded(path))
  except KeyError as error:
    raise ValueError(
      f"expected a local path, gs:// or s3://, got {os.fspath(path)!r}; set a"
      " path of these"
    ) from error
  return place if is_remote(place) else place.resolve()


def is_remote(path: Path) -> bool:
  """Returns whether a path is a URI of a bucket."""
  return re.match(r"\w+://", os.fspath(path)) is not None


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file, whole or not at all; its folders are made."""
  place = absolute(path)
  place.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(place):
    place.write_bytes(content)
    return
  temporary = _temporary(place)
  try:
    temporary.write_bytes(content)
    temporary.replace(place)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_text(path: Path, text: str) -> None:
  """Writes a UTF-8 text, whole or not at all."""
  write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
  """Writes a value as JSON, whole or not at all."""
  write_text(path, json.dumps(value, indent=indent) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
  """Writes one line of JSON for each row, whole or not at all."""
  write_text(path, _json_lines(rows))


def append_json_lines(path: Path, rows: Iterable[Any]) -> None:
  """Appends one line of JSON for each row.

  A last line that was cut off, as by a killed process, is dropped first.

  Objects of a bucket cannot grow, so the whole object is read and written
  again: N appends move O(N^2) bytes. That is right for a log, with a line every
  few seconds and some megabytes in the end, and for nothing larger.

  Args:
    path: the file; it is made if it does not exist.
    rows: values for `json.dumps`; what JSON does not know becomes its `str`.
  """
  place = absolute(path)
  text = _json_lines(rows)
  if is_remote(place):
    old = place.read_text() if place.exists() else ""
    write_text(place, old[: old.rfind("\n") + 1] + text)
    return
  place.parent.mkdir(parents=True, exist_ok=True)
  with open(place, "a+b") as file:
    if file.tell():
      file.seek(-1, os.SEEK_END)
      if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    file.write(text.encode())


def read_json(path: Path) -> Any:
  """Returns the value of a JSON file, or None if there is no file.

  Raises:
    ValueError: if it is not JSON.
  """
  place = absolute(path)
  if not place.exists():
    return None
  try:
    return json.loads(place.read_text())
  except ValueError as error:
    raise ValueError(
      f"expected JSON, got {error} in {place}; remove the file, or write it again"
    ) from error


def check_folder(path: Path, setting: str) -> None:
  """Checks that a local folder can be written; writes nothing.

  Args:
    path: of the folder, which need not exist yet.
    setting: what it is set with.

  Raises:
    ValueError: the nearest folder that exists cannot be written into.
  """
  place = absolute(path)
  if is_remote(place):
    return
  nearest = next(p for p in (place, *place.parents) if p.exists())
  if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
    raise ValueError(
      f"expected a folder that can be written, got {os.fspath(path)!r}, as"
      f" {nearest} is none; set {setting}"
    )


def read_json_lines(path: Path) -> list[Any]:
  """Returns the values of a file of JSON lines, [] if there is no file.

  A last line that was cut off is left out.

  Raises:
    ValueError: if another line is not JSON.
  """
  place = absolute(path)
  if not place.exists():
    return []
  rows = []
  lines = place.read_text().split("\n")
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      rows.append(json.loads(line))
    except ValueError as error:
      if number < len(lines):
        raise ValueError(
          f"expected JSON in each line, got {error} in line {number} of"
          f" {place}; remove the line"
        ) from error
  return rows


def write_folder(
  path: Path,
  writers: Mapping[str, Callable[[epath.Path], None]],
  *,
  last: str,
) -> None:
  """Writes files into a folder that readers accept only when it is complete.

  Readers refuse a folder without the file `last`. A new local folder appears by
  one rename. In a bucket, or in a folder that exists, other files stay, and
  `last` is removed before any other file changes and written at the end: a
  killed process leaves a folder that is refused, not one that pairs new files
  with old ones.

  Args:
    path: the folder.
    writers: name to a function that writes the file at the path it is given.
    last: one of the names.
  """
  folder = absolute(path)
  names = sorted(writers, key=lambda name: name == last)
  folder.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(folder):
    folder.mkdir(exist_ok=True)
    (folder / last).unlink(missing_ok=True)
    for name in names:
      writers[name](folder / name)
    return
  temporary = _temporary(folder)
  temporary.mkdir()
  try:
    for name in names:
      writers[name](temporary / name)
    if folder.exists():
      (folder / last).unlink(missing_ok=True)
      for name in names:
        (temporary / name).replace(folder / name)
      temporary.rmdir()
    else:
      temporary.rename(folder)
  except BaseException:
    temporary.rmtree(missing_ok=True)
    raise


def contents(
  named: Mapping[str, bytes],
) -> dict[str, Callable[[epath.Path], None]]:
  """Returns writers for `write_folder` of files whose content is known.

  Args:
    named: name of a file to its content.
  """
  return {
    name: lambda file, content=content: file.write_bytes(content)
    for name, content in named.items()
  }


def _temporary(place: epath.Path) -> epath.Path:
  return place.parent / f".{place.name}.tmp-{uuid.uuid4().hex}"


def _json_lines(rows: Iterable[Any]) -> str:
  return "".join(json.dumps(row, default=str) + "\n" for row in rows)
