"""seqio feature converters that keep a teacher's stored top-k log-probs.

The log-probs of a target token are at the position where the student predicts it:
the token's own in an encoder-decoder, after the prompt in a decoder-only model.
Names are `TopK` and that of seqio's converter.
"""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from gkd_jax import types

# Features of a batch beside the model's own.
_TOP_K = {
  types.TOP_K_IDS: tf.int32,
  types.TOP_K_LOG_PROBS: tf.float32,
}


class _TopKFeatureConverter(seqio.FeatureConverter):
  """A mixin that passes the top-k features on.

  Attributes:
    HAS_PROMPTS: whether a row holds the prompt before the output.
  """

  HAS_PROMPTS = False

  def __init__(self, pack: bool = False):
    if pack:
      raise ValueError(
        "expected unpacked rows with stored top-k log-probs, got packed ones;"
        " set PACK = False"
      )
    spec = seqio.FeatureConverter.FeatureSpec
    specs = {name: spec(dtype=t, rank=2) for name, t in _TOP_K.items()}
    super().__init__(pack=False, passthrough_features=specs)

  def __call__(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    """Model features of a task's; see `seqio.FeatureConverter`."""
    length = task_feature_lengths["targets"]
    row = length + self.HAS_PROMPTS * task_feature_lengths["inputs"]

    def align(example, x):
      before = tf.size(example["inputs"]) if self.HAS_PROMPTS else 0
      return tf.pad(x[:length], [[before, 0], [0, 0]])

    lengths = {**task_feature_lengths, **{name: row for name in _TOP_K}}
    return super().__call__(_aligned(ds, align), lengths)


class TopKEncDecFeatureConverter(
  _TopKFeatureConverter, seqio.EncDecFeatureConverter
):
  """seqio's, and `top_k_ids` `[T, k]` and `top_k_log_probs` `[T, k + 1]`."""


class TopKDecoderFeatureConverter(
  _TopKFeatureConverter, seqio.PrefixLMFeatureConverter
):
  """seqio's with prompt and output in one row, and the top-k features."""

  HAS_PROMPTS = True


def _aligned(dataset, align):
  """Returns the dataset with its top-k features moved by `align`."""
  missing = sorted(set(_TOP_K) - set(dataset.element_spec))
  if missing:
    raise ValueError(
      f"expected a task with a teacher's stored top-k log-probs, got one without"
      f" {' and '.join(missing)}; write them with TOP_K, and set"
      " TEACHER_DATA_PATH"
    )
  return dataset.map(
    lambda example: (
      example | {name: align(example, example[name]) for name in _TOP_K}
    ),
    num_parallel_calls=tf.data.AUTOTUNE,
  )
