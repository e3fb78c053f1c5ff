"""What each example adds to a metric, for intervals and significance tests.

The statistics of an example are numbers whose sums over examples give the
metric's value: a numerator and a denominator; the counts that BLEU or chrF are
made of; or, for a mean over groups of examples, the two numbers under the name of
the example's group. A metric function says by `declare` what they are. Of any
other function the values are means over examples, or the function itself has to
be called on resampled examples.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Statistics = list[float] | dict[str, list[float]]
"""Numbers of an example, or of its group."""
Arguments = Sequence[Sequence | Mapping[str, Sequence]]
"""Of a metric function: sequences over examples, or mappings to such."""

_ORDERS = 4  # of BLEU's n-grams
_CHARACTERS = 6  # of chrF's
_DECLARED = "_example_statistics"
# Resamples on which a function is compared with its mean over examples.
_NUM_TRIALS, _TRIAL_SIZE = 4, 64


def declare(
  of_pair: Callable[[Any, Any], dict[str, Statistics]],
) -> Callable[[Callable], Callable]:
  """Decorates a metric function with the statistics of an example.

  Args:
    of_pair: From target and prediction to the statistics of each value.
  """

  def decorate(metric_fn):
    setattr(metric_fn, _DECLARED, of_pair)
    return metric_fn

  return decorate


def of_example(
  metric_fn: Callable[..., Mapping[str, Any]], target: Any, prediction: Any
) -> dict[str, Statistics]:
  """The statistics of one example for the values of a task's metric function.

  A function without declared statistics is called on the example alone, as for
  a mean over examples.

  Args:
    metric_fn: A function `(targets, predictions)` to values.
    target: As the function takes it.
    prediction: Likewise.

  Returns:
    For each value's name its statistics.
  """
  declared = getattr(metric_fn, _DECLARED, None)
  if declared:
    return declared(target, prediction)
  return {
    name: [value, 1.0]
    for name, value in _numbers(metric_fn([target], [prediction])).items()
  }


def of_examples(
  metric_fn: Callable[..., Mapping[str, Any]], arguments: Arguments
) -> list[dict[str, Statistics]]:
  """The statistics of all examples.

  A function without declared statistics is called on each example alone, and on
  a few resamples. Only values that are means over examples there have statistics.

  Args:
    metric_fn: A function of `arguments` to values.
    arguments: With one entry for each example.

  Raises:
    Exception: Whatever the function raises, which may be undefined for one
      example.
  """
  number = len(arguments[0])
  declared = getattr(metric_fn, _DECLARED, None)
  if declared:
    return [declared(*pair) for pair in zip(*arguments, strict=True)]

  @functools.cache
  def single(i):
    return _numbers(metric_fn(*pick(arguments, [i])))

  random = np.random.default_rng(0)
  some = random.choice(number, min(number, _TRIAL_SIZE), replace=False)
  no_means = set()
  for _ in range(_NUM_TRIALS):
    rows = random.choice(some, len(some)).tolist()
    for name, value in _numbers(metric_fn(*pick(arguments, rows))).items():
      parts = [single(i)[name] for i in rows if name in single(i)]
      if not parts or not np.isclose(np.mean(parts), value, rtol=1e-9):
        no_means.add(name)
  names = {name for i in some.tolist() for name in single(i)}
  if names <= no_means:
    return [{} for _ in range(number)]
  return [
    {name: [x, 1.0] for name, x in single(i).items() if name not in no_means}
    for i in range(number)
  ]


def pick(arguments: Arguments, rows: Sequence[int]) -> list[Any]:
  """The arguments of a metric function for some examples.

  >>> pick([["a", "b"], {"scores": [1.0, 2.0]}], [1, 1])
  [['b', 'b'], {'scores': [2.0, 2.0]}]
  """
  return [
    {name: [x[i] for i in rows] for name, x in argument.items()}
    if isinstance(argument, Mapping)
    else [argument[i] for i in rows]
    for argument in arguments
  ]


def mean_of(parts: Sequence[Statistics]) -> Statistics:
  """The mean statistics of several outputs of an example."""
  first = parts[0]
  if isinstance(first, dict):
    return {name: mean_of([part[name] for part in parts]) for name in first}
  return np.mean(parts, axis=0).tolist()


def number(value: Any) -> float | None:
  """A value of a metric function as a number; None if it is none.

  >>> number(np.float32(0.5)), number([0.5]), number("0.5"), number(None)
  (0.5, None, None, None)
  """
  value = getattr(value, "value", value)  # seqio.metrics.Scalar
  if isinstance(value, (str, bytes)):
    return None
  try:
    return float(value.item() if hasattr(value, "item") else value)
  except (TypeError, ValueError):
    return None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
  """The values that are finite numbers."""
  found = {name: number(value) for name, value in values.items()}
  return {
    name: value
    for name, value in found.items()
    if value is not None and np.isfinite(value)
  }


def table(statistics: Sequence[Statistics]) -> tuple[np.ndarray, str]:
  """The statistics of examples as a matrix, and what their sums are.

  Args:
    statistics: Of n examples, all of one form.

  Returns:
    `[n, K]`, and a key of `FORMS`.
  """
  if isinstance(statistics[0], dict):
    groups = sorted({name for row in statistics for name in row})
    zeros = [0.0, 0.0]
    rows = [[row.get(group, zeros) for group in groups] for row in statistics]
    return np.array(rows, np.float64).reshape(len(rows), -1), "groups"
  rows = np.array(statistics, np.float64)
  return rows, _form(rows)


def _form(rows):
  if rows.shape[1] == 2 * _ORDERS + 2:
    return "bleu"
  if rows.shape[1] == 3 * _CHARACTERS:
    return "chrf"
  return "mean" if np.all(rows[:, 1] == 1) else "ratio"


def metric_of(statistics: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """The metric as a function of sums `[R, K]`, by the number of statistics.

  Args:
    statistics: `[n, K]` of `n` examples, without groups.
  """
  return FORMS[_form(statistics)][1]


def ratio(sums: np.ndarray) -> np.ndarray:
  """The first sum over the second, `[R, 2]` to `[R]`."""
  return sums[:, 0] / sums[:, 1]


def mean_of_groups(sums: np.ndarray) -> np.ndarray:
  """The unweighted mean of the groups' ratios, `[R, 2 G]` to `[R]`.

  Groups without an example do not count.
  """
  scores, counts = sums[:, ::2], sums[:, 1::2]
  used = counts > 0
  ratios = np.divide(scores, counts, out=np.zeros_like(scores), where=used)
  return ratios.sum(axis=1) / used.sum(axis=1)


def bleu(target: str, prediction: str) -> dict[str, list[float]]:
  """Matched and all n-grams of orders 1 to 4, and the two lengths in tokens."""
  score = _bleu().sentence_score(prediction, [target])
  return {
    "bleu": [
      float(x)
      for x in (*score.counts, *score.totals, score.sys_len, score.ref_len)
    ]
  }


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
  """BLEU of summed statistics `[R, 10]`, as `text_metrics.bleu`, `[R]`."""
  import sacrebleu

  # Of several outputs an example has mean counts, which need not be integers;
  # products of matrices leave a little where there is none.
  rows = np.round(sums, 6).tolist()
  # sacrebleu takes lengths as integers, and reads nothing but their ratio.
  lengths = np.rint(1e6 * sums[:, -2:]).astype(int).tolist()
  return np.array(
    [
      sacrebleu.BLEU.compute_bleu(
        correct=row[:_ORDERS],
        total=row[_ORDERS : 2 * _ORDERS],
        sys_len=sys_len,
        ref_len=ref_len,
        smooth_method="exp",
      ).score
      for row, (sys_len, ref_len) in zip(rows, lengths, strict=True)
    ]
  )


@functools.cache
def _bleu():
  import sacrebleu

  # The effective order changes the sentence's score, which is not used, and
  # spares a warning for each sentence.
  return sacrebleu.BLEU(tokenize="intl", effective_order=True)


def chrf(target: str, prediction: str) -> dict[str, list[float]]:
  """Character n-grams of orders 1 to 6: of the output, the target, and both."""
  from sacrebleu.metrics import helpers

  grams = [
    helpers.extract_all_char_ngrams(text, _CHARACTERS)
    for text in (prediction, target)
  ]
  counts = []
  for output, reference in zip(*grams, strict=True):
    wanted = reference.total()
    # As sacrebleu: an order that the target lacks has no n-grams.
    counts += [
      float(output.total() if wanted else 0),
      float(wanted),
      float((output & reference).total()),
    ]
  return {"chrf": counts}


def corpus_chrf(sums: np.ndarray) -> np.ndarray:
  """chrF of summed statistics `[R, 18]`, as `text_metrics.chrf`, `[R]`."""
  output, reference, both = np.moveaxis(
    sums.reshape(len(sums), _CHARACTERS, 3), 2, 0
  )
  used = (output > 0) & (reference > 0)
  orders = np.maximum(used.sum(axis=1), 1)

  def mean(totals):
    parts = np.divide(both, totals, out=np.zeros_like(both), where=used)
    return parts.sum(axis=1) / orders

  precision, recall = mean(output), mean(reference)
  top, bottom = 5 * precision * recall, 4 * precision + recall
  return 100 * np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


# What is resampled, and the metric as a function of sums of statistics.
FORMS = {
  "mean": ("mean over examples", ratio),
  "ratio": ("ratio of sums over examples", ratio),
  "groups": ("mean over groups of examples", mean_of_groups),
  "bleu": ("n-gram counts of BLEU", corpus_bleu),
  "chrf": ("n-gram counts of chrF", corpus_chrf),
}
