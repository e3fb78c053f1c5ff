"""T5's decoder alone, with the names and the call of T5X's `examples/decoder_only`.

One row holds a prompt and the output that follows it. Causal attention everywhere
makes a language model; attention in both directions over the prompt makes a prefix
LM (Raffel et al. 2020, arXiv 1910.10683, section 3.2.1). Relative positions are
those of a decoder in either case: keys ahead of a query share bucket 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax.network import layer_loops, layers, projections, t5


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Sizes and options (T5X's fields, plus `remat_policy`).

  Attributes:
    vocab_size: V, padding pieces included.
    dtype: of activations, "float32" or "bfloat16"; parameters, norms, softmax
      and logits are float32.
    emb_dim: D.
    num_heads: H.
    num_layers: depth.
    head_dim: K.
    mlp_dim: F.
    mlp_activations: see `layers.MlpBlock`.
    dropout_rate: everywhere.
    logits_via_embedding: True ties the output head to the token embedding and
      divides the logits by sqrt(D).
    remat_policy: see `t5.T5Config`.
  """

  vocab_size: int
  dtype: Any = "float32"
  emb_dim: int = 512
  num_heads: int = 8
  num_layers: int = 6
  head_dim: int = 64
  mlp_dim: int = 2048
  mlp_activations: Sequence[str] = ("relu",)
  dropout_rate: float = 0.1
  logits_via_embedding: bool = False
  remat_policy: str = "none"

  def __post_init__(self):
    sizes = "vocab_size", "emb_dim", "num_heads", "num_layers"
    sizes += "head_dim", "mlp_dim"
    t5.check_config(self, "decoder_only_network", sizes)


class DecoderLayer(nn.Module):
  """Self-attention and MLP, each after a norm and inside a residual."""

  config: TransformerConfig
  deterministic: bool
  prefill: bool
  weights: str = "float32"

  @nn.compact
  def __call__(
    self, x: jax.Array, bias: jax.Array, decode_index: jax.Array | None
  ) -> jax.Array:
    """`[B, T, D]` and a bias that broadcasts to `[B, H, T, T]` -> `[B, T, D]`."""
    config, deterministic = self.config, self.deterministic
    y = layers.LayerNorm(config.dtype, name="pre_self_attention_layer_norm")(x)
    y = layers.attention(config, self.weights, name="self_attention")(
      y,
      None,
      bias,
      deterministic=deterministic,
      decode_index=decode_index,
      prefill=self.prefill,
    )
    x = x + layers.dropout(config)(y, deterministic=deterministic)
    x = t5.constrain(x)
    y = layers.LayerNorm(config.dtype, name="pre_mlp_layer_norm")(x)
    y = layers.mlp(config, self.weights, name="mlp")(
      y, deterministic=deterministic
    )
    x = x + layers.dropout(config)(y, deterministic=deterministic)
    return t5.constrain(x)


class Decoder(nn.Module):
  """Token embedding, layers, final norm, output head."""

  config: TransformerConfig
  scan_layers: bool = False
  weights: str = "float32"

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    deterministic: bool,
    decode: bool = False,
    prefill_lengths: jax.Array | None = None,
    return_hidden: bool = False,
  ) -> jax.Array:
    """Returns logits `[B, T, V]`, float32.

    Args:
      tokens: int32 `[B, T]`; T is 1 when decoding.
      mask: bool `[B, 1, T, T]`; not read when decoding.
      deterministic: no dropout.
      decode: read the cache, and write one position into it.
      prefill_lengths: int32 `[B]`: make the cache of these T positions, and go
        on from this one in each row. Not with `decode`.
      return_hidden: return what is multiplied with the head, `[B, T, D]`.
    """
    config = self.config
    relative = layers.RelativePositionBiases(
      config.num_heads, name="relpos_bias"
    )
    index = None
    if decode:
      index, bias = self._next_position(relative)
    else:
      positions = jnp.arange(tokens.shape[1])
      bias = layers.mask_to_bias(mask) + relative(
        positions, positions, bidirectional=False
      )
    if decode or prefill_lengths is not None:
      layer_loops.check_unrolled(self.scan_layers)
    if prefill_lengths is not None:
      for name, value in (
        ("cache_index", prefill_lengths.astype(jnp.int32)),
        ("positions", jnp.arange(tokens.shape[1])),
      ):
        self.variable("cache", name, lambda v=value: v).value = value
    embed = projections.embed(config, self.weights, name="token_embedder")
    x = layers.dropout(config)(embed(tokens), deterministic=deterministic)
    x = layer_loops.apply(
      DecoderLayer,
      (config, deterministic, prefill_lengths is not None, self.weights),
      config.num_layers,
      self.scan_layers,
      x,
      bias,
      index,
    )
    x = layers.LayerNorm(config.dtype, name="decoder_norm")(x)
    x = layers.dropout(config)(x, deterministic=deterministic)
    if return_hidden:
      return layers.scaled_hidden(config, x)
    if config.logits_via_embedding:
      return embed.attend(x) / jnp.sqrt(config.emb_dim)
    return projections.to_logits(config, self.weights, name="logits_dense")(x)

  def _next_position(self, relative):
    """Each row's position `[B]`, and the bias `[B, H, 1, T]` of its query."""
    missing = lambda: jnp.zeros((0,), jnp.int32)  # never: the cache is there
    index = self.variable("cache", "cache_index", missing)
    current = index.value
    positions = self.variable("cache", "positions", missing).value
    index.value = current + 1
    return current, layers.decode_bias(relative, current, positions)


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
    self.decoder = Decoder(self.config, self.scan_layers, self.weights)

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
    """Logits of the token after each position.

    To decode, with a mutable "cache" collection: one call with `prefill` on the
    rows as they are, prompts of whatever lengths included, makes the cache as
    long as the rows. Each later call with `decode` takes one token per row, the
    one at the row's own position, and moves that position on by one. The first
    token to feed is the one at `prefill_lengths`: the last of the prompt, which
    the prefill has seen already, but whose logits are wanted.

    Args:
      decoder_input_tokens: int32 `[B, T]`, targets shifted right; T is 1 with
        `decode`.
      decoder_target_tokens: int32 `[B, T]`, for the mask: 0 is padding.
      decoder_segment_ids: int32 `[B, T]` of packed rows, or None.
      decoder_positions: accepted for T5X's callers; relative positions need
        none, since a packed sequence lies in one piece.
      decoder_causal_attention: int32 `[B, T]`: positions of 1 see each other in
        both directions. None: causal everywhere.
      enable_dropout: needs the "dropout" rng.
      decode: use the cache. Without one, an empty cache of this T is made, and
        the logits mean nothing.
      max_decode_length: accepted for T5X's callers; the cache is as long as the
        rows that it was made of.
      prefill: make the cache.
      prefill_lengths: int32 `[B]`, position at which each row goes on.
      return_hidden: see Returns.

    Returns:
      float32 logits `[B, T, V]`, or the `[B, T, D]` that the head turns into
      them.

    Raises:
      ValueError: `prefill` together with `decode`, or without lengths.
    """
    del decoder_positions, max_decode_length
    if prefill and (decode or prefill_lengths is None):
      raise ValueError(
        "expected prefill with prefill_lengths and without decode, got"
        f" prefill_lengths {prefill_lengths} and decode {decode}; set them"
      )
    if decode and not self.decoder.has_variable("cache", "cache_index"):
      decode, prefill = False, True
      prefill_lengths = jnp.zeros(decoder_input_tokens.shape[0], jnp.int32)
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
      prefill_lengths=prefill_lengths if prefill else None,
      return_hidden=return_hidden,
    )
