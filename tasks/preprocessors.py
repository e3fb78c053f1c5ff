"""Steps from a source's fields to texts of `inputs` and `targets`, and back."""

from collections.abc import Mapping

import tensorflow as tf


def prefixed_pair(
  dataset: tf.data.Dataset,
  *,
  inputs_key: str,
  targets_key: str,
  prefix: str = "",
) -> tf.data.Dataset:
  """Takes two fields as inputs and targets, the inputs after a prefix.

  Args:
    dataset: Examples with scalar strings under both keys.
    inputs_key: The field that becomes `inputs`.
    targets_key: The field that becomes `targets`.
    prefix: The text put before the inputs; it names the task, as in T5.

  Returns:
    A dataset of `inputs` and `targets`.
  """
  return dataset.map(
    lambda example: {
      "inputs": tf.strings.join([prefix, example[inputs_key]]),
      "targets": example[targets_key],
    },
    num_parallel_calls=tf.data.AUTOTUNE,
  )


def whole_target(
  output: str, example: Mapping | None = None, is_target: bool = False
) -> str:
  """The output as it is; for a target, the text before tokenization.

  A metric must see the whole reference, not the part that fits into the
  target length nor what survives the vocabulary.

  Args:
    output: A decoded prediction or target.
    example: The example, with `targets_pretokenized` if it was tokenized by
      seqio.
    is_target: Whether `output` is the target.

  Returns:
    The text to score.
  """
  if not is_target or example is None or "targets_pretokenized" not in example:
    return output
  text = example["targets_pretokenized"]
  return text.decode() if isinstance(text, bytes) else str(text)
