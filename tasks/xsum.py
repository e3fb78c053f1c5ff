"""Extreme summarization: an article in, one sentence out.

Data: TFDS `xsum:1.1.0` (204 thousand training articles). The paper trains with at
most 1,024 input and 64 output tokens and scores ROUGE-2 on the validation split
(appendix table A.1). TFDS asks for the articles to be placed by hand; see its
page on `xsum`.

Tasks registered here: `xsum` with T5's vocabulary, `xsum_bytes` with bytes,
which needs no vocabulary file.
"""

import functools

import seqio

from gkd_jax.tasks import preprocessors, text_metrics, text_tasks

# The paper does not print its prefix; this is the one that T5 was trained on.
PREFIX = "summarize: "


def add_xsum_task(
  name: str, *, vocabulary: seqio.Vocabulary | None = None
) -> seqio.Task:
  """Registers the task under a name.

  Args:
    name: The name of the task.
    vocabulary: Of inputs and targets; None for T5's SentencePiece.

  Returns:
    The task. Its metrics are those of `text_metrics.rouge`, in percent.

  Raises:
    ValueError: If the name is taken.
  """
  pair = functools.partial(
    preprocessors.prefixed_pair,
    inputs_key="document",
    targets_key="summary",
    prefix=PREFIX,
  )
  return text_tasks.add(
    name,
    seqio.TfdsDataSource("xsum:1.1.0"),
    [pair],
    [text_metrics.rouge],
    vocabulary=vocabulary,
  )


add_xsum_task("xsum")
add_xsum_task("xsum_bytes", vocabulary=seqio.ByteVocabulary())
