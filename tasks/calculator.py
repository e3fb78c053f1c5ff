"""An external calculator over generated solutions, and exact match.

As in Cobbe et al. (2021) and Wei et al. (2022, appendix B): a model that sets up
the right equations is not blamed for its arithmetic. Each `a op b ... = c` of a
text is computed anew, and a corrected result is carried into the text after
it, by matching the number as written.
"""

import ast
import operator
import re
from collections.abc import Sequence
from fractions import Fraction

_NUMBER = r"(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"
_TERM = rf"\(*-?\$?{_NUMBER}%?\)*"
_EQUATION = re.compile(
  # Not inside of a longer number, word or decimal.
  rf"(?<![\w.,])(?P<left>{_TERM}(?:\s*[-+*/x×÷]\s*{_TERM})+)"
  rf"\s*=\s*(?P<sign>-?)\$?(?P<right>{_NUMBER})"
)
# What stands before or after an equation that is only a part of one: "hours *
# 2/3 = 6", "1 1/2 * 4 = 6", "5 / 2 = 2 1/2", "7 + 8 = 7 + 7 + 1 = 15".
_CUT_BEFORE = re.compile(r"(?:[-+*/x×÷–]|\d)\s*$")
_CUT_AFTER = re.compile(r"\s*[-+*/x×÷]\s*[\d(.$]|\s+\d+/\d")
_SIGNED_NUMBER = re.compile(rf"(?<![\w.,])-?\$?{_NUMBER}")
_ANSWER = re.compile(rf"answer is\s*:?\s*(-?\$?{_NUMBER})", re.IGNORECASE)
_OPERATIONS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}


def _to_fraction(number: str) -> Fraction:
  return Fraction(number.replace(",", "").replace("$", ""))


def evaluate(expression: str) -> Fraction | None:
  """The exact value of an expression of numbers, + - * / and parentheses.

  `x`, `×` and `÷` are operators too; `$` and thousands separators are ignored;
  `%` divides by 100.

  Args:
    expression: The text of the expression.

  Returns:
    Its value; None if it is malformed or divides by zero.

  Example:
    >>> str(evaluate("20% x $1,500"))
    '300'
  """
  text = re.sub(r"[$,\s]", "", expression)
  text = re.sub(r"[x×]", "*", text).replace("÷", "/")
  text = re.sub(r"([\d.]+)%", r"(\1/100)", text)
  # Python does not allow leading zeros of a whole number.
  text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
  try:
    return _value(ast.parse(text, mode="eval").body, text)
  except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
    return None


def _value(node: ast.AST, text: str) -> Fraction:
  if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
    left, right = _value(node.left, text), _value(node.right, text)
    return _OPERATIONS[type(node.op)](left, right)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    return -_value(node.operand, text)
  segment = ast.get_source_segment(text, node)
  if isinstance(node, ast.Constant) and segment:
    # From the text, because a float would not be exact.
    return Fraction(segment)
  raise SyntaxError(f"expected numbers and + - * /, got {text!r}")


def _format(value: Fraction) -> str:
  if value.denominator == 1:
    return str(value.numerator)
  return f"{float(value):.6f}".rstrip("0").rstrip(".")


def _corrected(left: str, written: str, after: str) -> Fraction | None:
  """The right result of an equation; None to leave it as it is."""
  # The parenthesis of "(3 + 4 = 7)" is the sentence's.
  surplus = left.count("(") - left.count(")")
  value = evaluate(left[max(surplus, 0) :])
  if value is None:
    return None
  # A result may be rounded to the decimals that it is written with.
  decimals = len(written.partition(".")[2])
  tolerance = Fraction(1, 2 * 10**decimals) if decimals else Fraction(0)
  result = _to_fraction(written)
  percent = "%" in left or after.startswith("%")
  candidates = [value, 100 * value] if percent else [value]
  if any(abs(c - result) <= tolerance for c in candidates):
    return None
  return 100 * value if "%" in left and after.startswith("%") else value


def apply_calculator(text: str) -> str:
  """Corrects the results of all equations of a text, from left to right.

  Args:
    text: A solution with equations such as `12 + 7 = 19`.

  Returns:
    The text with right results; every later number that was written like a
    corrected one is replaced too.

  Example:
    >>> apply_calculator("3 * 4 = 13. 13 + 1 = 14. The answer is 14.")
    '3 * 4 = 12. 12 + 1 = 13. The answer is 13.'
  """
  position = 0
  while match := _EQUATION.search(text, position):
    # The result may be the first term of the next equation.
    position = match.start("sign")
    before, after = text[: match.start()], text[match.end() :]
    if _CUT_BEFORE.search(before) or _CUT_AFTER.match(after):
      continue
    written = match["sign"] + match["right"]
    value = _corrected(match["left"], written, after)
    if value is None:
      continue
    # Only results without a sign are carried on: in the text after it, the
    # sign of "-5" may be a minus.
    if value >= 0 and not match["sign"]:
      number = re.escape(match["right"])
      after = re.sub(
        rf"(?<![\d.,]){number}(?!\d|[.,]\d)", _format(value), after
      )
    # Between sign and number there may be a dollar sign.
    unit = text[match.end("sign") : match.start("right")]
    sign = "-" if value < 0 else ""
    text = text[:position] + sign + unit + _format(abs(value)) + after
  return text


def final_number(text: str) -> Fraction | None:
  """The number after the last `answer is`, else the last number of a text.

  Args:
    text: A solution.

  Returns:
    The number; None if the text has none.

  Example:
    >>> str(final_number("5 + 2 = 7. The answer is $1,007."))
    '1007'
  """
  answers = _ANSWER.findall(text) or _SIGNED_NUMBER.findall(text)
  return _to_fraction(answers[-1]) if answers else None


def final_number_accuracy(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Exact match of the final numbers, without and with the calculator.

  Args:
    targets: The reference solutions.
    predictions: The generated solutions.

  Returns:
    `accuracy` and `accuracy_with_calculator`, in percent of the examples.

  Raises:
    ValueError: If a reference has no number, or there are no examples, or
      not as many predictions as targets.
  """
  plain = calculated = 0
  for target, prediction in zip(targets, predictions, strict=True):
    wanted = final_number(target)
    if wanted is None:
      raise ValueError(
        f"expected a reference with a number, got {target!r}; set the task"
      )
    plain += final_number(prediction) == wanted
    calculated += final_number(apply_calculator(prediction)) == wanted
  if not targets:
    raise ValueError("expected at least one example, got 0; set the split")
  return {
    "accuracy": 100.0 * plain / len(targets),
    "accuracy_with_calculator": 100.0 * calculated / len(targets),
  }
