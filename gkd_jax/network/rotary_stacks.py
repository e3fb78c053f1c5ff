"""Stacks of layers with rotary positions: an encoder, and a decoder.

The decoder stands alone or reads an encoder's output.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax import losses
from gkd_jax.network import (
  blocks,
  layer_loops,
  layers,
  projections,
  rotary,
  rotary_attention,
)


class RotaryLayer(blocks.Layer):
  """Self-attention, cross-attention to an encoder if there is one, and MLP.

  With `merged_attention`, one attention is both of the former. A norm comes before
  each of them, and perhaps one after it.

  Attributes:
    name_of_attention: of the parameters of self-attention.
    prefill: see `rotary_attention.GroupedAttention`.
    decode_length: see `rotary_attention.GroupedAttention`.
  """

  name_of_attention: str = "self_attention"
  prefill: bool = False
  decode_length: int | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    masks: jax.Array,
    rotations: rotary.Rotation,
    decode_index: jax.Array | None,
    encoded: jax.Array | None,
    cross_mask: jax.Array | None,
    kind: int | jax.Array,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[B, T, D]`.
      masks: see `rotary.masks`.
      rotations: see `rotary.rotations`.
      decode_index: see `rotary_attention.GroupedAttention`.
      encoded: `[B, S, D']`, or None for no cross-attention.
      cross_mask: bool, broadcastable to `[B, T, S]`; with `encoded`.
      kind: of `RotaryConfig.layer_kinds`.

    Returns:
      `[B, T, D]`.
    """
    mask, rotation = rotary.of_kind((masks, rotations), kind)
    attention = lambda name: rotary_attention.GroupedAttention(
      self.config, self.weights, self.prefill, self.decode_length, name=name
    )
    mlp = layers.MlpBlock(self.config, self.weights, name="mlp")
    memory = encoded if self.config.merged_attention else None
    if memory is not None:
      assert cross_mask is not None  # comes with `encoded`
      sizes = x.shape[:2]
      mask = jnp.concatenate(
        [
          jnp.broadcast_to(m, (*sizes, m.shape[-1])) for m in (mask, cross_mask)
        ],
        axis=-1,
      )
    x = self._sublayer(
      self.name_of_attention,
      x,
      lambda y: attention(self.name_of_attention)(
        y, mask, rotation, memory=memory, decode_index=decode_index
      ),
    )
    if encoded is not None and memory is None:
      x = self._sublayer(
        "cross_attention",
        x,
        lambda y: attention("encoder_decoder_attention")(
          y, cross_mask, None, memory=encoded, decode_index=decode_index
        ),
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


class RotaryEncoder(nn.Module):
  """Token embedding, layers that see in both directions, final norm.

  Attributes are those of `RotaryDecoder`.
  """

  config: rotary.RotaryConfig
  embed: layers.Embed | None = None
  scan_layers: bool = False
  weights: str = "float32"

  @nn.compact
  def __call__(
    self, tokens: jax.Array, mask: jax.Array, *, deterministic: bool
  ) -> jax.Array:
    """Tokens `[B, S]` and mask `[B, S, S]` or `[B, 1, S]` -> `[B, S, D]`."""
    config = self.config
    places = jnp.arange(tokens.shape[1])
    embed = self.embed
    if embed is None:
      embed = rotary.embed(config, self.weights, name="token_embedder")
    x = layers.dropout(config)(
      rotary.embedded(config, embed, tokens), deterministic=deterministic
    )
    x = layer_loops.apply(
      RotaryLayer,
      (config, deterministic, self.weights, "attention"),
      config.num_layers,
      self.scan_layers,
      x,
      rotary.masks(config, mask, places[None], places),
      rotary.rotations(config, places[None]),
      *(None, None, None),
      of_layers=config.layer_kinds,
    )
    x = rotary.norm(config, name="encoder_norm")(x)
    return blocks.constrain(
      layers.dropout(config)(x, deterministic=deterministic)
    )


class RotaryDecoder(nn.Module):
  """Token embedding, causal layers, final norm, output head.

  Attributes:
    config: sizes.
    embed: the token embedding, which may be the head; None: one of its own.
    scan_layers: see `layer_loops`.
    weights: type of the matrices, see `projections`.
  """

  config: rotary.RotaryConfig
  embed: layers.Embed | None = None
  scan_layers: bool = False
  weights: str = "float32"

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array | None,
    positions: jax.Array | None,
    encoded: jax.Array | None = None,
    cross_mask: jax.Array | None = None,
    *,
    deterministic: bool,
    decode: bool = False,
    max_decode_length: int | None = None,
    prefill_lengths: jax.Array | None = None,
    return_hidden: bool = False,
  ) -> jax.Array:
    """Returns logits `[B, T, V]`, float32.

    Args:
      tokens: int32 `[B, T]`; T is 1 when decoding.
      mask: bool `[b, T, T]`, b being B or 1; not read when decoding.
      positions: int32 `[b, T]`; not read when decoding.
      encoded: `[B, S, D']` of an encoder, or None.
      cross_mask: bool, broadcastable to `[B, T, S]`; with `encoded`.
      deterministic: no dropout.
      decode: read the cache, and write one position into it. If there is none,
        one is created, and the logits have no meaning.
      max_decode_length: its length.
      prefill_lengths: see `decoder_only.Decoder`.
      return_hidden: return the head's input, `[B, T, D]`.
    """
    config = self.config
    index, keys = None, jnp.arange(tokens.shape[1])
    places = keys[None]
    if decode or prefill_lengths is not None:
      layer_loops.check_unrolled(self.scan_layers)
    if decode:
      index, keys = self._next_position(max_decode_length)
      positions = places = jnp.atleast_1d(index)[:, None]
      mask = keys[None, None] <= places[:, :, None]
    if prefill_lengths is not None:
      for name, value in (
        ("cache_index", prefill_lengths.astype(jnp.int32)),
        ("positions", keys),
      ):
        self.variable("cache", name, lambda v=value: v).value = value
    embed = self.embed
    if embed is None:
      embed = rotary.embed(config, self.weights, name="token_embedder")
    dropout = lambda x: layers.dropout(config)(x, deterministic=deterministic)
    prefill = prefill_lengths is not None
    options = "self_attention", prefill, max_decode_length
    x = layer_loops.apply(
      RotaryLayer,
      (config, deterministic, self.weights, *options),
      config.num_layers,
      self.scan_layers,
      dropout(rotary.embedded(config, embed, tokens)),
      rotary.masks(config, mask, places, keys),
      rotary.rotations(config, positions),
      index,
      encoded,
      cross_mask,
      of_layers=config.layer_kinds,
    )
    x = dropout(rotary.norm(config, name="decoder_norm")(x))
    if return_hidden:
      return x
    head = embed.attend
    if not config.logits_via_embedding:
      head = projections.to_logits(config, self.weights, name="logits_dense")
    return losses.soft_cap(head(x), config.final_softcap)

  def _next_position(self, max_decode_length):
    """Returns the position that is decoded, `[]` or `[B]`, and the keys' `[S]`."""
    is_new = not self.has_variable("cache", "cache_index")
    zero = lambda: jnp.zeros((), jnp.int32)
    index = self.variable("cache", "cache_index", zero)
    positions = self.variable(
      "cache", "positions", lambda: jnp.arange(max_decode_length)
    )
    current = index.value
    if not is_new:
      index.value = current + 1
    return current, positions.value
