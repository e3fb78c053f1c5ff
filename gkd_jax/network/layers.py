"""Layers of T5 in flax.linen: norm, projections, attention, MLP, embedding.

Parameter names, logical axes and initial distributions are those of T5X, so
that its checkpoints and partition rules fit. Dimension key: see `types`.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning as flax_partitioning

from gkd_jax import kernels, partitioning
from gkd_jax.network import projections

param_with_axes = flax_partitioning.param_with_axes
Dense = projections.Dense
Embed = projections.Embed
# Added to masked attention logits. It is finite, so that a row whose keys are
# all masked (padding) attends evenly instead of giving NaN.
MASKED = -1e10
NUM_BUCKETS = 32  # of relative positions
_NORMAL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def same_segment(rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Returns a mask `[B, 1, T, S]` from segment ids `[B, T]` and `[B, S]`."""
  return rows[:, None, :, None] == columns[:, None, None, :]


def mask_to_bias(mask: jax.Array) -> jax.Array:
  """Turns a boolean mask `[..., T, S]` (True: attend) into an additive bias.

  Args:
    mask: bool `[..., T, S]`.

  Returns:
    float32 of the same shape: 0 where attention is allowed, `MASKED` elsewhere.
  """
  return jnp.where(mask, 0.0, MASKED).astype(jnp.float32)


def relative_position_bucket(
  relative_position: jax.Array,
  *,
  bidirectional: bool,
  num_buckets: int = NUM_BUCKETS,
  max_distance: int = 128,
) -> jax.Array:
  """Returns the bucket of a relative position (Raffel et al. 2020, section 2.1).

  Half of the buckets hold one distance each; the other half grow
  logarithmically up to `max_distance`, beyond which all share the last one.

  Args:
    relative_position: int32 `[...]`, key position minus query position.
    bidirectional: True in the encoder: half of the buckets look ahead. False in
      the decoder: keys ahead of the query share bucket 0.
    num_buckets: total number of buckets.
    max_distance: first distance of the last bucket.

  Returns:
    int32 `[...]`, in [0, num_buckets).
  """
  if bidirectional:
    num_buckets //= 2
  table = jnp.asarray(_buckets(num_buckets, max_distance))
  distance = jnp.minimum(jnp.abs(relative_position), max_distance)
  ahead = relative_position > 0
  if bidirectional:
    return jnp.take(table, distance) + jnp.where(ahead, num_buckets, 0)
  return jnp.take(table, jnp.where(ahead, 0, distance))


def _buckets(num_buckets, max_distance):
  """Returns the bucket of each distance up to the largest, by the host.

  A logarithm of the device that is off by its last bit would put distances on a
  bucket's edge into the one before.
  """
  distance = np.arange(max_distance + 1)
  exact = num_buckets // 2
  # The epsilon keeps log(0) finite; that branch is not the one selected.
  ratio = distance.astype(np.float32) / exact + np.finfo(np.float32).eps
  scale = (num_buckets - exact) / np.log(max_distance / exact)
  logarithmic = exact + (np.log(ratio) * scale).astype(np.int32)
  logarithmic = np.minimum(logarithmic, num_buckets - 1)
  return np.where(distance < exact, distance, logarithmic).astype(np.int32)


class RelativePositionBiases(nn.Module):
  """Learned bias per head and bucket of relative position."""

  num_heads: int

  @nn.compact
  def __call__(
    self,
    query_positions: jax.Array,
    key_positions: jax.Array,
    *,
    bidirectional: bool,
  ) -> jax.Array:
    """Returns the bias `[1, H, T, S]` in float32.

    Args:
      query_positions: int32 `[T]`.
      key_positions: int32 `[S]`.
      bidirectional: see `relative_position_bucket`.
    """
    table = param_with_axes(
      "rel_embedding",
      nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
      (self.num_heads, NUM_BUCKETS),
      jnp.float32,
      axes=("heads", "relpos_buckets"),
    )
    buckets = relative_position_bucket(
      key_positions[None, :] - query_positions[:, None],
      bidirectional=bidirectional,
    )
    return jnp.take(table, buckets, axis=1)[None]


