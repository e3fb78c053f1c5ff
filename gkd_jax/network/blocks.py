"""What all networks share: configuration, layers, the decoder with its head.

Names of submodules, and so those of the parameters, are T5X's.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax import checks, partitioning
from gkd_jax.network import layer_loops, layers, projections


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and options of a network (T5X's fields, plus `remat_policy`).

  Attributes:
    vocab_size: V, padding pieces included.
    dtype: of activations, "float32" or "bfloat16"; parameters, norms, softmax
      and logits are float32.
    emb_dim: D.
    num_heads: H.
    head_dim: K.
    mlp_dim: F.
    mlp_activations: names in flax.linen, or "linear"; several are multiplied.
      T5 1.0 has `("relu",)`, T5 1.1 `("gelu", "linear")`.
    dropout_rate: of all dropout layers.
    logits_via_embedding: True ties the output head to the token embedding and
      divides the logits by sqrt(D) (T5 1.0).
    remat_policy: what the backward pass computes again: "none", "minimal" all
      but the products with weights, "full" all of each layer.

  Raises:
    ValueError: a field is out of its range.
  """

  vocab_size: int
  dtype: Any = "float32"
  emb_dim: int = 512
  num_heads: int = 8
  head_dim: int = 64
  mlp_dim: int = 2048
  mlp_activations: Sequence[str] = ("relu",)
  dropout_rate: float = 0.1
  logits_via_embedding: bool = False
  remat_policy: str = "none"

  def __post_init__(self):
    setting = f"network.{type(self).__name__}"
    for field in dataclasses.fields(self):
      if field.type is int:
        checks.whole(getattr(self, field.name), f"{setting}.{field.name}")
    try:
      dtype = str(jnp.dtype(self.dtype))
    except TypeError:
      dtype = self.dtype
    checks.one_of(dtype, f"{setting}.dtype", ("float32", "bfloat16", "float16"))
    for activation in self.mlp_activations:
      if activation != "linear" and not hasattr(nn, str(activation)):
        checks.refuse(
          "functions of flax.linen, such as ('gelu', 'linear')",
          self.mlp_activations,
          f"{setting}.mlp_activations",
        )
    checks.boolean(self.logits_via_embedding, f"{setting}.logits_via_embedding")
    checks.one_of(
      self.remat_policy,
      f"{setting}.remat_policy",
      layer_loops.REMAT_POLICIES,
    )
    checks.number(
      self.dropout_rate,
      "DROPOUT_RATE",
      least=0,
      below=1,
      what="a dropout rate",
    )


def constrain(x: jax.Array) -> jax.Array:
  """Shards the batch axis of `[B, T, D]` over the data axis of the mesh."""
  return partitioning.constrain(x, "batch", "length", "embed")


def check_unpacked(decode: bool, encoder_segment_ids: jax.Array | None) -> None:
  """Raises a ValueError for packed inputs that are to be decoded from.

  Args:
    decode: whether the cache is used.
    encoder_segment_ids: int32 `[B, S]` of packed rows, or None.
  """
  if decode and encoder_segment_ids is not None:
    raise ValueError(
      "expected unpacked inputs for decoding, got encoder_segment_ids;"
      " set packing off in the evaluation's feature converter"
    )


def decode_or_prefill(
  decoder: nn.Module,
  tokens: jax.Array,
  decode: bool,
  prefill: bool,
  prefill_lengths: jax.Array | None,
) -> tuple[bool, jax.Array | None]:
  """Returns whether a decoder-only call decodes, and the lengths of its prefill.

  To decode without a cache is to make an empty one.

  Args:
    decoder: whose cache it is.
    tokens: int32 `[B, T]`.
    decode: see `decoder_only.DecoderWrapper`.
    prefill: see there.
    prefill_lengths: int32 `[B]`, see there.

  Raises:
    ValueError: `prefill` together with `decode`, or without lengths.
  """
  if prefill and (decode or prefill_lengths is None):
    raise ValueError(
      "expected prefill with prefill_lengths and without decode, got"
      f" prefill_lengths {prefill_lengths} and decode {decode}; set them"
    )
  if decode and not decoder.has_variable("cache", "cache_index"):
    return False, jnp.zeros(tokens.shape[0], jnp.int32)
  return decode, prefill_lengths if prefill else None


class Layer(nn.Module):
  """Base of the layers: sublayers behind a norm and inside a residual.

  Attributes:
    config: a network's configuration.
    deterministic: no dropout.
    weights: type of the matrices, see `projections`.
  """

  config: Any
  deterministic: bool
  weights: str = "float32"

  def _attention(self, norm, name, x, memory, bias, **cache):
    y = layers.LayerNorm(self.config.dtype, name=norm)(x)
    attention = layers.Attention(self.config, self.weights, name=name)
    y = attention(y, memory, bias, deterministic=self.deterministic, **cache)
    return self._residual(x, y)

  def _mlp(self, x):
    y = layers.LayerNorm(self.config.dtype, name="pre_mlp_layer_norm")(x)
    mlp = layers.MlpBlock(self.config, self.weights, name="mlp")
    return self._residual(x, mlp(y, deterministic=self.deterministic))

  def _residual(self, x, y):
    dropout = layers.dropout(self.config)
    return constrain(x + dropout(y, deterministic=self.deterministic))


def relative_positions(config: Any) -> layers.RelativePositionBiases:
  """Returns the biases of a stack of layers, or of one layer (umT5)."""
  return layers.RelativePositionBiases(config.num_heads, name="relpos_bias")


