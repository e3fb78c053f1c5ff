"""Rows of JSONL, CSV, TSV and Parquet files, with the places of those that are bad."""

import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from gkd_jax import files


class Row(NamedTuple):
  """A row of a file.

  Attributes:
    place: `path:line`; of Parquet, the number of the row, from 1.
    fields: name to value; None of a bad row.
    problem: what is wrong with it; "" of a good one.
  """

  place: str
  fields: dict[str, Any] | None
  problem: str = ""


def find(patterns: str | Sequence[str], setting: str) -> list[epath.Path]:
  """Returns the files that paths and globs name, in the order of their names.

  Args:
    patterns: a path or glob (`data/*.jsonl`), or several.
    setting: what they are set with.

  Raises:
    ValueError: one names no file, or a file of an unknown kind.
  """
  found: list[epath.Path] = []
  for pattern in [patterns] if isinstance(patterns, str) else patterns:
    paths = _matches(files.absolute(pattern))
    if not paths:
      raise ValueError(f"expected files, got none at {pattern}; set {setting}")
    for path in paths:
      if path.suffix not in _READERS:
        raise ValueError(
          f"expected files of {', '.join(_READERS)}, got {path}; set {setting}"
        )
    found += [path for path in paths if path not in found]
  return found


class Stamp(NamedTuple):
  """What tells that a file has changed.

  Attributes:
    path: of the file.
    size: in bytes.
    time: of its last modification, in nanoseconds; of a bucket's, in seconds.
  """

  path: str
  size: int
  time: int


def stamp(path: epath.Path) -> Stamp:
  """Returns what another read of the file is compared by.

  Args:
    path: from `find`.
  """
  name = os.fspath(path)
  if files.is_remote(name):
    found = path.stat()
    return Stamp(name, found.length, found.mtime)
  status = os.stat(name)
  return Stamp(name, status.st_size, status.st_mtime_ns)


def read(path: epath.Path) -> Iterator[Row]:
  """Yields the rows of a file; empty lines are none.

  Args:
    path: from `find`; its suffix says what it is.

  Raises:
    ValueError: a Parquet file is damaged, which has no rows then.
  """
  return _READERS[path.suffix](path)


def _matches(path):
  """Returns the files that a path or a glob names, sorted."""
  parts = path.parts
  wild = [i for i, part in enumerate(parts) if any(c in part for c in "*?[")]
  if not wild or path.is_file():
    return [path] if path.is_file() else []
  # Of the path itself, since a bucket's parts do not join to it again.
  root = path.parents[len(parts) - wild[0] - 1]
  found = root.glob("/".join(parts[wild[0] :])) if root.exists() else ()
  return sorted(p for p in found if p.is_file())


def _json_lines(path):
  content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
  for number, line in enumerate(content.split(b"\n"), start=1):
    place = f"{path}:{number}"
    if not line.strip():
      continue
    try:
      value = json.loads(line.decode())
    except UnicodeDecodeError:
      yield Row(place, None, "not UTF-8")
    except ValueError as error:
      yield Row(place, None, f"not JSON ({error})")
    else:
      is_row = isinstance(value, dict)
      kind = "" if is_row else f"{type(value).__name__} and no JSON object"
      yield Row(place, value if is_row else None, kind)


def _table(path, delimiter):
  csv.field_size_limit(sys.maxsize)
  # A row with other bytes is found below; the lines are counted on.
  text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
  reader = csv.reader(
    io.StringIO(text, newline=""), delimiter=delimiter, strict=True
  )
  names: list[str] | None = None
  while True:
    place = f"{path}:{reader.line_num + 1}"
    try:
      cells = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      yield Row(place, None, f"not CSV ({error})")
      continue
    if not cells:
      continue
    if names is None:
      names = cells
    elif any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
      yield Row(place, None, "not UTF-8")
    elif len(cells) != len(names):
      yield Row(place, None, f"{len(cells)} cells in {len(names)} columns")
    else:
      yield Row(place, dict(zip(names, cells, strict=True)))


def _parquet(path):
  import pyarrow.parquet

  try:
    table = pyarrow.parquet.read_table(io.BytesIO(path.read_bytes()))
    batches = [batch.to_pylist() for batch in table.to_batches()]
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"expected a whole Parquet file, got {str(error).splitlines()[0]} in"
      f" {path}; write it again, or set other files"
    ) from error
  for number, fields in enumerate(itertools.chain(*batches), start=1):
    yield Row(f"{path}:{number}", fields)


_READERS = {
  ".jsonl": _json_lines,
  ".ndjson": _json_lines,
  ".csv": lambda path: _table(path, ","),
  ".tsv": lambda path: _table(path, "\t"),
  ".parquet": _parquet,
}
