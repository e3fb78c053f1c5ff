"""Finds gin files and reads them as text, without what they import.

What is wrong with a file, an include or a binding is so known in a tenth of a
second, before anything heavy is imported. Also what `gkd COMMAND --help` says
about macros.
"""

import collections
import dataclasses
import difflib
import functools
import json
import os
import re
import shlex
import tokenize
from collections.abc import Iterator, Sequence
from typing import Any

from gin import config_parser
from gkd_jax import files

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclasses.dataclass(frozen=True)
class Macro:
  """A macro in a value, `%NAME`."""

  name: str


@dataclasses.dataclass(frozen=True)
class Reference:
  """A function or class in a value, `@name` or `@name()`."""

  name: str
  evaluate: bool


@dataclasses.dataclass(frozen=True)
class Binding:
  """One `NAME = value` of a file or of the command line.

  Attributes:
    scope: "" without one.
    selector: what is bound, a macro's name or a configurable's.
    argument: of the configurable; "" of a macro.
    value: with `Macro` and `Reference` in place of what they stand for.
    file: path; None of the command line.
    text: the value and its comment, as they are written, if on one line.
    asked: whether it is in a file that was named, or on the command line, and
      not in one that was included or comes with the package.
  """

  scope: str
  selector: str
  argument: str
  value: Any
  file: str | None
  text: str
  asked: bool

  def macros(self) -> Iterator[str]:
    """Yields the names of the macros that the value reads."""
    yield from _macros(self.value)

  def replaces(self, other: "Binding") -> bool:
    """Returns whether a later binding is of the same argument as another."""
    mine, its = ("." + name for name in (self.selector, other.selector))
    return (
      self.scope == other.scope
      and self.argument == other.argument
      and (mine.endswith(its) or its.endswith(mine))
    )


def shipped() -> str:
  """Returns the folder of shipped gin files, installed or in a checkout."""
  inside = os.path.join(_PACKAGE, "gin")
  return (
    inside
    if os.path.isdir(inside)
    else os.path.join(os.path.dirname(_PACKAGE), "gin")
  )


def folders(search_paths: Sequence[str]) -> list[str]:
  """Returns where gin files are looked up, in this order."""
  return [os.getcwd(), *map(files.expanded, search_paths), shipped()]


def find(name: str, folders: Sequence[str], by: str = "--gin_file") -> str:
  """Returns the path of a gin file.

  Args:
    name: a path, or one below one of the folders.
    folders: see `folders`.
    by: what names it, for the error.

  Raises:
    ValueError: there is none.
  """
  name = files.expanded(name)
  if files.is_remote(name):
    paths = [name] if files.absolute(name).is_file() else []
  else:
    paths = [os.path.join(folder, name) for folder in folders]
    paths = [path for path in paths if os.path.isfile(path)]
  if paths:
    return paths[0]
  # The ending alone makes no name like another.
  stems = [file.removesuffix(".gin") for file in _shipped_names()]
  near = difflib.get_close_matches(name.removesuffix(".gin"), stems, 1)
  like = f" such as {near[0]}.gin" if near else ""
  raise ValueError(
    f"expected a gin file{like}, got {name!r}, which is not in"
    f" {', '.join(folders)}; set {by} or --gin_search_paths"
  )