class EncoderLayer(Layer):
  """Self-attention and MLP."""

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    bias: jax.Array,
    positions: jax.Array | None = None,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[B, S, D]`.
      bias: broadcastable to `[B, H, S, S]`.
      positions: int32 `[S]`, for relative positions of this layer alone.

    Returns:
      `[B, S, D]`.
    """
    if positions is not None:
      relative = relative_positions(self.config)
      bias = bias + relative(positions, positions, bidirectional=True)
    x = self._attention("pre_attention_layer_norm", "attention", x, None, bias)
    return self._mlp(x)


class DecoderLayer(Layer):
  """Self-attention, cross-attention to an encoder if there is one, and MLP.

  Attributes:
    decode_length: see `layers.Attention`.
    prefill: see `layers.Attention`.
  """

  decode_length: int | None = None
  prefill: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    bias: jax.Array,
    decode_index: jax.Array | None,
    encoded: jax.Array | None = None,
    cross_bias: jax.Array | None = None,
    positions: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[B, T, D]`.
      bias: broadcastable to `[B, H, T, T]`.
      decode_index: see `layers.Attention`.
      encoded: `[B, S, D]`, or None for no cross-attention.
      cross_bias: broadcastable to `[B, H, T, S]`; with `encoded`.
      positions: int32 `[T]`, of queries and keys, for relative positions of this
        layer alone; as of `layers.decode_bias` when decoding.

    Returns:
      `[B, T, D]`.
    """
    if positions is not None:
      relative = relative_positions(self.config)
      if decode_index is None:
        bias = bias + relative(*positions, bidirectional=False)
      else:
        bias = layers.decode_bias(relative, *positions)
    x = self._attention(
      "pre_self_attention_layer_norm",
      "self_attention",
      x,
      None,
      bias,
      decode_index=decode_index,
      decode_length=self.decode_length,
      prefill=self.prefill,
    )
    if encoded is not None:
      x = self._attention(
        "pre_cross_attention_layer_norm",
        "encoder_decoder_attention",
        x,
        encoded,
        cross_bias,
        decode_index=decode_index,
      )
    return self._mlp(x)


class Decoder(nn.Module):
  """Token embedding, decoder layers, final norm, output head.

  Attributes:
    config: a network's configuration.
    num_layers: number of layers.
    scan_layers: see `layer_loops`.
    weights: type of the matrices, see `projections`.
    embed: an encoder's token embedding to share; None for one of its own.
    bias_per_layer: each layer has relative positions of its own.
  """

  config: Config
  num_layers: int
  scan_layers: bool = False
  weights: str = "float32"
  embed: layers.Embed | None = None
  bias_per_layer: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array | None,
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
      tokens: int32 `[B, T]`; T is 1 when decoding with the cache.
      mask: bool `[B, 1, T, T]`; not read when decoding.
      encoded: `[B, S, D]`, or None for no cross-attention.
      cross_mask: bool `[B, 1, T, S]`; with `encoded`.
      deterministic: no dropout.
      decode: read the cache, and write one position into it. Without a cache the
        call only creates one of `max_decode_length`.
      max_decode_length: cache length, needed by the call that creates it.
      prefill_lengths: int32 `[B]`: create the cache from these T positions, to
        continue from this one in each row. Not with `decode`.
      return_hidden: return the `[B, T, D]` that are multiplied with the head.
    """
    config, prefill = self.config, prefill_lengths is not None
    if decode or prefill:
      layer_loops.check_unrolled(self.scan_layers)
    index, bias = None, None
    if decode:
      index, positions = self._next_positions(max_decode_length)
      if not self.bias_per_layer:
        bias = layers.decode_bias(relative_positions(config), *positions)
    else:
      positions = (jnp.arange(tokens.shape[1]),) * 2
      bias = layers.mask_to_bias(mask)
      if not self.bias_per_layer:
        bias += relative_positions(config)(*positions, bidirectional=False)
    if prefill_lengths is not None:
      for name, value in (
        ("cache_index", prefill_lengths.astype(jnp.int32)),
        ("positions", jnp.arange(tokens.shape[1])),
      ):
        self.variable("cache", name, lambda v=value: v).value = value
    embed = self.embed
    if embed is None:
      embed = projections.embed(config, self.weights, name="token_embedder")
    x = layers.dropout(config)(embed(tokens), deterministic=deterministic)
    x = layer_loops.apply(
      DecoderLayer,
      (config, deterministic, self.weights, max_decode_length, prefill),
      self.num_layers,
      self.scan_layers,
      x,
      bias,
      index,
      encoded,
      None if encoded is None else layers.mask_to_bias(cross_mask),
      positions if self.bias_per_layer else None,
    )
    x = layers.LayerNorm(config.dtype, name="decoder_norm")(x)
    x = layers.dropout(config)(x, deterministic=deterministic)
    tied = config.logits_via_embedding
    if return_hidden:
      return x.astype(jnp.float32) / jnp.sqrt(config.emb_dim) if tied else x
    if tied:
      return embed.attend(x) / jnp.sqrt(config.emb_dim)
    return projections.to_logits(config, self.weights, name="logits_dense")(x)

  def _next_positions(self, max_decode_length):
    """Returns the position that is decoded, `[]` or `[B]`, and those of keys."""
    is_new = not self.has_variable("cache", "cache_index")
    zero = lambda: jnp.zeros((), jnp.int32)
    index = self.variable("cache", "cache_index", zero)
    positions = self.variable(
      "cache", "positions", lambda: jnp.arange(max_decode_length)
    ).value
    current = index.value
    if not is_new:
      index.value = current + 1
    return current, (jnp.atleast_1d(current), positions)
