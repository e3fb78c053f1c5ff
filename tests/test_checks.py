"""Checks of settings: what passes, and the sentence about what does not."""

import numpy as np
import pytest

from gkd_jax import checks


def said(check, value, **options):
  """The sentence about a value of the setting S; None if it passes."""
  try:
    check(value, "S", **options)
  except ValueError as error:
    return str(error)
  return None


@pytest.mark.parametrize("value", [1, 7, np.int32(3), 10**12])
def test_whole_numbers_pass(value):
  assert said(checks.whole, value) is None


@pytest.mark.parametrize("value", [0, -4, 16.0, None, "16", True, float("nan")])
def test_what_is_no_whole_number_of_at_least_1(value):
  assert said(checks.whole, value) == (
    f"expected a whole number of at least 1, got {value!r}; set S"
  )


def test_none_and_ranges_of_whole_numbers():
  assert said(checks.whole, None, none=True) is None
  assert "at least 1 or None, got 0" in said(checks.whole, 0, none=True)
  assert said(checks.whole, 0, least=0) is None
  assert "in [2, 9], got 10" in said(checks.whole, 10, least=2, most=9)


@pytest.mark.parametrize(
  ("options", "inside", "outside", "said_"),
  [
    ({"least": 0, "most": 1}, (0, 1, 0.5), (-0.1, 1.1), "in [0, 1]"),
    ({"least": 0, "below": 1}, (0, 0.999), (1, -1e-9), "in [0, 1)"),
    ({"above": 0, "most": 1}, (1e-30, 1), (0, 2), "in (0, 1]"),
    ({"above": 0}, (1e-30, 1e30), (0, -1), "above 0"),
    ({"least": 0}, (0, np.float32(3)), (-1,), "of at least 0"),
    ({"most": 5}, (5, -9), (6,), "of at most 5"),
    ({}, (-1e9, 1e9), (), ""),
  ],
)
def test_ranges_of_numbers(options, inside, outside, said_):
  for value in inside:
    assert said(checks.number, value, **options) is None, value
  for value in (*outside, float("nan"), float("inf"), "1", None, True):
    found = said(checks.number, value, **options)
    assert found and f"a number{said_ and ' ' + said_}, got" in found, value


def test_schedules_are_numbers_where_they_may_be():
  assert said(checks.number, lambda step: 1.0, schedule=True) is None
  assert "got <function" in said(checks.number, lambda step: 1.0)
  assert "or a schedule, got '1'" in said(checks.number, "1", schedule=True)


def test_texts_paths_and_truth_values(tmp_path):
  assert said(checks.text, "a") is None and said(checks.path, tmp_path) is None
  assert said(checks.text, None, none=True) is None
  for value in ("", 3, None):
    assert f"in quotes, got {value!r}; set S" in said(checks.text, value)
    assert f"in quotes, got {value!r}; set S" in said(checks.path, value)
  assert said(checks.boolean, False) is None
  for value in (0, 1, "True", None):
    assert f"True or False, got {value!r}" in said(checks.boolean, value)


def test_the_nearest_name_comes_first():
  known = ("forward_kl", "jsd", "reverse_kl")
  assert said(checks.one_of, "jsd", known=known) is None
  assert "expected 'reverse_kl', 'forward_kl' or 'jsd', got 'revers_kl'" in (
    said(checks.one_of, "revers_kl", known=known)
  )
  assert "expected 'forward_kl', 'jsd' or 'reverse_kl', got 7" in said(
    checks.one_of, 7, known=known
  )


def test_lengths():
  assert said(checks.ascending, (64, 128)) is None
  assert said(checks.ascending, None) is None
  for value in ((), (0, 2), (3, 2), (2, 2), (2.0, 3), 64, "64", {64: 1}):
    assert "ascending lengths of at least 1" in said(checks.ascending, value)
  assert said(checks.lengths, {"inputs": 1, "targets": 9}) is None
  for value in ({}, {"inputs": 0}, {"inputs": 8.0}, {1: 1}, 64, None, [64]):
    assert "lengths of at least 1, such as {'inp" in said(checks.lengths, value)
  assert said(checks.steps, (10, 10)) is None
  assert said(checks.steps, None) is None
  for value in ((3,), (0, 2), (5, 4), (1.0, 2), 3, "10", ("1", "2")):
    assert "such as (10, 13), got" in said(checks.steps, value)