def read(
  gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> list[Binding]:
  """Reads files, what they include, and bindings, in gin's order.

  Args:
    gin_files: see `gin_settings.parse`.
    bindings: such as `BATCH_SIZE = 32`.
    search_paths: further folders.

  Raises:
    ValueError: a file is missing, or is not in gin's syntax.
  """
  places = folders(search_paths)
  found: list[Binding] = []
  for name in gin_files:
    found += _read_file(find(name, places), places, True, ())
  known = {b.selector for b in found if not b.argument}
  for text in bindings:
    try:
      found += _statements(text, None, places, True, ())
    except (SyntaxError, tokenize.TokenError, ValueError) as error:
      raise ValueError(_wrong_binding(text, known)) from error
  return found


def check_read(bindings: Sequence[Binding]) -> None:
  """Checks that something reads each macro that a user sets.

  A binding that a user replaces on purpose, as `--gin.train.seed=1` does with
  `train.seed = %SEED`, still counts as reading its macro.

  Raises:
    ValueError: nothing reads one; the message names the nearest.
  """
  shipped_files = os.path.realpath(shipped()) + os.sep
  of_users = {
    path
    for path in {binding.file for binding in bindings}
    if path is None or not os.path.realpath(path).startswith(shipped_files)
  }
  used = set()
  # Later bindings of included files, looked up by what a replaced binding shares
  # with them: comparing all pairs takes longer than reading the files.
  later = collections.defaultdict(list)
  for binding in reversed(bindings):
    name = binding.selector.rpartition(".")[2]
    alike = later[binding.scope, binding.argument, name]
    if not any(b.replaces(binding) for b in alike):
      used.update(binding.macros())
    if not binding.asked:
      alike.append(binding)
  defined = {b.selector for b in bindings if not b.argument}
  for binding in bindings:
    # Shipped files of sizes define a macro for each size; a run reads a few.
    of_user = binding.asked and binding.file in of_users
    name = binding.selector
    if of_user and not binding.argument and name not in used:
      near = difflib.get_close_matches(name.upper(), sorted(used & defined), 1)
      such = f" such as {near[0]}" if near else ""
      raise ValueError(
        f"expected a macro that something reads{such}, got {name}; set the right"
        " name, which `gkd COMMAND --help` lists"
      )


def _macros(value):
  if isinstance(value, Macro):
    yield value.name
  elif isinstance(value, dict):
    for part in value.items():
      yield from _macros(part)
  elif isinstance(value, list | tuple):
    for part in value:
      yield from _macros(part)


class _Delegate(config_parser.ParserDelegate):
  """Leaves references and macros as they are."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return Reference(scoped_configurable_name, evaluate)

  def macro(self, macro_name):
    return Macro(macro_name)


def _read_file(path, places, asked, includers):
  """Returns the bindings of a file and of what it includes."""
  if path in includers:
    raise ValueError(
      f"expected gin files that do not include each other, got {path}, which"
      f" {includers[-1]} includes; set its includes"
    )
  try:
    text = files.absolute(path).read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"expected a gin file, got {path}, which cannot be read ({error});"
      " set --gin_file"
    ) from error
  try:
    return _statements(text, path, places, asked, (*includers, path))
  except (SyntaxError, tokenize.TokenError) as error:
    # Of several lines the last one says what is wrong.
    reason, place = str(error.args[0]).split("\n")[-1].strip(), error.args[1]
    number = place[1] if isinstance(error, SyntaxError) else place[0]
    lines = text.splitlines() or [""]
    line = lines[min(number, len(lines)) - 1].strip()
    raise ValueError(
      f"expected gin's syntax, got {line!r} in line {number} of {path}"
      f" ({reason}); set it as in runs/base.gin, texts in quotes"
    ) from error


def _statements(text, path, places, asked, includers):
  found = []
  lines = text.splitlines()
  for statement in _parsed(text):
    if isinstance(statement, config_parser.IncludeStatement):
      by = f"the include of {path}" if path else "--gin_file"
      included = find(statement.filename, places, by)
      found += _read_file(included, places, False, includers)
    elif isinstance(statement, config_parser.BindingStatement):
      scope, selector, argument, value, location = statement
      if not argument and scope:
        scope, selector = "", f"{scope}/{selector}"
      line = lines[location.line_num - 1]
      written = line.partition("=")[2].strip()
      found.append(
        Binding(scope, selector, argument or "", value, path, written, asked)
      )
  return found


# A start of `gkd` reads its files three times.
@functools.lru_cache(maxsize=256)
def _parsed(text):
  """Returns gin's statements of a text."""
  return tuple(config_parser.ConfigParser(text, _Delegate()))


def _wrong_binding(text, known):
  """Returns the sentence about a binding that gin cannot read."""
  name, equals, value = (part.strip() for part in text.partition("="))
  if not equals or not value:
    return (
      f"expected a value of {name}, got none; set --gin.{name or 'NAME'}=VALUE"
    )
  if not re.fullmatch(r"(\w+/)*\w+(\.\w+)*", name):
    return f"expected the name of a setting, got {name!r}; set --gin.NAME=VALUE"
  words = {"true": "True", "false": "False", "none": "None", "null": "None"}
  if value.lower() in words:
    right = words[value.lower()]
  elif value in known:
    right = f"%{value}"
  elif value[0] in "{[(@%'\"0123456789+-":
    return (
      f"expected a number, a text in quotes, a list, a dictionary, @name or"
      f" %MACRO, got {value}; set {name}"
    )
  else:
    right = json.dumps(value)
    return (
      f"expected a text in quotes, got {value};"
      f" set {shlex.quote(f'--gin.{name}={right}')}"
    )
  return f"expected {right}, got {value}; set --gin.{name}={right}"


def _shipped_names():
  root = shipped()
  return [
    os.path.relpath(os.path.join(folder, name), root)
    for folder, _, names in os.walk(root)
    for name in names
    if name.endswith(".gin")
  ]
