"""The distribution that outputs are sampled from: temperature, top-k, top-p."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gkd_jax import losses


def sampling_logits(
  logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  suppress_ids: Sequence[int] = (),
  keep: jax.Array | None = None,
) -> jax.Array:
  """Returns the logits of the distribution that `sample` draws from.

  Args:
    logits: `[..., V]` in any float type.
    temperature: `[]` above 0, see `sample`.
    top_k: see `filter_logits`.
    top_p: see `filter_logits`.
    suppress_ids: tokens to remove before everything else.
    keep: see `filter_logits`.

  Returns:
    `[..., V]` float32, -inf where the probability is 0; not normalized.

  Raises:
    ValueError: `suppress_ids` has an id outside 0..V-1, or all ids.
  """
  logits = logits.astype(jnp.float32)
  if suppress_ids:
    allowed = np.ones(logits.shape[-1], bool)
    outside = [i for i in suppress_ids if not 0 <= i < allowed.size]
    allowed[[i for i in suppress_ids if i not in outside]] = False
    if outside or not allowed.any():
      raise ValueError(
        f"expected suppress_ids within 0..{allowed.size - 1} and not all of"
        f" them, got {tuple(suppress_ids)}; set suppress_ids"
      )
    allowed = allowed.reshape((1,) * (logits.ndim - 1) + allowed.shape)
    logits = jnp.where(allowed, logits, -jnp.inf)
  # With the maximum at 0, a small temperature sends the other logits to -inf and
  # never makes inf - inf.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  smallest = float(jnp.finfo(jnp.float32).tiny)
  if not is_static(temperature):
    temperature = lax.stop_gradient(temperature).astype(jnp.float32)
    temperature = jnp.where(
      temperature < 0, jnp.nan, jnp.maximum(temperature, smallest)
    )
    logits = logits / temperature
  elif temperature != 1:
    logits = logits / max(float(temperature), smallest)
  return filter_logits(logits, top_k=top_k, top_p=top_p, keep=keep)


def filter_logits(
  logits: jax.Array,
  *,
  top_k: int = 0,
  top_p: float = 1.0,
  keep: jax.Array | None = None,
) -> jax.Array:
  """Removes unlikely tokens: top-k first, then top-p on what is left.

  Both filters keep all tokens that tie with the least likely kept one, so that
  the result does not depend on the order of the vocabulary; more than k tokens
  can remain.

  >>> logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
  >>> jnp.isfinite(filter_logits(logits, top_k=3)).tolist()
  [True, True, True, False]
  >>> jnp.isfinite(filter_logits(logits, top_k=3, top_p=0.7)).tolist()
  [True, True, False, False]

  Args:
    logits: `[..., V]` float32.
    top_k: keep the k largest; 0, or V and above, keeps all.
    top_p: with tokens in order of falling probability, keep each whose
      predecessors have less probability than this in all (softmax over what
      top-k kept); 1.0 keeps all.
    keep: `[...]` int32, a token of each position that is not removed.

  Returns:
    `[..., V]` float32, removed tokens at -inf. Without filters nothing is sorted.
  """
  given = logits
  vocab_size = logits.shape[-1]
  count = top_k if 0 < top_k < vocab_size else vocab_size
  if count == vocab_size and top_p == 1:
    return logits
  ranked = lax.top_k(logits, count)[0]  # [..., k], largest first
  threshold = ranked[..., -1:]
  if count < vocab_size:
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  if top_p < 1:
    # `ranked` may miss ties of its last entry. They have that entry's value, so
    # they change the normalizer (over `logits`) but not the threshold.
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    mass = jnp.exp(ranked - total)
    mass_before = jnp.cumsum(mass, axis=-1) - mass
    threshold = jnp.min(
      jnp.where(mass_before < top_p, ranked, jnp.inf), axis=-1, keepdims=True
    )
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  if keep is not None:
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_kept = ids == jnp.expand_dims(keep, -1)
    logits = jnp.where(is_kept, given, logits)
  return logits


def sampling_log_probs(
  logits: jax.Array,
  weights: jax.Array | None = None,
  *,
  num_real_tokens: int | None = None,
  **settings: Any,
) -> jax.Array:
  """Returns differentiable log-probs of the sampling distribution.

  Temperature, filters and suppressed tokens are part of it. Where the tokens
  have been sampled already, give them as `keep`: which tokens top-k and top-p
  remove jumps with the last bit of a logit, and the program that sampled them
  rounded in another way.

  Args:
    logits: `[..., V]`, vocabulary padding included.
    weights: `[...]`; where it is 0, all logits count as equal.
    num_real_tokens: token ids from here on are never sampled.
    **settings: see `sampling_logits`.

  Returns:
    `[..., V]` float32, nats, -inf for tokens that are never sampled.
  """
  logits = logits.astype(jnp.float32)
  if weights is not None:
    logits = jnp.where(weights[..., None] > 0, logits, 0.0)
  logits = losses.mask_vocab_padding(
    logits, num_real_tokens, fill_value=-jnp.inf
  )
  return jax.nn.log_softmax(sampling_logits(logits, **settings))


def is_static(value: float | jax.Array) -> bool:
  """Returns whether a value is known while tracing."""
  return not isinstance(value, jax.Array)
