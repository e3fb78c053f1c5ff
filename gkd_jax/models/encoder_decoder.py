"""Encoder-decoders (T5) with T5X's model protocol."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import decoding, types
from gkd_jax.decoding import sampling
from gkd_jax.models import base_model, random_keys
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
    if "encoder_input_tokens" not in input_shapes:
      raise ValueError(
        "expected lengths of 'inputs' and 'targets' for an encoder-decoder, got"
        " none of 'inputs'; set TASK_FEATURE_LENGTHS"
      )
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
    """Returns the encoded inputs `[B, S, D]`; dropout only with a key."""
    mask = {}  # T5X's networks take none
    if types.INPUT_MASK in batch:
      mask = {types.INPUT_MASK: batch[types.INPUT_MASK]}
    return self.module.apply(
      {"params": params},
      batch["encoder_input_tokens"],
      batch.get("encoder_segment_ids"),
      dropout_rng is not None,
      rngs=random_keys.rngs(dropout_rng),
      method="encode",
      **mask,
    )

  def decoder_logits(
    self,
    params: Any,
    encoded: jax.Array,
    batch: types.Batch,
    dropout_rng: jax.Array | None = None,
  ) -> jax.Array:
    """Returns teacher-forced logits `[B, T, V]` of the batch's outputs."""
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
      _marked_inputs(batch),
      batch["decoder_input_tokens"],
      self._marked(batch["decoder_target_tokens"]),
      batch.get("encoder_segment_ids"),
      batch.get("decoder_segment_ids"),
      batch.get("decoder_positions"),
      dropout_rng is not None,
      rngs=random_keys.rngs(dropout_rng),
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
    """Returns teacher-forced logits `[B, T, V]`, encoder included."""
    encoder_key, decoder_key = random_keys.split_key(dropout_rng)
    encoded = self.encode(params, batch, encoder_key)
    return self.decoder_logits(params, encoded, batch, decoder_key)

  def start_decoding(
    self,
    params: Any,
    encoded: jax.Array,
    batch: types.Batch,
    *,
    num_decodes: int = 1,
    slots: int | None = None,
  ) -> tuple[types.TokensToLogits, types.PyTree, dict[str, Any]]:
    """See `types.TransformerModel.start_decoding`.

    The N rows of a prompt share the keys and values of its encoded inputs, which
    are computed once. With `slots` each row has a position of its own.
    """
    params = self._decoding_params(params)
    inputs = _marked_inputs(batch)
    length = batch["decoder_input_tokens"].shape[1]

    def make(factor):
      rows = decoding.repeat_rows(inputs, factor)
      wide = decoding.repeat_rows(encoded, factor)
      zero = jnp.zeros((rows.shape[0],), jnp.int32)
      _, (rows, cache) = self._step(params, wide, length, zero, (rows, None))
      if slots is not None:
        decoder = dict(cache["decoder"]) | {"cache_index": zero}
        cache = dict(cache) | {"decoder": decoder}
      return rows, cache

    axes = None
    if num_decodes > 1 or slots is not None:
      axes = decoding.row_axes(make)
    rows = {"row_axes": axes}
    if self.special_tokens.start:
      number = inputs.shape[0] * num_decodes
      rows["start_tokens"] = jnp.full(number, self.special_tokens.start)
    return (
      functools.partial(self._step, params, encoded, length),
      decoding.repeat_rows(make(1), num_decodes, axes),
      rows,
    )

  def _step(self, params, encoded, length, tokens, cache):
    """`types.TokensToLogits`; without the network's cache, makes it.

    `cache` is a pair, of what marks each row's inputs and of the network's.
    `encoded` is read when that is made.
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

  def has_inputs(self, batch: types.Batch) -> jax.Array:
    """See `types.TransformerModel.has_inputs`."""
    return jnp.any(_marked_inputs(batch) > 0, axis=1)

  def output_features(
    self, batch: types.Batch, tokens: jax.Array, weights: jax.Array
  ) -> dict[str, jax.Array]:
    """See `types.TransformerModel.output_features`."""
    del batch
    return {
      "decoder_target_tokens": tokens,
      "decoder_input_tokens": sampling.shift_right(
        tokens, self.special_tokens.start
      ),
      "decoder_loss_weights": weights,
    }


def _marked_inputs(batch):
  """Returns what is above 0 at the input's tokens, int32 `[B, S]`."""
  return batch.get(types.INPUT_MASK, batch["encoder_input_tokens"])
