"""Transformer layers and output heads that all networks share.

Functions here create submodules, so they are called in a compact method; their
names, and so those of the parameters, are T5X's.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax import checks, partitioning
from gkd_jax.network import layer_loops, layers, projections


def check_config(config: Any, module: str, sizes: Sequence[str]) -> None:
  """Checks the fields that every network's configuration has.

  Args:
    config: a dataclass with the sizes, `remat_policy` and `dropout_rate`.
    module: name of the module in gin, for the message.
    sizes: names of the fields that must be at least 1.

  Raises:
    ValueError: a field is out of its range.
  """
  name = type(config).__name__
  for size in sizes:
    checks.whole(getattr(config, size), f"{module}.{name}.{size}")
  try:
    jnp.dtype(config.dtype)
  except TypeError:
    checks.refuse(
      "'float32' or 'bfloat16'", config.dtype, f"{module}.{name}.dtype"
    )
  for activation in config.mlp_activations:
    if activation != "linear" and not hasattr(nn, str(activation)):
      checks.refuse(
        "functions of flax.linen, such as ('gelu', 'linear')",
        config.mlp_activations,
        f"{module}.{name}.mlp_activations",
      )
  checks.boolean(
    config.logits_via_embedding, f"{module}.{name}.logits_via_embedding"
  )
  checks.one_of(
    config.remat_policy,
    f"{module}.{name}.remat_policy",
    layer_loops.REMAT_POLICIES,
  )
  checks.number(
    config.dropout_rate,
    "DROPOUT_RATE",
    least=0,
    below=1,
    what="a dropout rate",
  )


def constrain(x: jax.Array) -> jax.Array:
  """Shards the batch axis of `[B, T, D]` over the data axis of the mesh."""
  return partitioning.constrain(x, "batch", "length", "embed")


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
    attention = layers.attention(self.config, self.weights, name=name)
    y = attention(y, memory, bias, deterministic=self.deterministic, **cache)
    return self._residual(x, y)

  def _mlp(self, x):
    y = layers.LayerNorm(self.config.dtype, name="pre_mlp_layer_norm")(x)
    mlp = layers.mlp(self.config, self.weights, name="mlp")
    return self._residual(x, mlp(y, deterministic=self.deterministic))

  def _residual(self, x, y):
    dropout = layers.dropout(self.config)
    return constrain(x + dropout(y, deterministic=self.deterministic))


class EncoderLayer(Layer):
  """Self-attention and MLP."""

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    """`[B, S, D]` and bias `[B, H, S, S]` -> `[B, S, D]`."""
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
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[B, T, D]`.
      bias: broadcastable to `[B, H, T, T]`.
      decode_index: see `layers.Attention`.
      encoded: `[B, S, D]`, or None for no cross-attention.
      cross_bias: broadcastable to `[B, H, T, S]`; with `encoded`.

    Returns:
      `[B, T, D]`.
    """
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


def output(
  config: Any,
  weights: str,
  embed: layers.Embed,
  x: jax.Array,
  *,
  deterministic: bool,
  return_hidden: bool,
) -> jax.Array:
  """Applies a decoder's final norm and output head.

  Args:
    config: a network's configuration.
    weights: type of the matrices, see `projections`.
    embed: the token embedding, which may be the head.
    x: `[B, T, D]`.
    deterministic: no dropout.
    return_hidden: return the head's input.

  Returns:
    float32 logits `[B, T, V]`, or the `[B, T, D]` that are multiplied with
    the head.
  """
  x = layers.LayerNorm(config.dtype, name="decoder_norm")(x)
  x = layers.dropout(config)(x, deterministic=deterministic)
  if return_hidden:
    return layers.scaled_hidden(config, x)
  if config.logits_via_embedding:
    return embed.attend(x) / jnp.sqrt(config.emb_dim)
  return projections.to_logits(config, weights, name="logits_dense")(x)
