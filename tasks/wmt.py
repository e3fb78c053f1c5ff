"""Translation of WMT14, English to German.

Data: TFDS `wmt_t2t_translate/de-en:1.0.0`; validation is newstest2013, test is
newstest2014. The paper trains with at most 80 input and 80 output tokens and
scores BLEU on the validation split with beam search (appendix table A.2).

Tasks registered here: `wmt14_en_de` with T5's vocabulary, `wmt14_en_de_bytes`
with bytes, which needs no vocabulary file.
"""

import functools

import seqio

from gkd_jax.tasks import preprocessors, text_metrics, text_tasks

PREFIX = "translate English to German: "


def add_wmt_task(
  name: str, *, vocabulary: seqio.Vocabulary | None = None
) -> seqio.Task:
  """Registers the task under a name.

  Args:
    name: The name of the task.
    vocabulary: Of inputs and targets; None for T5's SentencePiece.

  Returns:
    The task. Its metrics are `bleu` and `chrf`, from 0 to 100.

  Raises:
    ValueError: If the name is taken.
  """
  pair = functools.partial(
    preprocessors.prefixed_pair,
    inputs_key="en",
    targets_key="de",
    prefix=PREFIX,
  )
  return text_tasks.add(
    name,
    seqio.TfdsDataSource("wmt_t2t_translate/de-en:1.0.0"),
    [pair],
    [text_metrics.bleu, text_metrics.chrf],
    vocabulary=vocabulary,
  )


add_wmt_task("wmt14_en_de")
add_wmt_task("wmt14_en_de_bytes", vocabulary=seqio.ByteVocabulary())
