"""seqio feature converters: for prompts alone, and for stored top-k log-probs.

The log-probs of a target token are at the position where the student predicts it:
the token's own in an encoder-decoder, after the prompt in a decoder-only model.
Names are `TopK` and that of seqio's converter.
"""

import functools
from collections.abc import Mapping

import seqio
import tensorflow as tf

from gkd_jax import types


@functools.cache
def for_prompts(cls: type) -> type:
  """Returns a class like a converter's that takes prompts without targets.

  Their targets are empty, and a batch has no loss weights for them.

  Args:
    cls: a subclass of `seqio.FeatureConverter`.
  """

  class Converter(cls):
    def __call__(
      self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
      if "targets" not in ds.element_spec:
        empty = {"targets": tf.zeros([0], tf.int32)}
        ds = ds.map(lambda example: example | empty)
      return super().__call__(ds, task_feature_lengths)

  return Converter


# Features of a batch beside the model's own.
_TOP_K = {
  types.TOP_K_IDS: tf.int32,
  types.TOP_K_LOG_PROBS: tf.float32,
}


class TopKEncDecFeatureConverter(seqio.EncDecFeatureConverter):
  """seqio's, and `top_k_ids` `[T, k]` and `top_k_log_probs` `[T, k + 1]`."""

  def __init__(self, pack: bool = False):
    super().__init__(pack=_no_packing(pack), passthrough_features=_specs())

  def __call__(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    """Model features of a task's; see `seqio.FeatureConverter`."""
    length = task_feature_lengths["targets"]
    ds = _aligned(ds, lambda example, x: x[:length])
    return super().__call__(ds, {**task_feature_lengths, **_lengths(length)})


class TopKDecoderFeatureConverter(seqio.PrefixLMFeatureConverter):
  """seqio's with prompt and output in one row, and the top-k features."""

  def __init__(self, pack: bool = False):
    super().__init__(pack=_no_packing(pack), passthrough_features=_specs())

  def __call__(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    """Model features of a task's; see `seqio.FeatureConverter`."""
    length = task_feature_lengths["targets"]
    row = length + task_feature_lengths["inputs"]

    def behind_prompt(example, x):
      return tf.pad(x[:length], [[tf.size(example["inputs"]), 0], [0, 0]])

    ds = _aligned(ds, behind_prompt)
    return super().__call__(ds, {**task_feature_lengths, **_lengths(row)})


def _no_packing(pack):
  if pack:
    raise ValueError(
      "expected unpacked rows with stored top-k log-probs, got packed ones;"
      " set PACK = False"
    )
  return False


def _specs():
  spec = seqio.FeatureConverter.FeatureSpec
  return {name: spec(dtype=dtype, rank=2) for name, dtype in _TOP_K.items()}


def _lengths(length):
  return {name: length for name in _TOP_K}


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
