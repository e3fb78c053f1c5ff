"""Layers with rotary positions: one configuration for several model families.

What families have in common is here once, and what they differ in is a field of
`RotaryConfig`: rotary positions (plain, slowed down, or slowed down by band; of
their own in windowed layers), grouped key heads, biases of queries, keys and
values, norms of queries and keys, norms after a sub-layer, soft caps, windows.

References: Su et al. 2021 (arXiv 2104.09864) for rotary positions, Ainslie et al.
2023 (arXiv 2305.13245) for grouped heads, Gemma 2 (arXiv 2408.00118) for soft
caps, Llama 3 (arXiv 2407.21783) and Gemma 3 (arXiv 2503.19786) for slower
rotation.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.network import blocks, layers, projections

# Attention of a layer: to all positions, or to those of its window.
FULL, WINDOWED = 0, 1


@dataclasses.dataclass(frozen=True)
class RotaryConfig(blocks.Config):
  """Sizes and options of a stack of layers; see `blocks.Config`.

  Attention weights have no dropout, and the logits of a tied head are not divided.

  Attributes:
    num_kv_heads: G, heads of keys and values; H / G query heads share each.
    num_layers: number of layers.
    norm_epsilon: of all norms.
    norm_unit_offset: a norm's factor is 1 + scale.
    post_norms: a norm after each sub-layer too, before the residual.
    scale_embedding: multiply embeddings by sqrt(D), rounded to `dtype`.
    qkv_bias: queries, keys and values have a bias.
    qk_norm: a norm of each head's query and key, before the rotation.
    query_pre_attn_scalar: attention logits are divided by its root; None: K.
    attention_softcap: c of `losses.soft_cap` on attention logits; None: none.
    final_softcap: the same on the output's logits.
    rope_theta: base of the rotation's frequencies.
    rope_factor: divides the frequencies.
    rope_bands: `(low, high, length)`: a frequency with more than `high` turns
      within `length` positions is not divided by `rope_factor`, one with fewer
      than `low` is, one between in part (Llama 3). Empty: all are.
    local_rope_theta: base in windowed layers, where nothing is divided; None: as
      in the others.
    window: a windowed layer attends to so many positions, its own included.
    window_pattern: which layers are windowed; repeated over the layers.
    centred_window: an encoder's window is so many positions in all, one more of
      them ahead where they are even; else so many on each side.
    merged_attention: a decoder has one attention, to itself and to the encoder's
      output, which is not rotated (T5Gemma 2); else one after the other.
    max_positions: longest row that the published model is meant for, kept for
      exports; longer ones are computed alike. None: not known.
    family: name in Hugging Face's `model_type` for exports; empty: the first
      family that computes the same.
  """

  mlp_activations: Sequence[str] = ("silu", "linear")
  dropout_rate: float = 0.0
  num_kv_heads: int = 8
  num_layers: int = 6
  norm_epsilon: float = 1e-6
  norm_unit_offset: bool = False
  post_norms: bool = False
  scale_embedding: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False
  query_pre_attn_scalar: float | None = None
  attention_softcap: float | None = None
  final_softcap: float | None = None
  rope_theta: float = 10_000.0
  rope_factor: float = 1.0
  rope_bands: Sequence[float] = ()
  local_rope_theta: float | None = None
  window: int | None = None
  window_pattern: Sequence[bool] = ()
  centred_window: bool = False
  merged_attention: bool = False
  max_positions: int | None = None
  family: str = ""

  def __post_init__(self):
    for name in ("mlp_activations", "rope_bands", "window_pattern"):
      # gin and JSON have lists, which have no hash.
      object.__setattr__(self, name, tuple(getattr(self, name)))
    super().__post_init__()
    for expected, got, is_right in (
      (
        f"num_kv_heads that divides num_heads {self.num_heads}",
        self.num_kv_heads,
        self.num_heads % self.num_kv_heads == 0,
      ),
      ("an even head_dim", self.head_dim, self.head_dim % 2 == 0),
      (
        "a window of at least 1 for window_pattern",
        self.window,
        not any(self.window_pattern) or (self.window or 0) >= 1,
      ),
      (
        "rope_bands of low, high and length",
        self.rope_bands,
        len(self.rope_bands) in (0, 3),
      ),
    ):
      if not is_right:
        raise ValueError(
          f"expected {expected}, got {got}; set network.RotaryConfig"
        )

  @property
  def layer_kinds(self) -> tuple[int, ...]:
    """`FULL` or `WINDOWED` for each layer."""
    pattern = self.window_pattern or (False,)
    return tuple(
      WINDOWED if pattern[i % len(pattern)] else FULL
      for i in range(self.num_layers)
    )

  @property
  def depths(self) -> dict[str, int]:
    """See `t5.T5Config.depths`."""
    return {"decoder": self.num_layers}

  def with_layers(self, kept: Mapping[str, Sequence[int]]) -> "RotaryConfig":
    """See `t5.T5Config.with_layers`; each layer keeps its window."""
    kinds = [self.layer_kinds[i] == WINDOWED for i in kept["decoder"]]
    has_windows = any(kinds)
    return dataclasses.replace(
      self,
      num_layers=len(kinds),
      window=self.window if has_windows else None,
      window_pattern=shortest_period(kinds) if has_windows else (),
      local_rope_theta=self.local_rope_theta if has_windows else None,
    )


def shortest_period(pattern: Sequence[bool]) -> tuple[bool, ...]:
  """Returns the shortest pattern whose repetition begins with this one.

  >>> shortest_period([True, False, True])
  (True, False)

  Args:
    pattern: at least one value.
  """
  return next(
    tuple(pattern[:n])
    for n in range(1, len(pattern) + 1)
    if all(x == pattern[i % n] for i, x in enumerate(pattern))
  )


class Rotation(NamedTuple):
  """The rotation at each position: cosines and sines `[..., T, K / 2]`, float32."""

  cos: jax.Array
  sin: jax.Array


def frequencies(
  head_dim: int, theta: float, factor: float = 1.0, bands: Sequence[float] = ()
) -> np.ndarray:
  """Returns the angle that each pair of channels turns by from token to token.

  Args:
    head_dim: K.
    theta: see `RotaryConfig.rope_theta`.
    factor: see `RotaryConfig.rope_factor`.
    bands: see `RotaryConfig.rope_bands`.

  Returns:
    Radians `[K / 2]`, float32.
  """
  plain = float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)
  kept = 0.0
  if bands:
    low, high, length = bands
    turns = length * plain / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
  return np.float32(plain * (kept + (1 - kept) / factor))


def rotations(config: RotaryConfig, positions: jax.Array) -> Rotation:
  """Returns the rotations in full and in windowed layers.

  Args:
    config: of the stack.
    positions: int32 `[b, T]`, b being B or 1.

  Returns:
    Arrays `[kinds, b, T, K / 2]`, kinds being 1 without windowed layers.
  """
  full = frequencies(
    config.head_dim, config.rope_theta, config.rope_factor, config.rope_bands
  )
  kinds = [full]
  if config.window is not None:
    local = config.local_rope_theta
    kinds += [full if local is None else frequencies(config.head_dim, local)]
  angles = (
    positions.astype(jnp.float32)[None, :, :, None]
    * np.stack(kinds)[:, None, None]
  )
  return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
  """Turns channel i with channel i + K / 2 of each head; float32 inside.

  Args:
    x: `[B, T, heads, K]`.
    rotation: of `[b, T, K / 2]`.

  Returns:
    The same shape and type as `x`.
  """
  low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = (part[:, :, None] for part in rotation)
  turned = low * cos - high * sin, high * cos + low * sin
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def masks(
  config: RotaryConfig,
  mask: jax.Array,
  query_places: jax.Array,
  key_places: jax.Array,
) -> jax.Array:
  """Returns which keys a query sees in full and in windowed layers.

  Args:
    config: of the stack.
    mask: bool `[b, T, S]`, as in full layers.
    query_places: int32 `[b, T]`, places in the row.
    key_places: int32 `[S]`.

  Returns:
    bool `[kinds, b, T, S]`, kinds being 1 without windowed layers.
  """
  if config.window is None:
    return mask[None]
  behind = query_places[:, :, None] - key_places[None, None]
  distance, window = jnp.abs(behind), config.window
  if config.centred_window:
    window = jnp.where(behind < 0, window // 2 + 1, (window + 1) // 2)
  near = mask & (distance < window)
  return jnp.stack([jnp.broadcast_to(mask, near.shape), near])


def of_kind(tree: Any, kind: int | jax.Array) -> Any:
  """Returns one kind's part of `rotations` or `masks`."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, kind, keepdims=False), tree
  )


