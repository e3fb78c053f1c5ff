"""T5's decoder alone, with names and call of T5X's `examples/decoder_only`.

One row holds a prompt and its output. With causal attention everywhere this is a
language model; with attention in both directions over the prompt, a prefix LM
(Raffel et al. 2020, arXiv 1910.10683, section 3.2.1). Relative positions are
those of a decoder in both cases: keys ahead of a query share bucket 0.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax.network import blocks, layers


@dataclasses.dataclass(frozen=True)
class TransformerConfig(blocks.Config):
  """Sizes and options of a decoder; see `blocks.Config`.

  Attributes:
    num_layers: number of layers.
  """

  num_layers: int = 6

  @property
  def depths(self) -> dict[str, int]:
    """See `t5.T5Config.depths`."""
    return {"decoder": self.num_layers}

  def with_layers(
    self, kept: Mapping[str, Sequence[int]]
  ) -> "TransformerConfig":
    """See `t5.T5Config.with_layers`."""
    return dataclasses.replace(self, num_layers=len(kept["decoder"]))


class DecoderWrapper(nn.Module):
  """A decoder-only transformer with T5X's call and parameter names.

  Attributes:
    config: sizes.
    scan_layers: see `layer_loops`.
    weights: type of the matrices, see `projections`.
  """

  config: TransformerConfig
  scan_layers: bool = False
  weights: str = "float32"

  def setup(self):
    self.decoder = blocks.Decoder(
      self.config, self.config.num_layers, self.scan_layers, self.weights
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

    To decode, with a mutable "cache" collection: one call with `prefill` on
    whole rows, whose prompts may have any lengths, creates a cache as long as
    the rows. Each later call with `decode` takes one token per row, the one at
    the row's own position, and advances that position by one. The first token
    to feed is the one at `prefill_lengths`, the last of the prompt: the prefill
    has seen it, but its logits are still needed.

    Args:
      decoder_input_tokens: int32 `[B, T]`, targets shifted right; T is 1 with
        `decode`.
      decoder_target_tokens: int32 `[B, T]`, for the mask: 0 is padding.
      decoder_segment_ids: int32 `[B, T]` of packed rows, or None.
      decoder_positions: ignored, for T5X's callers; relative positions need
        none, since a packed sequence is contiguous.
      decoder_causal_attention: int32 `[B, T]`: positions of 1 attend to each
        other in both directions. None: causal everywhere.
      enable_dropout: needs the "dropout" rng.
      decode: use the cache. If there is none, an empty one of length T is
        created, and the logits have no meaning.
      max_decode_length: ignored, for T5X's callers; the cache is as long as the
        rows of the prefill.
      prefill: create the cache.
      prefill_lengths: int32 `[B]`, position at which each row continues.
      return_hidden: see Returns.

    Returns:
      float32 logits `[B, T, V]`, or the head's input `[B, T, D]`.

    Raises:
      ValueError: `prefill` together with `decode`, or without lengths.
    """
    del decoder_positions, max_decode_length
    decode, prefill_lengths = blocks.decode_or_prefill(
      self.decoder, decoder_input_tokens, decode, prefill, prefill_lengths
    )
    positions = jnp.arange(decoder_input_tokens.shape[1])
    mask = (positions[:, None] >= positions[None, :])[None, None]
    if decoder_causal_attention is not None:
      both = decoder_causal_attention > 0
      mask = mask | (both[:, None, :, None] & both[:, None, None, :])
    valid = decoder_target_tokens > 0
    mask = mask & valid[:, None, :, None] & valid[:, None, None, :]
    if decoder_segment_ids is not None:
      mask &= layers.same_segment(decoder_segment_ids, decoder_segment_ids)
    return self.decoder(
      decoder_input_tokens,
      mask,
      deterministic=not enable_dropout,
      decode=decode,
      prefill_lengths=prefill_lengths,
      return_hidden=return_hidden,
    )
