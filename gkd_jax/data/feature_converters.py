"""seqio feature converters: prompts alone, stored top-k log-probs, 0 as a token.

The log-probs of a target token are at the position where the student predicts it:
the token's own in an encoder-decoder, after the prompt in a decoder-only model.
Names of these are `TopK` and that of seqio's converter.
"""

import functools
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax import types
from gkd_jax.data import optional_targets

_INPUTS = "encoder_input_tokens"


@functools.cache
def for_prompts(cls: type, start: int = 0) -> type:
  """Returns a class like a converter's that takes prompts without targets.

  Their targets are empty, and a batch has no loss weights for them.

  Args:
    cls: a subclass of `seqio.FeatureConverter`.
    start: what a decoder reads first. A prompt that is a decoder's, and begins
      with it already, as a tokenizer's may, has it once. 0: prompts stay as they
      are.
  """
  has_encoder = _INPUTS in getattr(cls, "MODEL_FEATURES", {})

  class Converter(cls):
    def __call__(
      self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
      ds = optional_targets.with_targets(ds)
      if start and not has_encoder and "inputs" in set(ds.element_spec):
        ds = ds.map(_without_start)
      return super().__call__(ds, task_feature_lengths)

  def _without_start(example):
    prompt = example["inputs"]
    begins = tf.reduce_any(prompt[:1] == tf.cast(start, prompt.dtype))
    return example | {"inputs": prompt[tf.cast(begins, tf.int32) :]}

  return Converter


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

  def __init__(self, pack: bool = False, bos_id: int = 0):
    if pack:
      raise ValueError(
        "expected unpacked rows with stored top-k log-probs, got packed ones;"
        " set PACK = False"
      )
    spec = seqio.FeatureConverter.FeatureSpec
    specs = {name: spec(dtype=t, rank=2) for name, t in _TOP_K.items()}
    super().__init__(pack=False, bos_id=bos_id, passthrough_features=specs)

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


class ZeroIsToken(seqio.FeatureConverter):
  """Another converter, for data in which 0 is a token and not padding.

  seqio's converters fill rows with 0 and take every 0 for padding. Here they see
  each id raised by one, and what they return is lowered again, so that weights,
  segments and packing count a token 0. `encoder_input_mask` says where the inputs
  are.

  Args:
    converter: seqio's, with a `bos_id` raised by one.
  """

  TASK_FEATURES: Mapping[str, Any] = {}
  MODEL_FEATURES: Mapping[str, Any] = {}
  PACKING_FEATURE_DTYPES: Mapping[str, Any] = {}

  def __init__(self, converter: seqio.FeatureConverter):
    super().__init__(pack=converter.pack, bos_id=converter.bos_id)
    self._converter = converter

  def __call__(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    """Model features of a task's; see `seqio.FeatureConverter`."""

    def raised(example):
      names = [k for k in ("inputs", "targets") if k in example]
      return example | {k: example[k] + 1 for k in names}

    ds = ds.map(raised, num_parallel_calls=tf.data.AUTOTUNE)
    return self._convert_features(ds, task_feature_lengths)

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    ds = self._converter(ds, task_feature_lengths=task_feature_lengths)

    def lowered(features):
      tokens = [k for k in features if k.endswith("_tokens")]
      result = features | {k: tf.nn.relu(features[k] - 1) for k in tokens}
      if _INPUTS in features:
        mask = tf.cast(features[_INPUTS] > 0, tf.int32)
        result[types.INPUT_MASK] = mask
      return result

    return ds.map(lowered, num_parallel_calls=tf.data.AUTOTUNE)

  def get_model_feature_lengths(
    self, task_feature_lengths: Mapping[str, int]
  ) -> Mapping[str, int]:
    """Lengths of the features; see `seqio.FeatureConverter`."""
    lengths = dict(
      self._converter.get_model_feature_lengths(task_feature_lengths)
    )
    if _INPUTS in lengths:
      lengths[types.INPUT_MASK] = lengths[_INPUTS]
    return lengths


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
