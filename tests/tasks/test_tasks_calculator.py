"""The external calculator and exact match of GSM8K."""

import json
import pathlib
import re
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest

from gkd_jax.tasks import calculator

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("12+7-30", Fraction(-11)),
    ("2 + 3 * 4", Fraction(14)),
    ("(2 + 3) x 4", Fraction(20)),
    ("$1,200 ÷ 3", Fraction(400)),
    ("10 / 20%", Fraction(50)),
    ("1 / 3", Fraction(1, 3)),
    ("120*.6", Fraction(72)),
    ("007 + 1", Fraction(8)),
    ("0.1 + 0.2", Fraction(3, 10)),
    ("5 - -3", Fraction(8)),
    ("1 / 0", None),
    ("(2 + 3", None),
    ("2 ** 3", None),
    ("two + 3", None),
    ("'2' + 3", None),
    ("", None),
    ("__import__('os')", None),
  ],
)
def test_evaluate(text, value):
  assert calculator.evaluate(text) == value


@hypothesis.settings(deadline=None, max_examples=50, derandomize=True)
@hypothesis.given(
  st.lists(
    st.tuples(st.sampled_from("+-*"), st.integers(0, 999)),
    min_size=2,
    max_size=5,
  )
)
def test_a_wrong_result_becomes_the_one_that_python_computes(terms):
  expression = "".join(f" {sign} {number}" for sign, number in terms)[3:]
  value = eval(expression)
  text = f"So {expression} = {value + 1} apples"
  assert (
    calculator.apply_calculator(text) == f"So {expression} = {value} apples"
  )
  right = f"So {expression} = {value} apples"
  assert calculator.apply_calculator(right) == right


@pytest.mark.parametrize(
  ("text", "corrected"),
  [
    # Later numbers written like the wrong result follow it, in words and in
    # equations; others (13.5, 130) do not.
    (
      "3 * 4 = 13. 13 + 1 = 14, not 13.5 or 130. The answer is 14.",
      "3 * 4 = 12. 12 + 1 = 13, not 13.5 or 130. The answer is 13.",
    ),
    ("2 x $600 = $1,100.", "2 x $600 = $1200."),
    ("(3 + 4 = 8)", "(3 + 4 = 7)"),
    ("3 - 5 = 2, then 2", "3 - 5 = -2, then 2"),
    ("3 - 5 = -3, then 3", "3 - 5 = -2, then 3"),
    ("1 / 4 = 0.5", "1 / 4 = 0.25"),
    # Rounded as written.
    ("2 / 3 = 0.67", "2 / 3 = 0.67"),
    ("2 / 3 = 0.66", "2 / 3 = 0.666667"),
    # Percent may be meant either way.
    ("100% - 40% = 60%", "100% - 40% = 60%"),
    ("100% - 40% = 50%", "100% - 40% = 60%"),
    ("20% * 50 = 11", "20% * 50 = 10"),
    # Parts of something longer.
    ("3 hours * 2/3 = 6 hours", "3 hours * 2/3 = 6 hours"),
    ("1 1/2 * 4 = 6", "1 1/2 * 4 = 6"),
    ("3 / 2 = 1 1/2", "3 / 2 = 1 1/2"),
    ("2 * 8 = 8 + 8 = 17", "2 * 8 = 8 + 8 = 16"),
    ("1/2 * 1/2 = 1/4", "1/2 * 1/2 = 1/4"),
    # Nothing to compute.
    ("", ""),
    ("x = 3", "x = 3"),
    ("5 / 0 = 7", "5 / 0 = 7"),
  ],
)
def test_apply_calculator(text, corrected):
  assert calculator.apply_calculator(text) == corrected


@pytest.mark.parametrize(
  ("text", "number"),
  [
    ("5 + 2 = 7. The answer is 7.", 7),
    ("The answer is $1,007.50.", Fraction("1007.5")),
    ("The answer is -3. Then 8 more.", -3),
    ("the answer is: 4. No, the answer is 5.", 5),
    ("so 21-15", 15),
    ("it is -2", -2),
    ("none", None),
  ],
)
def test_final_number(text, number):
  assert calculator.final_number(text) == number


def test_accuracy_without_and_with_the_calculator():
  targets = ["3 * 4 = 12. The answer is 12."] * 4
  predictions = [
    "3 * 4 = 12. The answer is 12.0.",
    "3 * 4 = 13. The answer is 13.",  # the calculator rescues it
    "3 + 4 = 12. The answer is 12.",  # and finds this one out
    "I do not know.",
  ]
  assert calculator.final_number_accuracy(targets, predictions) == {
    "accuracy": 50.0,
    "accuracy_with_calculator": 50.0,
  }
  assert calculator.final_number_accuracy(targets[:2], predictions[:2]) == {
    "accuracy": 50.0,
    "accuracy_with_calculator": 100.0,
  }


def test_accuracy_needs_references():
  with pytest.raises(ValueError, match="reference with a number"):
    calculator.final_number_accuracy(["none"], ["1"])
  with pytest.raises(ValueError, match="at least one example"):
    calculator.final_number_accuracy([], [])


@pytest.mark.parametrize("split", ["train", "test"])
def test_real_solutions_stay_right(split):
  lines = (GOLDEN / f"gsm8k_{split}.jsonl").read_text().splitlines()
  assert len(lines) == {"train": 40, "test": 20}[split]
  for line in lines:
    solution, _, number = json.loads(line)["answer"].partition("#### ")
    text = re.sub(r"<<.*?>>", "", solution) + f"The answer is {number}."
    wanted = Fraction(number.replace(",", ""))
    assert calculator.final_number(text) == wanted
    corrected = calculator.apply_calculator(text)
    assert calculator.final_number(corrected) == wanted, text