def norm(config: RotaryConfig, **kwargs: Any) -> layers.LayerNorm:
  """Returns the norm of a configuration."""
  return layers.LayerNorm(
    config.dtype, config.norm_epsilon, config.norm_unit_offset, **kwargs
  )


def embed(config: RotaryConfig, weights: str, **kwargs: Any) -> layers.Embed:
  """Returns the token embedding of a configuration.

  A head's logits, and embeddings that are scaled, begin with variance 1.
  """
  small = config.scale_embedding or config.logits_via_embedding
  stddev = config.emb_dim**-0.5 if small else 1.0
  return projections.embed(config, weights, stddev=stddev, **kwargs)


def embedded(
  config: RotaryConfig, table: layers.Embed, tokens: jax.Array
) -> jax.Array:
  """Looks up int32 tokens `[B, T]`; returns `[B, T, D]`, scaled if need be.

  The vector of a token apart is not scaled.
  """
  x = table(tokens)
  if config.scale_embedding:
    # Rounded first, as the published models were trained.
    x = x * jnp.sqrt(jnp.float32(config.emb_dim)).astype(x.dtype)
  if table.apart is not None:
    here = (tokens == table.apart)[:, :, None]
    x = jnp.where(here, table.vector.astype(x.dtype), x)
  return x
