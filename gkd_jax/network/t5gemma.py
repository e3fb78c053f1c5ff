"""T5Gemma: an encoder and a decoder of Gemma's layers, with T5's call.

References: T5Gemma (arXiv 2504.06225), of Gemma 2's; T5Gemma 2 (arXiv 2512.14856),
of Gemma 3's, with one attention in a decoder's layer and one table for both sides.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax.network import blocks, layers, rotary, rotary_stacks, t5


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig:
  """Sizes and options of both sides, which may have different widths.

  Attributes:
    encoder: of the encoder.
    decoder: of the decoder, whose head may be its own embedding. With
      `merged_attention`, its embedding is the encoder's too.
    end_of_image: id of a token whose embedding stands beside the table; None:
      there is none.
  """

  encoder: rotary.RotaryConfig
  decoder: rotary.RotaryConfig
  end_of_image: int | None = None

  def __post_init__(self):
    same = ["vocab_size", "dtype", "remat_policy", "dropout_rate"]
    if getattr(self.decoder, "merged_attention", False):
      same.append("emb_dim")
    for name in same:
      sides = getattr(self.encoder, name), getattr(self.decoder, name)
      if sides[0] != sides[1]:
        raise ValueError(
          f"expected one {name} for encoder and decoder, got {sides[0]} and"
          f" {sides[1]}; set network.T5GemmaConfig"
        )

  @property
  def depths(self) -> dict[str, int]:
    """See `t5.T5Config.depths`."""
    return {
      "encoder": self.encoder.num_layers,
      "decoder": self.decoder.num_layers,
    }

  def with_layers(self, kept: Mapping[str, Sequence[int]]) -> "T5GemmaConfig":
    """See `t5.T5Config.with_layers`."""
    return dataclasses.replace(
      self,
      encoder=self.encoder.with_layers({"decoder": kept["encoder"]}),
      decoder=self.decoder.with_layers({"decoder": kept["decoder"]}),
    )

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.decoder.vocab_size

  @property
  def emb_dim(self) -> int:
    """D of the decoder, which the head reads."""
    return self.decoder.emb_dim

  @property
  def num_heads(self) -> int:
    """The largest number by which the heads of both sides can be split."""
    return math.gcd(self.encoder.num_heads, self.decoder.num_heads)

  @property
  def dtype(self) -> Any:
    """Of activations."""
    return self.decoder.dtype

  @property
  def dropout_rate(self) -> float:
    """Of both sides."""
    return self.decoder.dropout_rate

  @property
  def remat_policy(self) -> str:
    """Of both sides."""
    return self.decoder.remat_policy

  @property
  def logits_via_embedding(self) -> bool:
    """Whether the head is the decoder's embedding."""
    return self.decoder.logits_via_embedding

  @property
  def final_softcap(self) -> float | None:
    """Of the decoder's logits."""
    return self.decoder.final_softcap


class T5Gemma(t5.Transformer):
  """An encoder-decoder of rotary layers with the call of `t5.Transformer`."""

  config: T5GemmaConfig

  def setup(self):
    config, options = self.config, (self.scan_layers, self.weights)
    self.token_embedder = rotary.embed(
      config.decoder, self.weights, apart=config.end_of_image
    )
    shared = self.token_embedder if config.decoder.merged_attention else None
    self.encoder = rotary_stacks.RotaryEncoder(config.encoder, shared, *options)
    self.decoder = rotary_stacks.RotaryDecoder(
      config.decoder, self.token_embedder, *options
    )

  def encode(
    self,
    encoder_input_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    enable_dropout: bool = True,
    encoder_input_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Encodes the inputs; see `t5.Transformer.encode`."""
    tokens, mask = encoder_input_tokens, encoder_input_mask
    mask = ((tokens if mask is None else mask) > 0)[:, None]
    if encoder_segment_ids is not None:
      mask = mask & _same_segment(encoder_segment_ids, encoder_segment_ids)
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
    """Computes logits of the decoder; see `t5.Transformer.decode`.

    Targets are not read: behind a row's end nothing is seen by what comes before.
    Positions are by default places in the row.

    Raises:
      ValueError: packed inputs together with `decode`.
    """
    del decoder_target_tokens
    blocks.check_unpacked(decode, encoder_segment_ids)
    places = jnp.arange(decoder_input_tokens.shape[1])
    mask = (places[:, None] >= places[None, :])[None]
    cross_mask = (encoder_input_tokens > 0)[:, None]
    if decoder_segment_ids is not None and not decode:
      mask = mask & _same_segment(decoder_segment_ids, decoder_segment_ids)
      cross_mask = cross_mask & _same_segment(
        decoder_segment_ids, encoder_segment_ids
      )
    return self.decoder(
      decoder_input_tokens,
      mask,
      places[None] if decoder_positions is None else decoder_positions,
      encoded,
      cross_mask,
      deterministic=not enable_dropout,
      decode=decode,
      max_decode_length=max_decode_length,
      return_hidden=return_hidden,
    )


def _same_segment(rows, columns):
  """Returns `layers.same_segment` as `[B, T, S]`."""
  return layers.same_segment(rows, columns)[:, 0]
