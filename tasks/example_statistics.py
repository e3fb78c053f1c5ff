"""What each example adds to a metric, for intervals and significance tests.

An example's statistics of a metric are either a numerator and a denominator,
whose sums over examples have the metric as their ratio, or for BLEU the counts
that it is made of. Sums over all examples give the metric's value itself.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gkd_jax.tasks import text_metrics

_ORDERS = 4  # of BLEU's n-grams


def of_example(
  metric_fn: Callable[..., Mapping[str, Any]], target: Any, prediction: Any
) -> dict[str, list[float]]:
  """The statistics of one example for the values of a task's metric function.

  A function that is not known here is called on the example alone: the ratio is
  then the mean over examples, which is the metric's own value for accuracies and
  ROUGE, and another number for metrics of a corpus, such as chrF.

  Args:
    metric_fn: A function `(targets, predictions)` to values.
    target: As the function takes it.
    prediction: Likewise.

  Returns:
    For each value's name its statistics.

  Example:
    >>> of_example(text_metrics.phoneme_error_rates, ["K AE T"], "K AA T")
    {'per': [100.0, 3.0], 'wer': [100.0, 1.0]}
    >>> of_example(text_metrics.chrf, "a cat", "a cat")
    {'chrf': [100.0, 1.0]}
  """
  known = _KNOWN.get(metric_fn)
  if known:
    return known(target, prediction)
  values = metric_fn([target], [prediction])
  return {
    name: [float(getattr(value, "value", value)), 1.0]
    for name, value in values.items()
  }


def metric_of(statistics: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """The metric as a function of sums `[R, K]`, by the number of statistics.

  Args:
    statistics: `[n, K]` of `n` examples.
  """
  if statistics.shape[1] == 2 * _ORDERS + 2:
    return corpus_bleu
  return lambda sums: sums[:, 0] / sums[:, 1]


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


def _phoneme_errors(references: Sequence[str], prediction: str):
  distance, length = text_metrics.count_phoneme_errors(references, prediction)
  return {
    "per": [100.0 * distance, float(length)],
    "wer": [100.0 * (distance > 0), 1.0],
  }


def _chain(target: str, prediction: str):
  is_right, valid, steps = text_metrics.check_chain(target, prediction)
  return {
    "answer_accuracy": [100.0 * is_right, 1.0],
    "valid_steps": [100.0 * valid, float(steps)],
  }


_KNOWN = {
  text_metrics.bleu: bleu,
  text_metrics.chain_accuracy: _chain,
  text_metrics.phoneme_error_rates: _phoneme_errors,
}
