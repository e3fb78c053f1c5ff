"""Parses gin files, and checks what they leave open."""

import copy
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging

import gin
from gin import config as gin_config
from gkd_jax import checks, files
from gkd_jax.command_line import gin_files


def parse(
  names: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
):
  """Parses gin files and bindings, and refuses a macro that nothing reads.

  Args:
    names: files, looked up in the working directory, `search_paths` and the
      shipped folder.
    bindings: such as `BATCH_SIZE = 32`.
    search_paths: further folders.

  Raises:
    ValueError: a file is missing, a name in it is unknown, or a macro given
      here is read by nothing.
  """
  gin_files.check_read(gin_files.read(names, bindings, search_paths))
  import_tensorflow()
  gin.clear_config()
  # Gin also looks for `runs/x.gin` in a Python package `runs`, and fails where a
  # folder of that name has no __init__.py. Files are files here.
  gin_config._FILE_READERS[:] = [
    (
      lambda path: files.absolute(path).open(),
      lambda path: files.absolute(path).is_file(),
    )
  ]
  gin_config._LOCATION_PREFIXES[:] = ["", *gin_files.folders(search_paths)]
  # Gin logs an error for each folder that lacks a file before the one that
  # holds it.
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    gin.parse_config_files_and_bindings(
      [*map(files.expanded, names)],
      list(bindings),
      skip_unknown=False,
      finalize_config=False,
    )
  except (ImportError, AttributeError, NameError, ValueError) as error:
    sentence = _unknown_name(error)
    if not sentence:
      raise
    raise ValueError(sentence) from error
  finally:
    logging.set_verbosity(verbosity)


def _unknown_name(error):
  """Returns the sentence about a name that gin does not find, or None."""
  reason, _, place = str(error).partition("\n  In ")
  match = re.match(
    r'(?:file "(.*)",|bindings string) line (\d+)\n *(.*)', place
  )
  if not match:
    return None
  file, line, text = match.groups()
  is_import = re.match(r"(from|import) ", text)
  if is_import and not isinstance(error, ImportError):
    return None  # of the module's own code
  got = f"{text!r} in line {line} of {file}" if file else f"--gin.{text}"
  reason = re.sub(r"<module '([\w.]+)' from .*?>", r"\1", reason).strip(".")
  if is_import:
    return (
      f"expected a Python module, got {got} ({reason}); set the import or"
      " PYTHONPATH"
    )
  argument = text.partition("=")[0].strip().rpartition(".")[2].upper()
  macro = argument if argument in _macros() else "the right name"
  return f"expected a setting that exists, got {got} ({reason}); set {macro}"


def import_tensorflow() -> None:
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


def bindings(function: Callable, names: Sequence[str]) -> dict[str, Any]:
  """Returns the configured values of some of a function's arguments.

  The other arguments are not built, so that their macros need no values.

  Args:
    function: such as `train.train`.
    names: of the arguments; unbound ones are left out.

  Raises:
    ValueError: required settings have no value; all are named.
  """
  check_values(function, names, _PATHS)
  bound = gin.get_bindings(function, resolve_references=False)
  # Copying builds gin's references, as in `get_bindings`.
  return copy.deepcopy({k: v for k, v in bound.items() if k in names})


# Arguments of what is built: paths that are read where nothing else says sizes or
# tokenizers. A run that is not to start may lack them.
_PATHS = "checkpoint_path", "student_path", "teacher_path"


def check_values(
  function: Callable,
  names: Sequence[str] | None = None,
  without: Sequence[str] = (),
) -> None:
  """Checks that all that will be built has values; builds nothing.

  Args:
    function: such as `train.train`.
    names: of the arguments that are needed; None for all.
    without: of arguments, of whatever is built, that need no value.

  Raises:
    ValueError: required settings have no value, or a macro that is read is
      none; all are named.
  """
  configurable = gin_config._inverse_lookup(function)
  name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
  if configurable is None or not gin.get_bindings(function, False):
    raise ValueError(
      f"expected gin files that bind {name}, as those of runs/ do, got none;"
      " set --gin_file"
    )
  missing: dict[str, None] = {}
  for setting, value in _values(configurable, [], names, without):
    for nested in gin_config._iterate_flattened_values(value):
      if str(nested) == "%gin.REQUIRED":
        missing[setting] = None
    if value is _UNSET_MACRO:
      near = checks.nearest(setting, _macros())
      such = f" such as {near[0]}" if near else ""
      raise ValueError(
        f"expected a macro that is set{such}, got %{setting}; set {setting} or"
        " what reads it"
      )
    if value is _NO_VALUE:
      missing[setting] = None
  if missing:
    what = "macro" if all(name.isupper() for name in missing) else "setting"
    names_ = ", ".join(missing)
    raise ValueError(
      f"expected a value of each {what}, got none of {names_}; set {names_}"
    )


_UNSET_MACRO, _NO_VALUE = object(), object()


def _values(
  configurable, scope, names=None, without=(), called=True, seen=None
) -> Iterator[tuple[str, Any]]:
  """Yields setting and value of all that building something reads.

  Args:
    configurable: gin's.
    scope: in which it is called.
    names: of the arguments that are needed; None for all.
    without: see `check_values`.
    called: whether it is called with nothing else.
    seen: what was visited.
  """
  seen = set() if seen is None else seen
  key = configurable.selector, tuple(scope)
  if key in seen:
    return
  seen.add(key)
  with gin.config_scope(scope):
    bound = gin.get_bindings(configurable.wrapped, resolve_references=False)
  is_macro = configurable.selector == "gin.macro"
  if is_macro and not bound:
    yield "/".join(scope), _UNSET_MACRO
  elif called and not is_macro:
    for name in _required(configurable.wrapped):
      if name not in bound and (names is None or name in names):
        yield f"{configurable.selector}.{name}", _NO_VALUE
  for name, value in bound.items():
    if (names is not None and name not in names) or name in without:
      continue
    setting = f"{configurable.selector}.{name}"
    yield "/".join(scope) if is_macro else setting, value
    for part in gin_config._iterate_flattened_values(value):
      if not isinstance(part, gin_config.ConfigurableReference):
        continue
      target: Any = part.configurable
      if target.selector != "gin.constant":
        yield from _values(
          target,
          part.scopes or scope,
          without=without,
          called=part.evaluate,
          seen=seen,
        )


def _required(function):
  """Yields the names of arguments without a default."""
  try:
    parameters = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):
    return  # of C
  for parameter in parameters:
    if parameter.default is parameter.empty and parameter.kind in (
      parameter.POSITIONAL_OR_KEYWORD,
      parameter.KEYWORD_ONLY,
    ):
      yield parameter.name


def _macros():
  """Returns the names of macros that are set."""
  return {
    scope for scope, selector in gin_config._CONFIG if selector == "gin.macro"
  }


def macro(name: str) -> Any:
  """Returns the value of a macro, or None if it is not defined."""
  try:
    return gin.query_parameter(f"%{name}")
  except ValueError:
    return None
