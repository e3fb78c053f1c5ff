"""T5 1.0, T5 1.1 and umT5 as a flax.linen network with T5X's names and call.

References: Raffel et al. 2020 (arXiv 1910.10683) for T5, Shazeer 2020 (arXiv
2002.05202) for the gated units of T5 1.1.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax.network import blocks, layer_loops, layers, projections


@dataclasses.dataclass(frozen=True)
class T5Config(blocks.Config):
  """Sizes and options of a T5; see `blocks.Config`.

  Attributes:
    num_encoder_layers: number of encoder layers.
    num_decoder_layers: number of decoder layers.
    float32_attention_logits: compute attention logits, the products of queries
      and keys, in float32 whatever the dtype; their softmax always is.
    relative_bias_per_layer: each layer has relative positions of its own (umT5);
      otherwise those of a side are shared.
  """

  num_encoder_layers: int = 6
  num_decoder_layers: int = 6
  float32_attention_logits: bool = False
  relative_bias_per_layer: bool = False

  @property
  def depths(self) -> dict[str, int]:
    """Number of layers of each side."""
    return {
      "encoder": self.num_encoder_layers,
      "decoder": self.num_decoder_layers,
    }

  def with_layers(self, kept: Mapping[str, Sequence[int]]) -> "T5Config":
    """Returns the configuration of a model of some of the layers.

    Args:
      kept: side to layers, in their order.
    """
    return dataclasses.replace(
      self,
      num_encoder_layers=len(kept["encoder"]),
      num_decoder_layers=len(kept["decoder"]),
    )


class Encoder(nn.Module):
  """Token embedding, encoder layers, final norm."""

  config: T5Config
  embed: layers.Embed
  scan_layers: bool = False
  weights: str = "float32"

  @nn.compact
  def __call__(
    self, tokens: jax.Array, mask: jax.Array, *, deterministic: bool
  ) -> jax.Array:
    """Tokens `[B, S]` and mask `[B, 1, S, S]` -> `[B, S, D]`."""
    config = self.config
    positions = jnp.arange(tokens.shape[1])
    bias, per_layer = layers.mask_to_bias(mask), config.relative_bias_per_layer
    if not per_layer:
      relative = blocks.relative_positions(config)
      bias = bias + relative(positions, positions, bidirectional=True)
    x = layers.dropout(config)(self.embed(tokens), deterministic=deterministic)
    x = layer_loops.apply(
      blocks.EncoderLayer,
      (config, deterministic, self.weights),
      config.num_encoder_layers,
      self.scan_layers,
      x,
      bias,
      positions if per_layer else None,
    )
    x = layers.LayerNorm(config.dtype, name="encoder_norm")(x)
    return blocks.constrain(
      nn.Dropout(config.dropout_rate)(x, deterministic=deterministic)
    )


class Transformer(nn.Module):
  """An encoder-decoder T5 with T5X's call and parameter names.

  Attributes:
    config: sizes.
    scan_layers: see `layer_loops`.
    weights: type of the matrices, see `projections`.
  """

  config: T5Config
  scan_layers: bool = False
  weights: str = "float32"

  def setup(self):
    self.token_embedder = projections.embed(self.config, self.weights)
    options = {
      "embed": self.token_embedder,
      "scan_layers": self.scan_layers,
      "weights": self.weights,
    }
    self.encoder = Encoder(self.config, **options)
    self.decoder = blocks.Decoder(
      self.config,
      self.config.num_decoder_layers,
      bias_per_layer=self.config.relative_bias_per_layer,
      **options,
    )

  def encode(
    self,
    encoder_input_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    enable_dropout: bool = True,
    encoder_input_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Encodes the inputs.

    Args:
      encoder_input_tokens: int32 `[B, S]`, PAD 0.
      encoder_segment_ids: int32 `[B, S]`, the sequence that each token of a
        packed row belongs to (from 1), or None.
      enable_dropout: needs the "dropout" rng.
      encoder_input_mask: `[B, S]`, above 0 at tokens; by default the tokens.

    Returns:
      `[B, S, D]` in the configuration's dtype.
    """
    if encoder_input_mask is None:
      encoder_input_mask = encoder_input_tokens
    valid = encoder_input_mask > 0
    mask = valid[:, None, :, None] & valid[:, None, None, :]
    if encoder_segment_ids is not None:
      mask &= layers.same_segment(encoder_segment_ids, encoder_segment_ids)
    return self.encoder(
      encoder_input_tokens, mask, deterministic=not enable_dropout
    )

  def decode(
    self,
    encoded: jax.Array,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    decoder_segment_ids: jax.Array | None = None,
    decoder_positions: jax.Array | None = None,
    enable_dropout: bool = True,
    decode: bool = False,
    max_decode_length: int | None = None,
    return_hidden: bool = False,
  ) -> jax.Array:
    """Computes logits of the decoder.

    With `decode=True` and a mutable "cache" collection, the first call creates
    the cache, cross-attention keys and values included, and its logits have no
    meaning; each later call takes one token per row and returns logits of the
    next one.

    Args:
      encoded: `[B, S, D]` from `encode`.
      encoder_input_tokens: int32 `[B, S]`, for the mask.
      decoder_input_tokens: int32 `[B, T]`, shifted targets; T is 1 in decoding.
      decoder_target_tokens: int32 `[B, T]`, for the mask: 0 is padding.
      encoder_segment_ids: int32 `[B, S]` of packed rows, or None.
      decoder_segment_ids: int32 `[B, T]` of packed rows, or None.
      decoder_positions: ignored, for T5X's callers; relative positions need
        none, since a packed sequence is contiguous.
      enable_dropout: needs the "dropout" rng.
      decode: use the key-value cache.
      max_decode_length: cache length, needed when the cache is created.
      return_hidden: see Returns.

    Returns:
      float32 logits `[B, T, V]`, or the head's input `[B, T, D]`.

    Raises:
      ValueError: packed inputs together with `decode`.
    """
    del decoder_positions
    blocks.check_unpacked(decode, encoder_segment_ids)
    inputs_valid = (encoder_input_tokens > 0)[:, None, None, :]
    mask, cross_mask = None, inputs_valid
    if not decode:
      targets_valid = decoder_target_tokens > 0
      positions = jnp.arange(decoder_target_tokens.shape[1])
      causal = positions[:, None] >= positions[None, :]
      mask = targets_valid[:, None, :, None] & targets_valid[:, None, None, :]
      mask &= causal[None, None]
      cross_mask = targets_valid[:, None, :, None] & inputs_valid
    if decoder_segment_ids is not None and mask is not None:
      mask &= layers.same_segment(decoder_segment_ids, decoder_segment_ids)
      cross_mask &= layers.same_segment(
        decoder_segment_ids, encoder_segment_ids
      )
    return self.decoder(
      decoder_input_tokens,
      mask,
      encoded,
      cross_mask,
      deterministic=not enable_dropout,
      decode=decode,
      max_decode_length=max_decode_length,
      return_hidden=return_hidden,
    )

  def __call__(
    self,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    decoder_segment_ids: jax.Array | None = None,
    encoder_positions: jax.Array | None = None,
    decoder_positions: jax.Array | None = None,
    *,
    enable_dropout: bool = True,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> jax.Array:
    """Encodes and decodes; see `encode` and `decode` for the arguments.

    Returns:
      float32 logits `[B, T, V]`.
    """
    del encoder_positions
    encoded = self.encode(
      encoder_input_tokens, encoder_segment_ids, enable_dropout
    )
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
      decoder_positions,
      enable_dropout,
      decode,
      max_decode_length,
    )
