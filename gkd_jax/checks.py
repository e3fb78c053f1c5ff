"""Checks of settings: their types and ranges, in the words of one sentence.

Each function takes a value and the setting that it came from, a gin macro or the
name that gin binds, and raises "expected X, got Y; set SETTING". A bool is no
number, 16.0 is no whole number, and nothing is converted.
"""

import difflib
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def whole(
  value: Any,
  setting: str,
  *,
  least: int = 1,
  most: int | None = None,
  none: bool = False,
) -> None:
  """Checks a whole number.

  >>> whole(16.0, "BATCH_SIZE")
  Traceback (most recent call last):
  ValueError: expected a whole number of at least 1, got 16.0; set BATCH_SIZE

  Args:
    value: what was given.
    setting: its name.
    least: smallest allowed.
    most: largest allowed.
    none: whether None is allowed.

  Raises:
    ValueError: it is none, or outside of the range.
  """
  fits = (
    _is_a(numbers.Integral, value)
    and value >= least
    and (most is None or value <= most)
  )
  if not fits and not (none and value is None):
    of = f"of at least {least}" if most is None else f"in [{least}, {most}]"
    refuse(f"a whole number {of}{_or_none(none)}", value, setting)


def number(
  value: Any,
  setting: str,
  *,
  least: float | None = None,
  above: float | None = None,
  most: float | None = None,
  below: float | None = None,
  none: bool = False,
  schedule: bool = False,
  what: str = "a number",
  where: str = "",
) -> None:
  """Checks a finite number.

  >>> number(1.5, "STUDENT_DATA_FRACTION", least=0, most=1)
  Traceback (most recent call last):
  ValueError: expected a number in [0, 1], got 1.5; set STUDENT_DATA_FRACTION

  Args:
    value: what was given.
    setting: its name.
    least: smallest allowed.
    above: allowed numbers are larger.
    most: largest allowed.
    below: allowed numbers are smaller.
    none: whether None is allowed.
    schedule: whether a function of the step is allowed. It is not called; of
      those of `schedules` the ends are checked.
    what: the number is, such as "a temperature".
    where: what else the message says of the value, such as " at step 3".

  Raises:
    ValueError: it is none, or outside of the range.
  """
  if none and value is None:
    return

  def fits(x):
    return (
      _is_a(numbers.Real, x)
      and math.isfinite(x)
      and (least is None or x >= least)
      and (above is None or x > above)
      and (most is None or x <= most)
      and (below is None or x < below)
    )

  values = [value]
  if schedule and callable(value):
    values = getattr(value, "ends", ())
    where = ", which the schedule reaches"
  for x in values:
    if not fits(x):
      expected = what + _range(least, above, most, below)
      if schedule and not _is_a(numbers.Real, x):
        expected += ", or a schedule"
      refuse(expected + _or_none(none), x, setting, where)


def boolean(value: Any, setting: str) -> None:
  """Checks that a value is True or False.

  Raises:
    ValueError: it is neither.
  """
  if not isinstance(value, bool):
    refuse("True or False", value, setting)


def text(value: Any, setting: str, *, none: bool = False) -> None:
  """Checks that a value is a text with at least one letter.

  Raises:
    ValueError: it is not.
  """
  if not (isinstance(value, str) and value) and not (none and value is None):
    refuse(f"a text in quotes{_or_none(none)}", value, setting)


def path(value: Any, setting: str, *, none: bool = False) -> None:
  """Checks that a value can be the path of a file or folder.

  Raises:
    ValueError: it cannot.
  """
  is_path = isinstance(value, str | os.PathLike) and os.fspath(value)
  if not is_path and not (none and value is None):
    refuse(f"a path in quotes{_or_none(none)}", value, setting)


def one_of(value: Any, setting: str, known: Iterable[Any]) -> None:
  """Checks that a value is one of a few.

  >>> one_of("pmapp", "EXECUTOR", ("jit", "pmap"))
  Traceback (most recent call last):
  ValueError: expected 'pmap' or 'jit', got 'pmapp'; set EXECUTOR

  Raises:
    ValueError: it is none of them; the message names the nearest first.
  """
  known = list(known)
  if any(type(value) is type(k) and value == k for k in known):
    return
  near = nearest(value, [k for k in known if isinstance(k, str)])
  *others, last = map(repr, [*near, *(k for k in known if k not in near)])
  expected = f"{', '.join(others)} or {last}" if others else last
  refuse(expected, value, setting)


def ascending(value: Any, setting: str, *, none: bool = True) -> None:
  """Checks ascending lengths, whole numbers of at least 1.

  Raises:
    ValueError: they are not.
  """
  if none and value is None:
    return
  is_list = isinstance(value, Sequence) and not isinstance(value, str)
  lengths: list[Any] = [*value] if is_list else []
  if not (
    lengths
    and all(_is_a(numbers.Integral, x) for x in lengths)
    and lengths == sorted({*lengths})
    and lengths[0] >= 1
  ):
    refuse(
      f"ascending lengths of at least 1, such as (64, 128){_or_none(none)}",
      value,
      setting,
    )


def steps(value: Any, setting: str) -> None:
  """Checks (first, last) step, counted from 1, or None.

  Raises:
    ValueError: they are neither.
  """
  if value is None:
    return
  if not (
    isinstance(value, Sequence)
    and len(value) == 2
    and all(_is_a(numbers.Integral, step) for step in value)
    and 1 <= value[0] <= value[1]
  ):
    refuse("the first and the last step, such as (10, 13)", value, setting)


def lengths(value: Any, setting: str) -> None:
  """Checks the lengths of a task's features: name to a whole number.

  Raises:
    ValueError: they are not.
  """
  if not (
    isinstance(value, Mapping)
    and value
    and all(isinstance(name, str) for name in value)
    and all(_is_a(numbers.Integral, n) and n >= 1 for n in value.values())
  ):
    if isinstance(value, Mapping):
      value = dict(value)
    refuse(
      "lengths of at least 1, such as {'inputs': 512, 'targets': 128}",
      value,
      setting,
    )


def nearest(name: Any, known: Iterable[str]) -> list[str]:
  """Returns the known names that are like another one, the nearest first."""
  return difflib.get_close_matches(str(name), [*known], cutoff=0.5)


def refuse(expected: str, value: Any, setting: str, where: str = "") -> None:
  """Raises the ValueError of a setting.

  Args:
    expected: what would be right.
    value: what was given.
    setting: its name.
    where: what else is said of the value, such as " at step 3".

  Raises:
    ValueError: always.
  """
  raise ValueError(f"expected {expected}, got {value!r}{where}; set {setting}")


def _is_a(kind, value):
  return isinstance(value, kind) and not isinstance(value, bool)


def _or_none(none):
  return " or None" if none else ""


def _range(least, above, most, below):
  low = above if least is None else least
  high = below if most is None else most
  if high is None:
    if low is None:
      return ""
    return f" of at least {low}" if least is not None else f" above {low}"
  if low is None:
    return f" of at most {high}" if most is not None else f" below {high}"
  left = "(" if least is None else "["
  right = ")" if most is None else "]"
  return f" in {left}{low}, {high}{right}"
