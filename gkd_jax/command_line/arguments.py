"""The words of a command line, checked; each error is one sentence."""

import argparse
import re
import shlex
from collections.abc import Sequence

from gkd_jax import checks
from gkd_jax.command_line import commands


class _Parser(argparse.ArgumentParser):
  """Raises a ValueError in place of printing a usage line."""

  def error(self, message):
    if match := re.match(r"argument (--\w+): expected", message):
      raise ValueError(f"expected a value, got none; set {match[1]}")
    raise ValueError(f"expected flags and their values, got {message}")


def parse(name: str, words: Sequence[str]) -> argparse.Namespace:
  """Returns the flags of a command, and its other words as `words`.

  Args:
    name: of the command.
    words: what follows it.

  Returns:
    A value for each of the command's flags, `words`, and `help`.

  Raises:
    ValueError: there is no such command or flag, or a value is wrong.
  """
  if name not in commands.COMMANDS:
    if name.startswith("-"):
      raise ValueError(
        f"expected a command first, got {name}; run `gkd train {name}` or"
        " `gkd --help`"
      )
    known = f"expected a command of {', '.join(commands.COMMANDS)}"
    if near := checks.nearest(name, commands.COMMANDS):
      raise ValueError(f"{known}, got {name!r}; did you mean {near[0]}?")
    raise ValueError(f"{known}, got {name!r}; run `gkd --help`")
  command = commands.COMMANDS[name]
  parser = _Parser(prog=f"gkd {name}", add_help=False, allow_abbrev=False)
  parser.add_argument("-h", "--help", action="store_true")
  for flag in command.flags:
    kind = commands.FLAGS[flag]
    options = {}
    if not kind.value:  # a switch: --dry_run, or --dry_run=true
      options = {"nargs": "?", "const": "true"}
    parser.add_argument(
      f"--{flag}", action="append" if kind.many else "store", **options
    )
  # Not as positional arguments, so that flags may stand between them.
  found, rest = parser.parse_known_args(_gin_flags(words))
  found.words = [word for word in rest if not word.startswith("-")]
  for word in rest:
    if word.startswith("-"):
      raise ValueError(_unknown_flag(name, word))
  if found.words and not command.words and not found.help:
    word = found.words[0]
    flag = f"--gin_file={word}" if "gin_file" in command.flags else "--help"
    raise ValueError(
      f"expected flags after {name}, got {word}; run `gkd {name} {flag}`"
    )
  for flag in command.flags:
    kind, text = commands.FLAGS[flag], getattr(found, flag)
    if text is None:
      value = [] if kind.many else kind.default
    elif kind.many:
      value = text
    else:
      value = kind.convert(text, f"--{flag}")
    setattr(found, flag, value)
  return found


def _gin_flags(words):
  """Rewrites `--gin.X=Y`, as in T5X, to the binding `X = Y`."""
  rewritten = []
  for word in words:
    if word.startswith("--gin."):
      name, equals, value = word[len("--gin.") :].partition("=")
      word = f"--gin_bindings={name} {equals} {value}".rstrip()
    rewritten.append(word)
  return rewritten


def _unknown_flag(name, word):
  flag = word.lstrip("-").partition("=")[0]
  of = [c for c, command in commands.COMMANDS.items() if flag in command.flags]
  if of:
    return (
      f"expected a flag of `gkd {name}`, got --{flag}, which `gkd {of[0]}` has;"
      f" run `gkd {name} --help`"
    )
  known = [*commands.COMMANDS[name].flags, "help"]
  near = checks.nearest(flag, known)
  such = f" such as --{near[0]}" if near else ""
  return (
    f"expected a flag of `gkd {name}`{such}, got {word.partition('=')[0]};"
    f" run `gkd {name} --help`"
  )


def shell_line(words: Sequence[str]) -> str:
  """Returns words as one writes them in a shell.

  >>> print(shell_line(["gkd", "train", "--gin.MODEL_DIR='run'", "--gin.SEED=1"]))
  gkd train --gin.MODEL_DIR="'run'" --gin.SEED=1
  >>> print(shell_line(["--gin.X='$HOME'"]))
  '--gin.X='"'"'$HOME'"'"''

  Args:
    words: of a command line, without a shell's quotes.
  """
  return " ".join(map(_quoted, words))


def _quoted(word):
  flag, equal, value = word.partition("=")
  special = set('"$`\\!\n') & {*value}  # inside of double quotes
  if shlex.quote(word) == word:
    return word
  if shlex.quote(flag) != flag or special:
    return shlex.quote(word)
  return f'{flag}{equal}"{value}"' if equal else shlex.quote(word)