def decode_bias(
  relative: RelativePositionBiases, current: jax.Array, positions: jax.Array
) -> jax.Array:
  """Returns the bias `[B, H, 1, T]` of one query per row; later keys are masked.

  Args:
    relative: the decoder's.
    current: int32 `[B]`, each row's position; `[1]` if it is the same for all.
    positions: int32 `[T]`, positions of the keys in the cache.
  """
  bias = relative(current, positions, bidirectional=False)  # [1, H, B, T]
  mask = mask_to_bias(positions[None] <= current[:, None])
  return jnp.swapaxes(bias, 0, 2) + mask[:, None, None]


class LayerNorm(nn.Module):
  """Root-mean-square norm with a scale, no mean and no bias; float32 inside.

  Attributes:
    dtype: of the result.
    epsilon: added to the mean of squares.
    unit_offset: multiply by 1 + scale, which begins at 0, in place of the scale,
      which begins at 1.
    axis: logical name of the last axis.
  """

  dtype: Any = jnp.float32
  epsilon: float = 1e-6
  unit_offset: bool = False
  axis: str = "embed"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis of `x` `[..., D]`; returns `dtype`."""
    scale = param_with_axes(
      "scale",
      nn.initializers.zeros if self.unit_offset else nn.initializers.ones,
      (x.shape[-1],),
      jnp.float32,
      axes=(self.axis,),
    )
    if self.unit_offset:
      scale = 1 + scale
    x = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    y = x * jax.lax.rsqrt(variance + self.epsilon)
    return (y * jnp.expand_dims(scale, range(y.ndim - 1))).astype(self.dtype)


class MlpBlock(nn.Module):
  """Feed-forward block; several activations are multiplied (gated units).

  Attributes:
    config: a network's configuration.
    weights: type of the kernels, see `projections`.
  """

  config: Any
  weights: str = "float32"

  def _project(self, features, axes, name, x):
    dtype = self.config.dtype
    return Dense(features, axes, dtype, weights=self.weights, name=name)(x)

  @nn.compact
  def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
    """`[B, T, D]` -> `[B, T, D]`."""
    features = x.shape[-1]
    branches = []
    activations = self.config.mlp_activations
    for i, activation in enumerate(activations):
      name = "wi" if len(activations) == 1 else f"wi_{i}"
      y = self._project(self.config.mlp_dim, ("embed", "mlp"), name, x)
      if activation != "linear":
        y = getattr(nn, activation)(y)
      branches.append(y)
    y = functools.reduce(operator.mul, branches)
    y = partitioning.constrain(y, "batch", "length", "mlp")
    y = dropout(self.config)(y, deterministic=deterministic)
    return self._project(features, ("mlp", "embed"), "wo", y)


class Attention(nn.Module):
  """Multi-head dot-product attention with a key-value cache.

  With a `decode_index`, keys and values are kept in the "cache" collection:
  self-attention writes those of the current position; cross-attention projects
  the encoded inputs when the cache is created and reads them later. `prefill`
  is self-attention over whole sequences that stores its keys and values.

  Attributes:
    config: a network's configuration.
    weights: type of the kernels, see `projections`.
  """

  config: Any
  weights: str = "float32"

  def _project(self, name: str, x: jax.Array) -> jax.Array:
    heads, size = self.config.num_heads, self.config.head_dim
    kernel_init = _NORMAL
    if name == "query":
      # T5 has no 1/sqrt(K) in the attention: it is part of the initial kernel.
      kernel_init = lambda *args: _NORMAL(*args) / np.sqrt(size)
    y = Dense(
      heads * size,
      ("embed", "joined_kv"),
      self.config.dtype,
      kernel_init,
      self.weights,
      name=name,
    )(x)
    y = y.reshape(*x.shape[:-1], heads, size)
    return partitioning.constrain(y, "batch", "length", "heads", "kv")

  def _cached(self, name: str, make: Callable[[], jax.Array]) -> nn.Variable:
    return self.variable("cache", f"cached_{name}", make)

  @nn.compact
  def __call__(
    self,
    queries: jax.Array,
    memory: jax.Array | None,
    bias: jax.Array,
    *,
    deterministic: bool,
    decode_index: jax.Array | None = None,
    decode_length: int | None = None,
    prefill: bool = False,
  ) -> jax.Array:
    """Attends from `queries` to `memory`.

    Args:
      queries: `[B, T, D]`.
      memory: `[B, S, D]` for cross-attention, None for self-attention.
      bias: float32, broadcastable to `[B, H, T, S]`, masks included.
      deterministic: no dropout.
      decode_index: int32, the position that is decoded (T is 1): a scalar, or
        `[B]` with one per row. None for attention over whole sequences.
      decode_length: length of the self-attention cache; set with `decode_index`
        when the cache is created.
      prefill: create the cache from these T positions.

    Returns:
      `[B, T, D]`.
    """
    query = _by_head(self._project("query", queries))
    source = queries if memory is None else memory
    project = lambda name: _by_head(self._project(name, source))
    if decode_index is None:
      key, value = project("key"), project("value")
      if prefill:
        for name, x in (("key", key), ("value", value)):
          self._cached(name, lambda x=x: x).value = x
    elif memory is not None:
      key, value = (
        self._cached(name, lambda name=name: project(name)).value
        for name in ("key", "value")
      )
    else:
      key, value = (
        self._append(name, source, decode_index, decode_length)
        for name in ("key", "value")
      )
    out = self._attend(query, key, value, bias, deterministic)
    return Dense(
      queries.shape[-1],
      ("joined_kv", "embed"),
      self.config.dtype,
      _NORMAL,
      self.weights,
      name="out",
    )(out.reshape(*queries.shape[:-1], -1))

  def _append(self, name, x, index, length):
    """Writes one position into the cache; returns the cache `[B, H, T, K]`."""
    is_new = not self.has_variable("cache", f"cached_{name}")
    config = self.config
    shape = (x.shape[0], config.num_heads, length, config.head_dim)
    cached = self._cached(name, lambda: jnp.zeros(shape, config.dtype))
    if not is_new and index.ndim:
      # Not a scatter: `where` is local to each row, however rows are sharded.
      here = jnp.arange(cached.value.shape[2])[None] == index[:, None]
      cached.value = jnp.where(
        here[:, None, :, None], _by_head(self._project(name, x)), cached.value
      )
    elif not is_new:
      cached.value = jax.lax.dynamic_update_slice(
        cached.value, _by_head(self._project(name, x)), (0, 0, index, 0)
      )
    return cached.value

  def _attend(self, query, key, value, bias, deterministic):
    """`[B, H, T, K]` and twice `[B, H, S, K]` -> `[B, T, H, K]`."""
    if getattr(self.config, "float32_attention_logits", False):
      query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    if self.config.dropout_rate > 0 and not deterministic:
      drop = functools.partial(dropout(self.config), deterministic=False)
      out = dot_product_attention(query, key, value, bias, drop)
    else:
      out = kernels.attend(dot_product_attention, query, key, value, bias)
    return jnp.swapaxes(out, 1, 2)


def dot_product_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array,
  drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """Computes softmax(query keyᵀ + bias) value; the softmax is float32.

  Args:
    query: `[B, H, T, K]`, scaled.
    key: `[B, H, S, K]`, in the query's type.
    value: `[B, H, S, K]`.
    bias: float32, broadcastable to `[B, H, T, S]`.
    drop: dropout of the attention weights, or None.

  Returns:
    `[B, H, T, K]` in the values' type.
  """
  logits = jnp.einsum("bhtk,bhsk->bhts", query, key).astype(jnp.float32)
  weights = jax.nn.softmax(logits + bias, axis=-1).astype(value.dtype)
  if drop is not None:
    weights = drop(weights)
  return jnp.einsum("bhts,bhsk->bhtk", weights, value)


def _by_head(x: jax.Array) -> jax.Array:
  """Transposes `[B, S, H, K]` to `[B, H, S, K]`, the layout of the cache.

  A decoding step then reads each head's keys contiguously. From the other layout
  it transposes the whole cache first: on a CPU, attention to 256 positions of 8
  rows of T5 1.1 small took nine times as long. Over whole sequences XLA's CPU
  backend chose a product with both sides transposed: twice the time of a layer's
  attention, projections included, at 256 positions.
  """
  return jnp.swapaxes(x, 1, 2)


def dropout(config: Any) -> nn.Dropout:
  """Returns dropout with one mask for all positions of a sequence, as in T5X."""
  return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
