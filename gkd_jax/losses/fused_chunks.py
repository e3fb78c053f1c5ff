"""Loss and gradient of one chunk of tokens, by tiles of the vocabulary.

For `fused_loss`. A tile is a range of token ids. With several of them only the
logits of both models are held for the whole vocabulary, `[N, V]` each, and the
loss's slopes in place of the teacher's; log-probs, terms and gradients are made a
tile at a time, while they are in a CPU's cache.

N stands for the tokens of a chunk, W for the ids of a tile.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax import types
from gkd_jax.losses import distillation, vocabulary


class Rules(NamedTuple):
  """What a token's loss is; see `distillation.distillation_loss`."""

  divergence: types.Divergence
  teacher_temperature: float | jax.Array
  student_temperature: float | jax.Array
  num_real_tokens: int | None


class Tiles(NamedTuple):
  """The vocabulary in equal parts.

  Attributes:
    number: of tiles; 1 for a divergence that is no sum over the vocabulary, and
      where the vocabulary is split over devices.
    width: ids of a tile, W.
  """

  number: int
  width: int

  def joined(self, most: int) -> "Tiles":
    """Tiles as wide as up to `most` of these."""
    parts = max(n for n in range(1, most + 1) if self.number % n == 0)
    return Tiles(self.number // parts, self.width * parts)

  def each(self, body: Callable, start: Any) -> Any:
    """`body(first id of a tile, carry)` for all tiles in turn."""
    if self.number == 1:
      return body(0, start)
    return jax.lax.fori_loop(
      0, self.number, lambda i, carry: body(i * self.width, carry), start
    )

  def of(self, x: jax.Array, first: Any) -> jax.Array:
    """The tile's part of an array `[..., V]`."""
    if self.number == 1:
      return x
    return jax.lax.dynamic_slice_in_dim(x, first, self.width, axis=-1)

  def put(self, x: jax.Array, part: jax.Array, first: Any) -> jax.Array:
    """The array with another part in the tile's place."""
    if self.number == 1:
      return part
    return jax.lax.dynamic_update_slice_in_dim(x, part, first, axis=-1)


class ChunkResiduals(NamedTuple):
  """Both models' distributions for each token, and what the gradient needs besides.

  Attributes:
    teacher_logits: `[N, V]`, divided by the temperature; None where the slopes
      took their place.
    student_logits: likewise, but kept.
    normalizers: `[N, 1]` of each, the logarithm of Σ exp(logit).
    slopes: `[N, V]`, the derivatives of a token's loss with respect to the
      student's log-probs; None without tiles.
    slope_sum: `[N, 1]`, their sum over the vocabulary.
  """

  teacher_logits: jax.Array | None
  student_logits: jax.Array
  normalizers: tuple[jax.Array, jax.Array]
  slopes: jax.Array | None
  slope_sum: jax.Array


def token_losses(
  rules: Rules,
  tiles: Tiles,
  teacher_logits: jax.Array,
  student_logits: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array], ChunkResiduals]:
  """`distillation.token_losses`, and what its gradient is made from.

  Args:
    rules: what the loss is.
    tiles: of the vocabulary.
    teacher_logits: `[N, V]` float32.
    student_logits: `[N, V]` float32.

  Returns:
    Nats `[N]`, `distillation.TOKEN_METRICS` `[N]` each, and the residuals.
  """
  p = teacher_logits / rules.teacher_temperature
  q = student_logits / rules.student_temperature
  p = vocabulary.mask_vocab_padding(p, rules.num_real_tokens)
  q = vocabulary.mask_vocab_padding(q, rules.num_real_tokens)
  of = functools.partial(jax.nn.logsumexp, axis=-1, keepdims=True)
  largest = tuple(jnp.max(x, axis=-1, keepdims=True) for x in (p, q))
  zero = jnp.zeros(p.shape[:1], jnp.float32)
  residuals = ChunkResiduals(p, q, (of(p), of(q)), None, zero[:, None])

  def sweep(first, carry):
    # Held are slopes up to here, and the teacher's logits from here on. A tile of
    # these is read a turn before it is needed: of an array that is read and
    # written in one turn XLA makes a copy.
    sums, firsts, held, p_tile = carry
    logits = p_tile, tiles.of(q, first)
    log_probs = tuple(map(jnp.subtract, logits, residuals.normalizers))
    loss, slopes = _loss_and_slopes(rules, *log_probs)
    new = (
      loss,
      jnp.sum(slopes, axis=-1, keepdims=True),
      distillation.summed_metrics(*log_probs),
    )
    # Logits and not log-probs, of which a compiler may round some otherwise than
    # it rounds the largest one.
    firsts = tuple(map(_first_of, firsts, logits, largest, (first, first)))
    held = tiles.put(held, slopes, first)
    p_tile = tiles.of(held, first + tiles.width)
    return jax.tree.map(jnp.add, sums, new), firsts, held, p_tile

  names = [
    name
    for name in distillation.TOKEN_METRICS
    if name != distillation.AGREEMENT
  ]
  none = jnp.full(zero.shape, q.shape[1], jnp.int32)
  start = zero, residuals.slope_sum, dict.fromkeys(names, zero)
  (loss, slope_sum, metrics), firsts, held, _ = tiles.each(
    sweep, (start, (none, none), p, tiles.of(p, 0))
  )
  metrics[distillation.AGREEMENT] = firsts[0] == firsts[1]
  residuals = residuals._replace(slope_sum=slope_sum)
  if tiles.number > 1:
    residuals = residuals._replace(teacher_logits=None, slopes=held)
  return loss, metrics, residuals


