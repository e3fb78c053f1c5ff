"""Attention with rotary positions, whose key heads are shared by query heads.

Reference: Ainslie et al. 2023 (arXiv 2305.13245) for grouped heads.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax import losses, partitioning
from gkd_jax.network import layers, rotary

_NORMAL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class GroupedAttention(nn.Module):
  """Attention whose key heads are shared by groups of query heads.

  The cache is that of `layers.Attention`, with G heads. It is as long as the rows
  in windowed layers too, whose mask leaves out what lies before the window.

  Attributes:
    config: sizes.
    weights: type of the kernels, see `projections`.
    prefill: create the cache from these T positions.
    decode_length: length of the self-attention cache, for the call that creates it
      without `prefill`.
  """

  config: rotary.RotaryConfig
  weights: str = "float32"
  prefill: bool = False
  decode_length: int | None = None

  @nn.compact
  def __call__(
    self,
    queries: jax.Array,
    mask: jax.Array,
    rotation: rotary.Rotation | None,
    *,
    memory: jax.Array | None = None,
    decode_index: jax.Array | None = None,
  ) -> jax.Array:
    """Attends from `queries` to themselves, to `memory`, or to both.

    Args:
      queries: `[B, T, D]`.
      mask: bool `[b, T, S]`; of the queries' own keys, then of the memory's.
      rotation: of the positions `[b, T, K / 2]`; None for cross-attention.
      memory: `[B, S, D']`, None for self-attention.
      decode_index: int32, the position that is decoded (T is 1): a scalar, or
        `[B]` with one per row. None for attention over whole sequences.

    Returns:
      `[B, T, D]`.
    """
    config = self.config
    query = self._heads("query", config.num_heads, queries, rotation)
    if memory is not None and rotation is not None:
      key, value = (
        self._merged(name, queries, rotation, memory, decode_index)
        for name in ("key", "value")
      )
    else:
      source = queries if memory is None else memory
      key, value = (
        self._remembered(name, source, rotation, memory, decode_index)
        for name in ("key", "value")
      )
    out = grouped_attention(
      query,
      key,
      value,
      mask,
      scale=(config.query_pre_attn_scalar or config.head_dim) ** -0.5,
      softcap=config.attention_softcap,
    )
    return layers.Dense(
      queries.shape[-1],
      ("joined_kv", "embed"),
      config.dtype,
      _NORMAL,
      self.weights,
      name="out",
    )(out.reshape(*queries.shape[:-1], config.num_heads * config.head_dim))

  def _heads(self, name, heads, x, rotation):
    """Projects `[B, T, D]` to `[B, heads, T, K]`."""
    config = self.config
    y = layers.Dense(
      heads * config.head_dim,
      ("embed", "joined_kv"),
      config.dtype,
      _NORMAL,
      self.weights,
      config.qkv_bias,
      name=name,
    )(x)
    y = y.reshape(*x.shape[:-1], heads, config.head_dim)
    y = partitioning.constrain(y, "batch", "length", "heads", "kv")
    if name != "value":
      if config.qk_norm:
        y = rotary.norm(config, axis="kv", name=f"{name}_norm")(y)
      if rotation is not None:
        y = rotary.rotate(y, rotation)
    return jnp.swapaxes(y, 1, 2)

  def _merged(self, name, queries, rotation, memory, index):
    """Returns keys or values of the queries, then those of the memory."""
    if index is None:
      rows, _, pairs = rotation.cos.shape
      none = rows, memory.shape[1], pairs  # the memory is not rotated
      rotation = rotary.Rotation(
        jnp.concatenate([rotation.cos, jnp.ones(none)], axis=1),
        jnp.concatenate([rotation.sin, jnp.zeros(none)], axis=1),
      )
      both = jnp.concatenate([queries, memory], axis=1)
      return self._heads(name, self.config.num_kv_heads, both, rotation)
    own = self._remembered(name, queries, rotation, None, index)
    others = self.variable(
      "cache",
      f"cached_memory_{name}",
      lambda: self._heads(name, self.config.num_kv_heads, memory, None),
    )
    return jnp.concatenate([own, others.value], axis=2)

  def _remembered(self, name, source, rotation, memory, index):
    """Returns keys or values `[B, G, S, K]`, those of the cache in decoding."""
    cached = f"cached_{name}"
    make = lambda: self._heads(name, self.config.num_kv_heads, source, rotation)
    if index is None:
      now = make()
      if self.prefill:
        self.variable("cache", cached, lambda: now).value = now
      return now
    if memory is not None:
      return self.variable("cache", cached, make).value
    is_new = not self.has_variable("cache", cached)
    config = self.config
    shape = source.shape[0], config.num_kv_heads, self.decode_length
    kept = self.variable(
      "cache",
      cached,
      lambda: jnp.zeros((*shape, config.head_dim), config.dtype),
    )
    if not is_new and index.ndim:
      # Not a scatter, see `layers.Attention`.
      here = jnp.arange(kept.value.shape[2])[None] == index[:, None]
      kept.value = jnp.where(here[:, None, :, None], make(), kept.value)
    elif not is_new:
      kept.value = jax.lax.dynamic_update_slice(
        kept.value, make(), (0, 0, index, 0)
      )
    return kept.value


def grouped_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  *,
  scale: float,
  softcap: float | None = None,
) -> jax.Array:
  """Computes softmax(cap(scale · query keyᵀ)) value; the softmax is float32.

  Query head h reads key head h // (H / G).

  Args:
    query: `[B, H, T, K]`.
    key: `[B, G, S, K]`.
    value: `[B, G, S, K]`.
    mask: bool `[b, T, S]`, b being B or 1.
    scale: factor of the logits.
    softcap: see `losses.soft_cap`.

  Returns:
    `[B, T, H, K]` in the query's type.
  """
  rows, heads, length, width = query.shape
  groups = key.shape[1]
  query = query.reshape(rows, groups, heads // groups, length, width)
  logits = jnp.einsum("bgrtk,bgsk->bgrts", query, key).astype(jnp.float32)
  logits = losses.soft_cap(logits * scale, softcap)
  logits = jnp.where(mask[:, None, None], logits, layers.MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
  out = jnp.einsum("bgrts,bgsk->btgrk", weights, value)
  return out.reshape(rows, length, heads, width)
