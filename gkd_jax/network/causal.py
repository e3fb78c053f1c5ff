"""Decoder-only transformers with rotary positions: Gemma, Llama, Mistral, Qwen.

Names and call are those of `decoder_only`, so that `models.DecoderOnlyModel`
trains and decodes them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax.network import blocks, layer_loops, layers, projections, rotary


class RotaryLayer(blocks.Layer):
  """Self-attention and MLP, with norms before and perhaps after each.

  Attributes:
    prefill: see `rotary.GroupedAttention`.
  """

  prefill: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    masks: jax.Array,
    rotations: rotary.Rotation,
    decode_index: jax.Array | None,
    kind: int | jax.Array,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[B, T, D]`.
      masks: see `rotary.masks`.
      rotations: see `rotary.rotations`.
      decode_index: see `rotary.GroupedAttention`.
      kind: of `RotaryConfig.layer_kinds`.

    Returns:
      `[B, T, D]`.
    """
    mask, rotation = rotary.of_kind((masks, rotations), kind)
    attention = rotary.GroupedAttention(
      self.config, self.weights, self.prefill, name="self_attention"
    )
    mlp = layers.mlp(self.config, self.weights, name="mlp")
    x = self._sublayer(
      "self_attention",
      x,
      lambda y: attention(y, mask, rotation, decode_index=decode_index),
    )
    return self._sublayer(
      "mlp", x, lambda y: mlp(y, deterministic=self.deterministic)
    )

  def _sublayer(
    self, name: str, x: jax.Array, block: Callable[[jax.Array], jax.Array]
  ) -> jax.Array:
    norm = lambda place: rotary.norm(
      self.config, name=f"{place}_{name}_layer_norm"
    )
    y = block(norm("pre")(x))
    if self.config.post_norms:
      y = norm("post")(y)
    return self._residual(x, y)


class CausalDecoder(nn.Module):
  """Token embedding, layers, final norm, output head."""

  config: rotary.RotaryConfig
  scan_layers: bool = False
  weights: str = "float32"

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    *,
    deterministic: bool,
    decode: bool = False,
    prefill_lengths: jax.Array | None = None,
    return_hidden: bool = False,
  ) -> jax.Array:
    """Returns logits `[B, T, V]`, float32.

    Args:
      tokens: int32 `[B, T]`; T is 1 when decoding.
      mask: bool `[b, T, T]`, b being B or 1; not read when decoding.
      positions: int32 `[b, T]`; not read when decoding.
      deterministic: no dropout.
      decode: read the cache, and write one position into it.
      prefill_lengths: see `decoder_only.Decoder`.
      return_hidden: return the head's input, `[B, T, D]`.
    """
    config = self.config
    index, keys = None, jnp.arange(tokens.shape[1])
    places = keys[None]
    if decode:
      index, keys = self._next_position()
      positions = places = index[:, None]
      mask = keys[None, None] <= places[:, :, None]
    if decode or prefill_lengths is not None:
      layer_loops.check_unrolled(self.scan_layers)
    if prefill_lengths is not None:
      for name, value in (
        ("cache_index", prefill_lengths.astype(jnp.int32)),
        ("positions", keys),
      ):
        self.variable("cache", name, lambda v=value: v).value = value
    embed = rotary.embed(config, self.weights, name="token_embedder")
    dropout = layers.dropout(config)
    x = dropout(
      rotary.embedded(config, embed, tokens), deterministic=deterministic
    )
    x = layer_loops.apply(
      RotaryLayer,
      (config, deterministic, self.weights, prefill_lengths is not None),
      config.num_layers,
      self.scan_layers,
      x,
      rotary.masks(config, mask, places, keys),
      rotary.rotations(config, positions),
      index,
      of_layers=config.layer_kinds,
    )
    x = rotary.norm(config, name="decoder_norm")(x)
    x = layers.dropout(config)(x, deterministic=deterministic)
    if return_hidden:
      return x
    head = embed.attend
    if not config.logits_via_embedding:
      head = projections.to_logits(config, self.weights, name="logits_dense")
    return rotary.soft_cap(head(x), config.final_softcap)

  def _next_position(self):
    """Returns each row's position `[B]`, and those of the cache `[S]`."""
    missing = lambda: jnp.zeros((0,), jnp.int32)  # unused: the cache exists
    index = self.variable("cache", "cache_index", missing)
    current = index.value
    index.value = current + 1
    return current, self.variable("cache", "positions", missing).value


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
    self.decoder = CausalDecoder(self.config, self.scan_layers, self.weights)

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
    if prefill and (decode or prefill_lengths is None):
      raise ValueError(
        "expected prefill with prefill_lengths and without decode, got"
        f" prefill_lengths {prefill_lengths} and decode {decode}; set them"
      )
    if decode and not self.decoder.has_variable("cache", "cache_index"):
      decode, prefill = False, True
      prefill_lengths = jnp.zeros(decoder_input_tokens.shape[0], jnp.int32)
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
      prefill_lengths=prefill_lengths if prefill else None,
      return_hidden=return_hidden,
    )
