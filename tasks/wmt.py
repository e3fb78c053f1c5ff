"""Translation of WMT14, English to German.

Data: TFDS `wmt_t2t_translate/de-en:1.0.0`; validation is newstest2013, test is
newstest2014. The paper trains with at most 80 input and 80 output tokens and
scores BLEU on the validation split with beam search (appendix table A.2).

Tasks registered here: `wmt14_en_de` with T5's vocabulary, `wmt14_en_de_bytes`
with bytes, which needs no vocabulary file.
"""

import functools

import seqio

from gkd_jax.tasks import preprocessors, text_metrics, vocabularies

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
  feature = seqio.Feature(vocabulary or vocabularies.t5_vocabulary())
  return seqio.TaskRegistry.add(
    name,
    source=seqio.TfdsDataSource("wmt_t2t_translate/de-en:1.0.0"),
    preprocessors=[
      functools.partial(
        preprocessors.prefixed_pair,
        inputs_key="en",
        targets_key="de",
        prefix=PREFIX,
      ),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={"inputs": feature, "targets": feature},
    postprocess_fn=preprocessors.whole_target,
    metric_fns=[text_metrics.bleu, text_metrics.chrf],
  )


add_wmt_task("wmt14_en_de")
add_wmt_task("wmt14_en_de_bytes", vocabulary=seqio.ByteVocabulary())
