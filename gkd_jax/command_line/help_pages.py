"""`gkd --help`, `gkd COMMAND --help` with the macros of gin files, `--version`."""

import contextlib
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
import textwrap
import tokenize
from collections.abc import Iterator, Sequence

import gkd_jax
from gkd_jax.command_line import commands, gin_files

# Shipped folders of what a run has without a choice: defaults, and sizes to name.
_DEFAULTS = "runs/", "models/"


def version() -> str:
  """Returns this program's version, and those of what it stands on."""
  parts = [f"Python {platform.python_version()}"]
  for name in ("jax", "jaxlib", "libtpu", "flax", "tensorflow", "seqio"):
    try:
      parts.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  if commit := _commit():
    parts.append(f"commit {commit}")
  return f"gkd {gkd_jax.__version__} ({', '.join(parts)})"


def _commit() -> str:
  """Returns the commit of a checkout, with a + if files differ; "" of a package."""
  root = os.path.dirname(os.path.dirname(os.path.abspath(gkd_jax.__file__)))
  if not os.path.exists(os.path.join(root, ".git")):
    return ""
  words = ["git", "-C", root, "describe", "--always", "--dirty=+"]
  try:
    done = subprocess.run(words, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return ""
  return done.stdout.strip()


def of_all() -> str:
  """Returns the help of `gkd`: each command with a line."""
  lines = [
    "gkd trains small language models on their own outputs, to imitate large"
    " ones.",
    "",
    "usage: gkd COMMAND [flags]",
    "",
    "commands:",
    *_table((n, c.summary) for n, c in commands.COMMANDS.items()),
    "",
    "example:",
    *_example(commands.COMMANDS["train"]),
    "",
    "`gkd COMMAND --help` lists a command's flags and settings; `gkd --version`"
    " prints the version; GKD_TRACEBACK=1 shows the traceback of an error.",
  ]
  return _wrapped(lines)


def of_command(
  name: str,
  gin_file: Sequence[str] = (),
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
) -> str:
  """Returns the help of a command: its flags, and the macros of gin files.

  Args:
    name: of the command.
    gin_file: files that were given; by default the command's first run file.
    bindings: that were given.
    search_paths: see `gin_files.folders`.

  Raises:
    ValueError: a file is missing, or is not in gin's syntax.
  """
  command = commands.COMMANDS[name]
  usage = f"usage: gkd {name}"
  if command.run_files:
    usage += " --gin_file=FILE ... [--gin.NAME=VALUE ...]"
  if command.words:
    usage += f" {command.words}"
  flags = (
    (f"--{flag}" + (kind.value and f"={kind.value}"), kind.help)
    for flag, kind in ((f, commands.FLAGS[f]) for f in command.flags)
  )
  lines = [
    command.summary,
    "",
    usage + (" [flags]" if command.flags else ""),
    "",
    "example:",
    *_example(command),
    "",
    "flags:",
    *_table([*flags, ("-h, --help", "Shows this page.")]),
  ]
  if command.run_files:
    names = gin_file or command.run_files[:1]
    settings = gin_files.read(names, bindings, search_paths)
    lines += ["", f"settings of {', '.join(names)}:", *_settings(settings)]
    others = [file for file in command.run_files if file not in names]
    lines += [
      "",
      "A text needs its quotes: --gin.NAME='\"text\"'. Other files to"
      f" start from: {', '.join(others)}; `gkd {name} --gin_file=FILE --help`"
      " lists the settings of any file.",
    ]
  return _wrapped(lines)


def of_run(
  gin_file: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> str:
  """Returns what a run sets, without the defaults of the shipped files.

  Args:
    gin_file: files that were given.
    bindings: that were given.
    search_paths: see `gin_files.folders`.
  """
  last: dict[tuple[str, str, str], gin_files.Binding] = {}
  for binding in gin_files.read(gin_file, bindings, search_paths):
    parts = binding.scope, binding.selector, binding.argument
    last.pop(parts, None)  # listed where it is set last
    last[parts] = binding
  of_file: dict[str, list[str]] = {}
  titles = {path: _title(path) for path in {b.file for b in last.values()}}
  for parts, binding in last.items():
    title = titles[binding.file]
    if not title.startswith(_DEFAULTS):
      scope, selector, argument = parts
      name = "/".join(filter(None, (scope, selector)))
      name = ".".join(filter(None, (name, argument)))
      line = f"    {name} = {_value_and_comment(binding)[0]}"
      of_file.setdefault(title, []).append(line)
  lines = ["settings, besides the defaults, which `gkd train --help` lists:"]
  for title, rows in of_file.items():
    lines += [f"  {title}:", *rows]
  return "\n".join(lines)


def _settings(bindings) -> Iterator[str]:
  """Yields lines about macros, those without a value first, then by file."""
  last = {b.selector: b for b in bindings if not b.argument}
  required = gin_files.Macro("gin.REQUIRED")
  of_file: dict[str, list[tuple[str, str]]] = {"must be set": []}
  for name, binding in last.items():
    value, comment = _value_and_comment(binding)
    if binding.value == required:
      of_file["must be set"].append((name, comment))
    else:
      title = _title(binding.file)
      of_file.setdefault(title, []).append((f"{name} = {value}", comment))
  for title, rows in of_file.items():
    if rows:
      yield f"  {title}:"
      yield from _table(rows, indent=4)


def _title(path):
  """Returns how a file is named: from the shipped folder, or as it is."""
  if path is None:
    return "command line"
  inside = os.path.relpath(os.path.realpath(path), gin_files.shipped())
  return path if inside.startswith("..") else inside


def _value_and_comment(binding):
  value, comment = binding.text, ""
  # A `#` may also stand in a text.
  with contextlib.suppress(tokenize.TokenError, SyntaxError):
    for token in tokenize.generate_tokens(io.StringIO(value).readline):
      if token.type == tokenize.COMMENT:
        value, comment = value[: token.start[1]].strip(), token.string[1:]
        break
  if value.endswith(("{", "(", "[", ",", "\\")):  # goes on in the next line
    value = (
      f"{value[:1]}...{ {'{': '}', '(': ')', '[': ']'}.get(value[:1], '') }"
    )
  return value, comment.strip()


def _example(command):
  return [f"  {command.example}"]


def _table(rows, indent=2) -> Iterator[str]:
  """Yields rows in two columns; a wide first column has a line of its own."""
  rows = list(rows)
  most = min(28, _width() // 2 - indent - 4)
  wide = max([len(row[0]) for row in rows if len(row[0]) <= most], default=0)
  margin = " " * indent
  room = _width() - indent - wide - 2
  for name, text in rows:
    first, *others = textwrap.wrap(text, room) or [""]
    if len(name) > wide:
      yield margin + name
      if text:
        yield f"{margin}{'':{wide}}  {first}"
    else:
      yield f"{margin}{name:{wide}}  {first}".rstrip()
    for other in others:
      yield f"{margin}{'':{wide}}  {other}"


def _wrapped(lines):
  """Returns a page whose sentences are wrapped; indented lines stay."""
  result = []
  for line in lines:
    if line.startswith(" ") or not line:
      result.append(line)
    else:
      result += textwrap.wrap(line, _width(), break_on_hyphens=False)
  return "\n".join(result)


def _width():
  return min(shutil.get_terminal_size((80, 24)).columns, 100)
