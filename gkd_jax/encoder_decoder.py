"""T5X's encoder-decoder model protocol on our network."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import base_model, network, sampling, types


class EncoderDecoderModel(base_model.BaseTransformerModel):
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

  FEATURE_CONVERTER_CLS = "EncDecFeatureConverter"

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
      rngs=base_model.rngs(dropout_rng),
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
      rngs=base_model.rngs(dropout_rng),
      method="decode",
    )

  def logits(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None = None
  ) -> jax.Array:
    """Teacher-forced logits `[B, T, V]`, encoder included."""
    encoder_key, decoder_key = base_model.split_key(dropout_rng)
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
      eos_id=base_model.EOS_ID,
      **sampling_options,
    )

  def sample_outputs(
    self,
    params: Any,
    encoded: jax.Array,
    batch: types.Batch,
    key: jax.Array,
    **sampling_options,
  ) -> tuple[jax.Array, jax.Array]:
    """See `types.TransformerModel.sample_outputs`."""
    tokens = self.sample(
      params,
      encoded,
      batch["encoder_input_tokens"],
      key,
      max_decode_length=batch["decoder_target_tokens"].shape[1],
      **sampling_options,
    ).tokens
    return tokens, sampling.sequence_weights(tokens, base_model.EOS_ID)

  def has_inputs(self, batch: types.Batch) -> jax.Array:
    """See `types.TransformerModel.has_inputs`."""
    return jnp.any(batch["encoder_input_tokens"] > 0, axis=1)

  def output_features(
    self, batch: types.Batch, tokens: jax.Array, weights: jax.Array
  ) -> dict[str, jax.Array]:
    """See `types.TransformerModel.output_features`."""
    del batch
    return {
      "decoder_target_tokens": tokens,
      "decoder_input_tokens": sampling.shift_right(tokens),
      "decoder_loss_weights": weights,
    }

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
