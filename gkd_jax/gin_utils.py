"""Finds, parses and checks gin files."""

import copy
import difflib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

import gin
from gkd_jax import files

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def shipped_gin() -> str:
  """Returns the folder of shipped gin files, installed or in a checkout."""
  inside = os.path.join(_PACKAGE, "gin")
  return (
    inside if os.path.isdir(inside) else os.path.join(_PACKAGE, "..", "gin")
  )


def parse(
  gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
):
  """Parses gin files and bindings, and refuses a macro that nothing reads.

  Args:
    gin_files: files, looked up in the working directory, `search_paths` and
      the shipped folder.
    bindings: such as `BATCH_SIZE = 32`.
    search_paths: further folders.

  Raises:
    ValueError: a file is missing, or a macro given here is read by nothing.
  """
  _import_tensorflow()
  gin.clear_config()
  # Gin also looks for `runs/x.gin` in a Python package `runs`, and fails where a
  # folder of that name has no __init__.py. Files are files here.
  gin.config._FILE_READERS[:] = [
    (
      lambda path: files.absolute(path).open(),
      lambda path: files.absolute(path).is_file(),
    )
  ]
  expanded = map(os.path.expanduser, search_paths)
  folders = [os.getcwd(), *expanded, shipped_gin()]
  for folder in reversed(folders):
    gin.add_config_file_search_path(folder)
  gin_files = [os.path.expanduser(name) for name in gin_files]
  found = {name: _find(name, folders) for name in gin_files}
  for name, path in found.items():
    if path is None:
      raise ValueError(
        f"expected a gin file, got {name!r}, which is not in"
        f" {', '.join(folders)}; set --gin_file or --gin_search_paths"
      )
  # Gin logs an error for each folder that lacks a file before the one that
  # holds it.
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    gin.parse_config_files_and_bindings(
      gin_files, list(bindings), skip_unknown=False, finalize_config=False
    )
  finally:
    logging.set_verbosity(verbosity)
  given = [b.split("=", 1)[0].strip() for b in bindings]
  shipped = os.path.realpath(shipped_gin())
  for path in filter(None, found.values()):
    # Shipped files of sizes define a macro for each size; a run reads a few.
    if not os.path.realpath(path).startswith(shipped + os.sep):
      text = files.absolute(path).read_text()
      given += re.findall(r"^([A-Z][A-Z0-9_]*)\s*=", text, re.M)
  _check_macros(given)


def _import_tensorflow() -> None:
  """Imports TensorFlow, as gin files do, without its start-up messages.

  Its C++ code writes them to file descriptor 2 before any setting could silence
  them. They are shown if the import fails.
  """
  if "tensorflow" in sys.modules:
    return
  sys.stderr.flush()
  stderr = os.dup(2)
  with tempfile.TemporaryFile() as messages:
    os.dup2(messages.fileno(), 2)
    try:
      import tensorflow  # noqa: F401
    except BaseException:
      messages.seek(0)
      os.write(stderr, messages.read())
      raise
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)


def _find(name: str, folders: Sequence[str]) -> str | None:
  """Returns the path of a gin file, or None."""
  if files.is_remote(name):
    return name if files.absolute(name).exists() else None
  paths = (os.path.join(folder, name) for folder in folders)
  return next((path for path in paths if os.path.exists(path)), None)


def bindings(function: Callable, names: Sequence[str]) -> dict[str, Any]:
  """Returns the configured values of some of a function's arguments.

  The other arguments are not built, so that their macros need no values.

  Args:
    function: such as `train.train`.
    names: of the arguments; unbound ones are left out.

  Raises:
    ValueError: if a required argument has no value.
  """
  bound = gin.get_bindings(function, resolve_references=False)
  # Copying builds gin's references, as in `get_bindings`.
  try:
    found = copy.deepcopy({k: v for k, v in bound.items() if k in names})
  except Exception as error:  # raised by what lacks its settings
    missing = _without_value() - {
      str(v)[1:] for k, v in bound.items() if k not in names
    }
    if not missing:
      raise
    raise ValueError(_no_value(missing)) from error
  missing = {str(bound[k])[1:] for k, v in found.items() if v is gin.REQUIRED}
  if missing:
    raise ValueError(_no_value(missing))
  return found


def _without_value():
  return set(
    re.findall(r"^([A-Z][A-Z0-9_]*) = %gin.REQUIRED", gin.config_str(), re.M)
  )


def _no_value(macros):
  names = ", ".join(sorted(macros))
  return f"expected a value of each macro, got none of {names}; set {names}"


def macro(name: str) -> Any:
  """Returns the value of a macro, or None if it is not defined."""
  try:
    return gin.query_parameter(f"%{name}")
  except ValueError:
    return None


def _check_macros(given):
  config = gin.config_str()
  defined = set(re.findall(r"^([A-Z][A-Z0-9_]*)\s*=", config, re.M))
  used = set(re.findall(r"%([A-Z][A-Z0-9_]*)", config))
  for name in given:
    if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and name not in used:
      near = difflib.get_close_matches(name, used) or sorted(used & defined)
      raise ValueError(
        f"expected a macro that something reads, such as {', '.join(near)},"
        f" got {name}; set the right name"
      )