def logits_gradient(
  rules: Rules, residuals: ChunkResiduals, shares: jax.Array
) -> jax.Array:
  """Gradient of Σ share · loss with respect to the student's logits.

  Args:
    rules: what the loss is.
    residuals: of `token_losses`.
    shares: `[N]`, of each token's loss in the sum.

  Returns:
    `[N, V]` float32, of the logits before temperature.
  """
  log_q = residuals.student_logits - residuals.normalizers[1]
  slopes = residuals.slopes
  if slopes is None:
    assert residuals.teacher_logits is not None  # one of the two is there
    # An accelerator computes them twice, to hold one array less.
    log_p = residuals.teacher_logits - residuals.normalizers[0]
    _, slopes = _loss_and_slopes(rules, log_p, log_q)
  gradient = slopes - jnp.exp(log_q) * residuals.slope_sum
  gradient *= (shares / rules.student_temperature)[:, None]
  if rules.num_real_tokens is None:
    return gradient
  ids = jax.lax.broadcasted_iota(jnp.int32, gradient.shape, 1)
  return jnp.where(ids < rules.num_real_tokens, gradient, 0.0)


def rows_gradient(
  tiles: Tiles, d_logits: jax.Array, head: jax.Array
) -> jax.Array:
  """Gradient of the hidden states, from that of their logits.

  Args:
    tiles: of the vocabulary; with several, the form that XLA's CPU is faster at.
    d_logits: `[N, V]` float32.
    head: `[D, V]`.

  Returns:
    `[N, D]` float32.
  """
  head = head.astype(jnp.float32)
  if tiles.number == 1:
    return jnp.einsum("nv,dv->nd", d_logits, head)
  # At T5's size five sixths of the time of the other form, to which XLA would turn
  # it without a barrier.
  product = jnp.einsum("nv,dv->dn", d_logits, head)
  return jax.lax.optimization_barrier(product).T


def _loss_and_slopes(rules, log_p, log_q):
  """A tile's part of the loss `[N]`, its derivative `[N, W]` by log_q."""
  loss, pull = jax.vjp(functools.partial(rules.divergence, log_p), log_q)
  (slopes,) = pull(jnp.ones_like(loss))
  return loss, slopes


def _first_of(so_far, x, largest, first):
  """First id `[N]` of the largest, of tiles so far and of one `[N, W]` more."""
  ids = vocabulary.argmax(x, largest)
  is_here = ids < x.shape[1]
  return jnp.where(is_here, jnp.minimum(so_far, first + ids), so_far)
