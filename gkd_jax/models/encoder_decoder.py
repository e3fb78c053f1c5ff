"""T5X's encoder-decoder model protocol on our network."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import decoding, types
from gkd_jax.decoding import sampling
from gkd_jax.models import base_model
from gkd_jax.network import projections


class EncoderDecoderModel(base_model.BaseTransformerModel):
  """A T5 with T5X's model protocol; see `BaseTransformerModel` for settings."""

  FEATURE_CONVERTER_CLS = "EncDecFeatureConverter"

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
    return self._decoder(params, encoded, batch, dropout_rng)

  def decoder_hidden(
    self,
    params: Any,
    encoded: jax.Array,
    batch: types.Batch,
    dropout_rng: jax.Array | None = None,
  ) -> jax.Array:
    """See `types.TransformerModel.decoder_hidden`."""
    return self._decoder(
      params, encoded, batch, dropout_rng, return_hidden=True
    )

  def _decoder(self, params, encoded, batch, dropout_rng, **options):
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
      **options,
    )

  def decoder_params(self, params: Any) -> Any:
    """See `types.TransformerModel.decoder_params`; the embedding is shared."""
    return {name: x for name, x in params.items() if name != "encoder"}

  def output_head(self, params: Any) -> projections.Head:
    """See `types.TransformerModel.output_head`."""
    if self.config.logits_via_embedding:
      return projections.head(params["token_embedder"], tied=True)
    return projections.head(params["decoder"]["logits_dense"], tied=False)

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
  ) -> decoding.SampleResult:
    """Samples one output per row; see `decoding.sample` for the options."""
    options = dict(sampling_options)
    batch_size = encoder_input_tokens.shape[0]
    step, cache, options["row_axes"] = self._start(
      params,
      encoded,
      encoder_input_tokens,
      max_decode_length,
      slots=options.get("slots"),
    )
    return decoding.sample(
      step,
      cache,
      key,
      batch_size=batch_size,
      max_decode_length=max_decode_length,
      eos_id=base_model.EOS_ID,
      **options,
    )

  def start_decoding(
    self, params: Any, encoded: jax.Array, batch: types.Batch
  ) -> tuple[types.TokensToLogits, types.PyTree, dict[str, Any]]:
    """See `types.TransformerModel.start_decoding`."""
    length = batch["decoder_target_tokens"].shape[1]
    inputs = batch["encoder_input_tokens"]
    step, cache, _ = self._start(params, encoded, inputs, length)
    return step, cache, {}

  def _start(
    self, params, encoded, inputs, length, *, num_decodes=1, slots=None
  ):
    """`types.TokensToLogits`, its cache of B N rows, and the cache's row axes.

    Keys and values of the encoded inputs are computed for one of a prompt's N
    rows, as they are equal. With `slots` each row has a position of its own.
    """
    params = self._decoding_params(params)
    step = functools.partial(self._step, params, encoded, length)

    def make(factor):
      rows = decoding.repeat_rows(inputs, factor)
      wide = decoding.repeat_rows(encoded, factor)
      new = functools.partial(self._step, params, wide, length)
      start = jnp.zeros((rows.shape[0],), jnp.int32)
      _, (rows, cache) = new(start, (rows, None))
      if slots is not None:
        decoder = dict(cache["decoder"]) | {"cache_index": start}
        cache = dict(cache) | {"decoder": decoder}
      return rows, cache

    axes = None
    if num_decodes > 1 or slots is not None:
      axes = decoding.row_axes(make)
    return step, decoding.repeat_rows(make(1), num_decodes, axes), axes

  def _step(self, params, encoded, length, tokens, cache):
    """`types.TokensToLogits`; without the network's cache, makes it.

    `cache` is a pair, of each row's input tokens and of the network's. `encoded`
    is read when that is made.
    """
    inputs, of_network = cache
    variables = {"params": params}
    if of_network is not None:
      variables["cache"] = of_network
    logits, updated = self._decoding_module.apply(
      variables,
      encoded,
      inputs,
      tokens[:, None],
      tokens[:, None],
      enable_dropout=False,
      decode=True,
      max_decode_length=length,
      mutable=["cache"],
      method="decode",
    )
    return self._of_real_tokens(logits[:, 0]), (inputs, updated["cache"])

  def _decode(self, params, batch, key, *, num_decodes, options):
    inputs = batch["encoder_input_tokens"]
    length = batch["decoder_input_tokens"].shape[1]
    step, cache, axes = self._start(
      params,
      self.encode(params, batch),
      inputs,
      length,
      num_decodes=num_decodes,
      slots=options.get("slots"),
    )
    return decoding.decode(
      self.decode_fn,
      step,
      cache,
      key,
      batch_size=inputs.shape[0],
      num_decodes=num_decodes,
      options=options,
      max_decode_length=length,
      eos_id=base_model.EOS_ID,
      row_axes=axes,
    )

  def sample_outputs(
    self,
    params: Any,
    encoded: jax.Array,
    batch: types.Batch,
    key: jax.Array,
    **sampling_options,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `types.TransformerModel.sample_outputs`."""
    tokens, log_probs = self.sample(
      params,
      encoded,
      batch["encoder_input_tokens"],
      key,
      max_decode_length=batch["decoder_target_tokens"].shape[1],
      **sampling_options,
    )
    weights = sampling.sequence_weights(tokens, base_model.EOS_ID)
    return tokens, weights, log_probs

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
