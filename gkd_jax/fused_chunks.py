"""Loss and gradient of one chunk of tokens, by tiles of the vocabulary.

For `fused_loss`. A tile is a range of token ids. With several of them only the
logits of both models and the slopes are held for the whole vocabulary, `[V, N]` each;
log-probs and terms are made a tile at a time, while they are in a CPU's cache. (Were
the slopes put where the teacher's logits lie, XLA would copy those at each tile.)

The vocabulary is the first axis and tokens are the last: sums over the vocabulary
then run over whole vectors of tokens, which XLA's CPU backend needs to vectorise
them. N stands for the tokens of a chunk, W for the ids of a tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax import losses, types


class Rules(NamedTuple):
  """What a token's loss is; see `losses.distillation_loss`."""

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
    """At most so many tiles, each of several of these."""
    for number in range(min(most, self.number), 1, -1):
      if self.number % number == 0:
        return Tiles(number, self.width * self.number // number)
    return Tiles(1, self.width * self.number)

  def each(self, body: Callable, start: Any) -> Any:
    """`body(first id of a tile, carry)` for all tiles in turn."""
    if self.number == 1:
      return body(0, start)
    return jax.lax.fori_loop(
      0, self.number, lambda i, carry: body(i * self.width, carry), start
    )

  def of(self, x: jax.Array, first: Any, axis: int = 0) -> jax.Array:
    """The tile's part of an array that has V at `axis`."""
    if self.number == 1:
      return x
    return jax.lax.dynamic_slice_in_dim(x, first, self.width, axis)

  def put(self, x: jax.Array, part: jax.Array, first: Any, axis: int = 0):
    """The array with another part in the tile's place."""
    if self.number == 1:
      return part
    return jax.lax.dynamic_update_slice_in_dim(x, part, first, axis)


class Slopes(NamedTuple):
  """What the gradient of the loss with respect to the logits is made from.

  Attributes:
    slopes: `[V, N]`, derivative of each token's loss with respect to the student's
      log-probs.
    total: `[N]`, their sums.
    student_logits: `[V, N]`, divided by the temperature.
    normalizer: `[1, N]`, of the student's logits.
  """

  slopes: jax.Array
  total: jax.Array
  student_logits: jax.Array
  normalizer: jax.Array


def token_losses(
  rules: Rules,
  tiles: Tiles,
  teacher_logits: jax.Array,
  student_logits: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array], Slopes]:
  """`losses.token_losses` with what the gradient needs.

  Args:
    rules: what the loss is.
    tiles: of the vocabulary.
    teacher_logits: `[V, N]` float32.
    student_logits: `[V, N]` float32.

  Returns:
    Nats `[N]`, `losses.TOKEN_METRICS` `[N]` each, and what the gradient needs.
  """
  # A mask has to follow a temperature, see `losses.without_padding`.
  p = _where_real(rules, teacher_logits / rules.teacher_temperature, -1e9)
  q = _where_real(rules, student_logits / rules.student_temperature, -1e9)
  normalizers = [jax.nn.logsumexp(x, axis=0, keepdims=True) for x in (p, q)]

  def sweep(first, carry):
    loss, total, metrics, all_slopes = carry
    log_p = tiles.of(p, first) - normalizers[0]
    log_q = tiles.of(q, first) - normalizers[1]
    of_student = lambda log_q: _along(rules.divergence)(log_p, log_q)
    here, pull = jax.vjp(of_student, log_q)
    (slopes,) = pull(jnp.ones_like(here))
    new = _along(losses.summed_metrics)(log_p, log_q)
    return (
      loss + here,
      total + jnp.sum(slopes, axis=0, keepdims=True),
      {name: metrics[name] + x for name, x in new.items()},
      tiles.put(all_slopes, slopes, first),
    )

  agree = losses.first_of_largest(p, 0) == losses.first_of_largest(q, 0)
  zero = jnp.zeros(p.shape[1:], jnp.float32)
  names = [name for name in losses.TOKEN_METRICS if name != losses.AGREEMENT]
  start = zero, zero[None], dict.fromkeys(names, zero), jnp.zeros_like(p)
  loss, total, metrics, slopes = tiles.each(sweep, start)
  metrics[losses.AGREEMENT] = agree
  return loss, metrics, Slopes(slopes, total, q, normalizers[1])


def logits_gradient(
  rules: Rules, slopes: Slopes, shares: jax.Array
) -> jax.Array:
  """Gradient of Σ share · loss with respect to the student's logits.

  Args:
    rules: what the loss is.
    slopes: of `token_losses`.
    shares: `[N]`, of each token's loss in the sum.

  Returns:
    `[V, N]` float32.
  """
  student = jnp.exp(slopes.student_logits - slopes.normalizer)
  gradient = slopes.slopes - student * slopes.total
  gradient *= (shares / rules.student_temperature)[None]
  return _where_real(rules, gradient, 0.0)


def _where_real(rules, x, otherwise):
  """`x` `[V, N]` where a token id is none of the vocabulary's padding."""
  if rules.num_real_tokens is None:
    return x
  ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
  return jnp.where(ids < rules.num_real_tokens, x, otherwise)


def _along(function):
  # Divergences sum over the last axis. Mapping what is pointwise but for one sum
  # moves no data.
  return jax.vmap(function, in_axes=1)
