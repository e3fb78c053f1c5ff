"""Decoder-only transformers with rotary positions: Gemma, Llama, Mistral, Qwen.

Names and call are those of `decoder_only`, so that `models.DecoderOnlyModel`
trains and decodes them.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax.network import blocks, layers, rotary, rotary_stacks


class CausalTransformer(nn.Module):
  """A decoder-only transformer with rotary positions.

  What is padding is not read from the tokens, so that every id may be a word:
  in a row that is padded on its right, no query sees a later position; other
  rows say by `decoder_segment_ids` what belongs together, with 0 for padding.

  Attributes:
    config: sizes.
    scan_layers: see `layer_loops`.
    weights: type of the matrices, see `projections`.
  """

  config: rotary.RotaryConfig
  scan_layers: bool = False
  weights: str = "float32"

  def setup(self):
    self.decoder = rotary_stacks.RotaryDecoder(
      self.config, None, self.scan_layers, self.weights
    )

  def __call__(
    self,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array,
    decoder_segment_ids: jax.Array | None = None,
    decoder_positions: jax.Array | None = None,
    decoder_causal_attention: jax.Array | None = None,
    *,
    enable_dropout: bool = True,
    decode: bool = False,
    max_decode_length: int | None = None,
    prefill: bool = False,
    prefill_lengths: jax.Array | None = None,
    return_hidden: bool = False,
  ) -> jax.Array:
    """Computes logits of the token after each position.

    Decoding is that of `decoder_only.DecoderWrapper`.

    Args:
      decoder_input_tokens: int32 `[B, T]`; T is 1 with `decode`.
      decoder_target_tokens: not read.
      decoder_segment_ids: int32 `[B, T]`, the sequence that each token belongs
        to, 0 for padding; None where each row is one, padded on its right.
      decoder_positions: int32 `[B, T]`; by default places in the row. Only their
        differences within a sequence matter.
      decoder_causal_attention: int32 `[B, T]`: positions of 1 attend to each
        other in both directions. None: causal everywhere.
      enable_dropout: needs the "dropout" rng.
      decode: see `decoder_only.DecoderWrapper`.
      max_decode_length: ignored, for T5X's callers.
      prefill: create the cache.
      prefill_lengths: int32 `[B]`, position at which each row continues.
      return_hidden: see Returns.

    Returns:
      float32 logits `[B, T, V]`, or the `[B, T, D]` that are multiplied with the
      head: before the configuration's `final_softcap`.

    Raises:
      ValueError: `prefill` together with `decode`, or without lengths.
    """
    del decoder_target_tokens, max_decode_length
    decode, prefill_lengths = blocks.decode_or_prefill(
      self.decoder, decoder_input_tokens, decode, prefill, prefill_lengths
    )
    places = jnp.arange(decoder_input_tokens.shape[1])
    mask = (places[:, None] >= places[None, :])[None]
    if decoder_causal_attention is not None:
      both = decoder_causal_attention > 0
      mask = mask | (both[:, :, None] & both[:, None, :])
    if decoder_segment_ids is not None:
      mask = mask & layers.same_segment(
        decoder_segment_ids, decoder_segment_ids
      ).squeeze(1)
    if decoder_positions is None:
      decoder_positions = places[None]
    return self.decoder(
      decoder_input_tokens,
      mask,
      decoder_positions,
      deterministic=not enable_dropout,
      decode=decode,
      prefill_lengths=prefill_lengths,
      return_hidden=return_hidden,
    )
