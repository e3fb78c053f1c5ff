"""The metrics that reports show: add a row here to name a new one."""

from typing import NamedTuple

_NATS = "nats per token"


class Metric(NamedTuple):
  """How a report shows a metric.

  Attributes:
    label: its name in figures.
    unit: "%", "nats per token", "tokens" or "".
    lower_is_better: whether a smaller value is the better one.
    is_headline: whether a study may be judged by it. Of several, a study takes
      the first in the table.
  """

  label: str
  unit: str = ""
  lower_is_better: bool = False
  is_headline: bool = False

  @property
  def is_error_rate(self) -> bool:
    """Whether it is a rate of errors in percent; `results.json` has fractions."""
    return self.unit == "%" and self.lower_is_better


METRICS = {
  "wer": Metric("WER", "%", lower_is_better=True, is_headline=True),
  "per": Metric("PER", "%", lower_is_better=True),
  "rouge2": Metric("ROUGE-2", is_headline=True),
  "bleu": Metric("BLEU", is_headline=True),
  "answer_accuracy": Metric("answer accuracy", "%", is_headline=True),
  "accuracy_with_calculator": Metric(
    "accuracy with calculator", "%", is_headline=True
  ),
  "self_bleu": Metric("Self-BLEU"),
  "reward": Metric("reward"),
  "reverse_kl": Metric("reverse KL", _NATS, lower_is_better=True),
  "forward_kl": Metric("forward KL", _NATS, lower_is_better=True),
  "loss": Metric("loss", _NATS, lower_is_better=True),
  "student_entropy": Metric("entropy of the student", _NATS),
  "sampled_length": Metric("length of samples", "tokens"),
  "perplexity": Metric("perplexity", lower_is_better=True),
}
HEADLINES = tuple(name for name, m in METRICS.items() if m.is_headline)
# Divergences to the teacher that training logs, the preferred one first.
DIVERGENCES = ("reverse_kl", "forward_kl")


def of(name: str) -> Metric:
  """Returns the metric of a name; of an unknown one, higher is better."""
  return METRICS.get(name) or Metric(name.replace("_", " "))
