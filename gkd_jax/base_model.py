"""What the encoder-decoder and the decoder-only model share.

A subclass says how logits come about (`logits`) and where its outputs stand in
a row (`loss_weights`); losses and scores follow from the two.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import losses, types

EOS_ID = 1

# Where the sequences of a step come from.
DATA, STUDENT, MIXED = "data", "student", "mixed"


class BaseTransformerModel:
  """T5X's losses and scores, given a subclass's logits."""

  teacher = None

  module: Any
  label_smoothing: float
  z_loss: float
  length_normalization: str
  loss_normalizing_factor: float | None

  @property
  def config(self) -> Any:
    """The network's sizes."""
    return self.module.config

  @property
  def student(self) -> Any:
    """The model that is trained: this one."""
    return self

  def logits(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None = None
  ) -> jax.Array:
    """See `types.TransformerModel.logits`."""
    raise NotImplementedError

  def loss_weights(self, batch: types.Batch) -> jax.Array:
    """See `types.TransformerModel.loss_weights`."""
    return loss_weights(batch)

  def train_loss(
    self,
    params: Any,
    teacher_params: Any,
    batch: types.Batch,
    *,
    source: str,
    step: jax.Array,
    key: jax.Array,
    row_ids: jax.Array,
  ) -> tuple[jax.Array, jax.Array, types.Metrics]:
    """Cross-entropy on the data (SFT): (loss_sum, weight_sum, metrics).

    Args:
      params: of the network.
      teacher_params: not read.
      batch: T5X's features, `[B, ...]`.
      source: "data"; nothing else is possible without a teacher.
      step: not read.
      key: of this step and microbatch.
      row_ids: not read.
    """
    del teacher_params, step, row_ids
    if source != DATA:
      raise ValueError(f"expected source {DATA!r} for SFT, got {source!r}")
    dropout_key = key if self.config.dropout_rate > 0 else None
    return self._cross_entropy(
      params, batch, dropout_key, self.length_normalization
    )

  def _cross_entropy(self, params, batch, dropout_rng, normalization):
    targets = batch["decoder_target_tokens"]
    return losses.cross_entropy_loss(
      self.logits(params, batch, dropout_rng),
      targets,
      self.loss_weights(batch),
      label_smoothing=self.label_smoothing,
      z_loss=self.z_loss,
      length_normalization=normalization,
      segment_ids=batch.get("decoder_segment_ids"),
    )

  def loss_fn(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None
  ) -> tuple[jax.Array, types.Metrics]:
    """T5X's loss: cross-entropy summed over target tokens, and metrics."""
    loss, _, metrics = self._cross_entropy(params, batch, dropout_rng, "token")
    if self.loss_normalizing_factor is not None:
      loss = loss / self.loss_normalizing_factor
    return loss, metrics

  def eval_fn(
    self, params: Any, batch: types.Batch
  ) -> tuple[jax.Array, types.Metrics]:
    """`loss_fn` without dropout."""
    return self.loss_fn(params, batch, None)

  def predict_batch_with_aux(
    self,
    params: Any,
    batch: types.Batch,
    rng: jax.Array | None = None,
    decoder_params: Mapping[str, Any] | None = None,
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """See `types.TransformerModel.predict_batch_with_aux`."""
    raise NotImplementedError

  def predict_batch(
    self, params: Any, batch: types.Batch, rng: jax.Array | None = None
  ) -> jax.Array:
    """Greedy outputs `[B, T]`, zeros after EOS."""
    return self.predict_batch_with_aux(params, batch, rng)[0]

  def score_batch(self, params: Any, batch: types.Batch) -> jax.Array:
    """Log-prob of each row's targets, `[B]`, nats summed over tokens."""
    log_probs = jax.nn.log_softmax(self.logits(params, batch))
    targets = batch["decoder_target_tokens"]
    picked = jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)
    return jnp.sum(picked[:, :, 0] * self.loss_weights(batch), axis=-1)


def loss_weights(batch: types.Batch) -> jax.Array:
  """Returns the loss weights `[B, T]`, float32; without the feature, 1 where a target stands."""
  weights = batch.get("decoder_loss_weights")
  if weights is None:
    weights = batch["decoder_target_tokens"] > 0
  return weights.astype(jnp.float32)


def rngs(key: jax.Array | None) -> dict[str, jax.Array]:
  """The keys of a network: that of dropout, or none."""
  return {} if key is None else {"dropout": key}


def split_key(key: jax.Array | None) -> tuple:
  """Two keys from one, or twice None: dropout on both sides or on neither."""
  return (None, None) if key is None else tuple(jax.random.split(key))
