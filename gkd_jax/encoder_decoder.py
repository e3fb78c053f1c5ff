"""T5X's encoder-decoder model protocol on our network."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import losses, network, sampling, types

EOS_ID = 1

# Where the sequences of a step come from.
DATA, STUDENT, MIXED = "data", "student", "mixed"


class EncoderDecoderModel:
  """A T5 with T5X's model protocol.

  Args:
    module: the network.
    input_vocabulary: kept for callers that decode; not read here.
    output_vocabulary: as `input_vocabulary`.
    optimizer_def: kept for T5X's gin files; the trainer takes its own.
    label_smoothing: share of the target mass on the other tokens.
    z_loss: factor of log(Z)^2, per token.
    length_normalization: of `train_loss`: "token" (mean over target tokens) or
      "sequence" (mean over sequences of the mean over tokens).
    loss_normalizing_factor: divides `loss_fn`'s sum; None leaves it a sum.
  """

  def __init__(
    self,
    module: network.Transformer,
    input_vocabulary: Any = None,
    output_vocabulary: Any = None,
    optimizer_def: Any = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    length_normalization: str = "token",
    loss_normalizing_factor: float | None = None,
  ):
    self.module = module
    self.input_vocabulary = input_vocabulary
    self.output_vocabulary = output_vocabulary
    self.optimizer_def = optimizer_def
    self.label_smoothing = label_smoothing
    self.z_loss = z_loss
    self.length_normalization = length_normalization
    self.loss_normalizing_factor = loss_normalizing_factor

  @property
  def config(self) -> network.T5Config:
    """The network's sizes."""
    return self.module.config

  @property
  def student(self) -> "EncoderDecoderModel":
    """The model that is trained: this one."""
    return self

  teacher = None

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """Returns freshly drawn `params`, and `params_axes`, their logical axes.

    Args:
      rng: key.
      input_shapes: feature name to shape, at least those of
        `encoder_input_tokens` and `decoder_input_tokens`.
      input_types: feature name to dtype, int32 by default.
    """
    types_ = input_types or {}
    encoder, decoder = (
      jnp.ones(input_shapes[name], types_.get(name, jnp.int32))
      for name in ("encoder_input_tokens", "decoder_input_tokens")
    )
    return self.module.init(
      rng, encoder, decoder, decoder, enable_dropout=False
    )

  def encode(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None = None
  ) -> jax.Array:
    """Encoded inputs `[B, S, D]`; dropout only with a key."""
    return self.module.apply(
      {"params": params},
      batch["encoder_input_tokens"],
      batch.get("encoder_segment_ids"),
      dropout_rng is not None,
      rngs=_rngs(dropout_rng),
      method="encode",
    )

  def decoder_logits(
    self,
    params: Any,
    encoded: jax.Array,
    batch: types.Batch,
    dropout_rng: jax.Array | None = None,
  ) -> jax.Array:
    """Teacher-forced logits `[B, T, V]` on the batch's decoder tokens."""
    return self.module.apply(
      {"params": params},
      encoded,
      batch["encoder_input_tokens"],
      batch["decoder_input_tokens"],
      batch["decoder_target_tokens"],
      batch.get("encoder_segment_ids"),
      batch.get("decoder_segment_ids"),
      batch.get("decoder_positions"),
      dropout_rng is not None,
      rngs=_rngs(dropout_rng),
      method="decode",
    )

  def logits(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None = None
  ) -> jax.Array:
    """Teacher-forced logits `[B, T, V]`, encoder included."""
    encoder_key, decoder_key = split_key(dropout_rng)
    encoded = self.encode(params, batch, encoder_key)
    return self.decoder_logits(params, encoded, batch, decoder_key)

  def sample(
    self,
    params: Any,
    encoded: jax.Array,
    encoder_input_tokens: jax.Array,
    key: jax.Array | None,
    *,
    max_decode_length: int,
    **sampling_options,
  ) -> sampling.SampleResult:
    """Samples one output per row; see `sampling.sample` for the options."""
    batch_size = encoder_input_tokens.shape[0]

    def step(tokens, cache):
      variables = {"params": params} | ({"cache": cache} if cache else {})
      logits, updated = self.module.apply(
        variables,
        encoded,
        encoder_input_tokens,
        tokens[:, None],
        tokens[:, None],
        enable_dropout=False,
        decode=True,
        max_decode_length=max_decode_length,
        mutable=["cache"],
        method="decode",
      )
      return logits[:, 0], updated["cache"]

    # The first call makes the cache, cross-attention included.
    _, cache = step(jnp.zeros((batch_size,), jnp.int32), None)
    return sampling.sample(
      step,
      cache,
      key,
      batch_size=batch_size,
      max_decode_length=max_decode_length,
      eos_id=EOS_ID,
      **sampling_options,
    )

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
      loss_weights(batch),
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

  def predict_batch(
    self, params: Any, batch: types.Batch, rng: jax.Array | None = None
  ) -> jax.Array:
    """Greedy outputs `[B, T]`, zeros after EOS."""
    return self.predict_batch_with_aux(params, batch, rng)[0]

  def predict_batch_with_aux(
    self,
    params: Any,
    batch: types.Batch,
    rng: jax.Array | None = None,
    decoder_params: Mapping[str, Any] | None = None,
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Outputs and their scores.

    Args:
      params: of the network.
      batch: the output length is that of `decoder_input_tokens`.
      rng: key; may be None for greedy decoding.
      decoder_params: options of `sampling.sample`; greedy by default.

    Returns:
      Tokens `[B, T]`, and `{"scores": [B]}`: the summed log-probs in nats.
    """
    options = {"temperature": 0.0} | dict(decoder_params or {})
    tokens, log_probs = self.sample(
      params,
      self.encode(params, batch),
      batch["encoder_input_tokens"],
      rng,
      max_decode_length=batch["decoder_input_tokens"].shape[1],
      **options,
    )
    return tokens, {"scores": jnp.sum(log_probs, axis=-1)}

  def score_batch(self, params: Any, batch: types.Batch) -> jax.Array:
    """Log-prob of each row's targets, `[B]`, nats summed over tokens."""
    log_probs = jax.nn.log_softmax(self.logits(params, batch))
    targets = batch["decoder_target_tokens"]
    picked = jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)
    return jnp.sum(picked[:, :, 0] * loss_weights(batch), axis=-1)


def loss_weights(batch: types.Batch) -> jax.Array:
  """Returns the loss weights `[B, T]`, float32; without the feature, 1 where a target stands."""
  weights = batch.get("decoder_loss_weights")
  if weights is None:
    weights = batch["decoder_target_tokens"] > 0
  return weights.astype(jnp.float32)


def _rngs(key: jax.Array | None) -> dict[str, jax.Array]:
  return {} if key is None else {"dropout": key}


def split_key(key: jax.Array | None) -> tuple:
  """Two keys from one, or twice None: dropout on both sides or on neither."""
  return (None, None) if key is None else tuple(jax.random.split(key))
