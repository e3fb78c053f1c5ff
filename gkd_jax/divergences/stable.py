"""The terms that divergences sum over the vocabulary, without cancellation.

For distributions a and b, in float32, from their log-probs; K_s is defined in
`kl`. Every term is at least 0 and keeps its relative precision where a and b
nearly agree; values and gradients are finite at log-probs of -inf.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# float32's exp is 0 here, and differences and sums stay finite.
_FLOOR = -1e10
# Ratios of probabilities are clipped at e to this power.
_MOST = 40.0
# Log-ratios up to which differences of probabilities use a series.
_NEAR = 0.5
# A smaller share counts as 0, to avoid dividing by it.
_NO_SHARE = 1e-20


def skewed_kl(
  log_a: jax.Array,
  log_b: jax.Array,
  share: float | jax.Array,
  rest: float | jax.Array,
) -> jax.Array:
  """Computes K_s(a, b) = KL(a ‖ m) / s, m = (1-s) a + s b.

  It is 0 at s = 0, where m = a, and KL(a ‖ b) at s = 1.

  Args:
    log_a: `[..., V]`.
    log_b: `[..., V]`.
    share: s.
    rest: 1-s, which float32 cannot recover from an s close to 1.

  Returns:
    `[...]` nats.
  """
  # A static 1 needs no mixture.
  plain = isinstance(share, float) and share == 1
  shares = None if plain else (share, rest)
  terms = _terms(floored(log_a), floored(log_b), shares)
  return jnp.sum(terms, axis=-1)


def normalized_jsd(
  log_p: jax.Array, log_q: jax.Array, beta: Any, rest: Any
) -> jax.Array:
  """Computes K_{1-β}(p, q) + K_β(q, p); `rest` is 1-β.

  The sum of two `skewed_kl` in less time, since they share one mixture. A β
  that is known when tracing is in (0, 1).

  Args:
    log_p: `[..., V]`.
    log_q: `[..., V]`.
    beta: the share of p in the mixture.
    rest: that of q.

  Returns:
    `[...]` nats.
  """
  log_p, log_q = floored(log_p), floored(log_q)
  return jnp.sum(_jsd_terms(log_p, log_q, beta, rest), axis=-1)


class Compared(NamedTuple):
  """Two distributions a and b, entry by entry; `[..., V]` float32 each.

  Attributes:
    a: probabilities.
    b: probabilities.
    log_ratio: log(b / a).
    exp_rest: (e^x - 1 - x) / x² of x = log_ratio; valid for |x| up to 1/2.
    gap: b - a, precise near a = b too.
    excess: b/a - 1, at most e^40.
    excess_of_a: a/b - 1, at most e^40.
    smaller: the smaller of a and b over the larger.
  """

  a: jax.Array
  b: jax.Array
  log_ratio: jax.Array
  exp_rest: jax.Array
  gap: jax.Array
  excess: jax.Array
  excess_of_a: jax.Array
  smaller: jax.Array


def compared(log_a: jax.Array, log_b: jax.Array) -> Compared:
  """Compares two distributions; its three exponentials take most of the time."""
  a, b, log_ratio = jnp.exp(log_a), jnp.exp(log_b), log_b - log_a
  smaller = jnp.exp(-jnp.abs(log_ratio))
  ratio = 1 / jnp.maximum(smaller, math.exp(-_MOST))  # larger / smaller
  grows = log_ratio > 0
  # expm1 by its series where a - b would cancel; clipped to stay finite.
  x = jnp.clip(log_ratio, -_NEAR, _NEAR)
  rest = _exp_rest(x)
  rise = x * (1 + x * rest)
  near = x == log_ratio
  fall = -rise * jnp.where(grows, smaller, ratio)
  return Compared(
    a,
    b,
    log_ratio,
    rest,
    jnp.where(near, a * rise, b - a),
    jnp.where(near, rise, jnp.where(grows, ratio, smaller) - 1),
    jnp.where(near, fall, jnp.where(grows, smaller, ratio) - 1),
    smaller,
  )


def both_kls(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes KL(p ‖ q) and KL(q ‖ p), `[...]` nats each, from `[..., V]`.

  For metrics, from one comparison; the gradient has no closed form here.
  """
  pair = compared(floored(log_p), floored(log_q))
  forward = _kl_term(pair)
  x, rest = pair.log_ratio, pair.exp_rest
  # a x² (E - R) with R = `exp_rest` and E = (e^x - 1) / x = 1 + x R.
  near_term = pair.a * x * x * (1 - (1 - x) * rest)
  far_term = pair.b * x - pair.gap
  reverse = jnp.where(
    jnp.abs(x) <= _NEAR, near_term, jnp.maximum(far_term, 0.0)
  )
  return jnp.sum(forward, axis=-1), jnp.sum(reverse, axis=-1)


@jax.custom_jvp
def _terms(log_a: jax.Array, log_b: jax.Array, shares: Any) -> jax.Array:
  """Computes the terms of K_s(a, b): (a log(a / m) - a + m) / s.

  `shares` is (s, 1-s), or None for s = 1.
  """
  pair = compared(log_a, log_b)
  if shares is None:
    return _kl_term(pair)
  log_m, _ = _log_mixture(pair, *shares)
  return _term(pair.a, pair.gap, pair.excess, log_m, shares)


def _kl_term(pair):
  """Computes a log(a / b) - a + b = a (e^x - 1 - x), x = log(b / a)."""
  x = pair.log_ratio
  far_term = pair.gap - pair.a * x
  near_term = pair.a * x * x * pair.exp_rest
  return jnp.where(jnp.abs(x) <= _NEAR, near_term, jnp.maximum(far_term, 0.0))


def _term(a, gap, excess, log_m, shares):
  """Computes `_terms` from a, b - a, b/a - 1 (at most e^40) and log(m / a).

  The sum over V is KL(a ‖ m) / s, since a and m both sum to 1. No term is
  negative, while the plain a log(a / m) cancel near a = b. With
  y = b/a - 1 and v = s y, so that m = a (1 + v), a term is

    a (v - log1p(v)) / s = (b - a) (v - log1p(v)) / v
  """
  s, _ = shares
  v = s * excess
  # log1p(v) = 2 artanh(z) = 2 (z + z³/3 + ...), and v - 2 z = v z.
  # A reciprocal: XLA's CPU backend does not fuse a division that is used twice.
  z = v * (1 / (2 + v))
  near_term = gap * z * (1 - (1 - z) * z * _artanh_rest(z * z))
  # Far terms are positive up to the rounding of products near underflow.
  far_term = gap - a * log_m / jnp.maximum(s, _NO_SHARE)
  # An excess clipped at e^40 = 2.4e17 is not near, however small s is.
  near = (jnp.abs(v) < 0.25) & (excess < 2e17)
  terms = jnp.where(near, near_term, jnp.maximum(far_term, 0.0))
  return jnp.where(jnp.less(s, _NO_SHARE), 0.0, terms)


def _slope(log_a: jax.Array, log_b: jax.Array, shares: Any) -> jax.Array:
  """Computes the derivative of `_terms` by log b: (b - a) s b / m."""
  pair = compared(log_a, log_b)
  if shares is None:
    return pair.gap
  s, rest = shares
  return pair.gap * jax.nn.sigmoid(pair.log_ratio + _log(s) - _log(rest))


# The closed form is precise where automatic differentiation of the branches is
# not, and does not need the branches again. A term is homogeneous in (a, b), so
# its derivatives by log a and log b add up to the term.
_terms.defjvps(
  lambda dot, terms, *args: dot * (terms - _slope(*args)),
  lambda dot, terms, *args: dot * _slope(*args),
  None,
)


@jax.custom_jvp
def _jsd_terms(
  log_p: jax.Array, log_q: jax.Array, beta: Any, rest: Any
) -> jax.Array:
  """Computes the terms of `normalized_jsd`: two `_terms` of one mixture."""
  pair = compared(log_p, log_q)
  of_p, of_q = _log_mixture(pair, rest, beta)
  return _term(pair.a, pair.gap, pair.excess, of_p, (rest, beta)) + _term(
    pair.b, -pair.gap, pair.excess_of_a, of_q, (beta, rest)
  )


def _jsd_slope(a, gap, excess, log_m, s):
  """Computes the derivative of `_jsd_terms` by log a: a log(a / m) / s.

  a is one of the two distributions and s the share of the other one, b, in m;
  b - a cancels between the two terms. At s = 0 the derivative is a - b.
  """
  v = s * excess
  near = 2 * _artanh(v * (1 / (2 + v)))  # a reciprocal as in `_term`
  log_m = jnp.where((jnp.abs(v) < 0.25) & (excess < 2e17), near, log_m)
  slope = -a * log_m / jnp.maximum(s, _NO_SHARE)
  if isinstance(s, float):
    return slope
  return jnp.where(s < _NO_SHARE, -gap, slope)


def _slope_of_p(log_p, log_q, beta, rest):
  pair = compared(log_p, log_q)
  log_m, _ = _log_mixture(pair, rest, beta)
  return _jsd_slope(pair.a, pair.gap, pair.excess, log_m, rest)


def _slope_of_q(log_p, log_q, beta, rest):
  pair = compared(log_p, log_q)
  _, log_m = _log_mixture(pair, rest, beta)
  return _jsd_slope(pair.b, -pair.gap, pair.excess_of_a, log_m, beta)


_jsd_terms.defjvps(
  lambda dot, _, *args: dot * _slope_of_p(*args),
  lambda dot, _, *args: dot * _slope_of_q(*args),
  None,
  None,
)


def _artanh_rest(z2: jax.Array) -> jax.Array:
  """Computes (artanh(z) / z - 1) / z² from z², to 2e-8 for |z| < 1/7."""
  y = jnp.full_like(z2, 1 / 9)
  for n in (7, 5, 3):
    y = y * z2 + 1 / n
  return y


def _artanh(z: jax.Array) -> jax.Array:
  return z * (1 + z * z * _artanh_rest(z * z))


def _exp_rest(x: jax.Array) -> jax.Array:
  """Computes (e^x - 1 - x) / x², to 2e-8 for |x| up to 1/2."""
  y = jnp.full_like(x, 1 / math.factorial(8))
  for n in range(7, 1, -1):
    y = y * x + 1 / math.factorial(n)
  return y


def _log_mixture(pair: Compared, s: Any, rest: Any) -> tuple:
  """Computes log(m / a) and log(m / b) of the mixture m = rest a + s b.

  Both follow from m over the larger of a and b, which cannot overflow.
  """
  pick = functools.partial(jnp.where, pair.log_ratio > 0)
  part = pick(s, rest) + pick(rest, s) * pair.smaller
  log_part = jnp.log(jnp.maximum(part, jnp.finfo(jnp.float32).tiny))
  if not (isinstance(s, float) and min(s, rest) >= _NO_SHARE):
    # Without a share of the larger one, the smaller one's exp may underflow.
    log_part = jnp.where(
      pick(s, rest) < _NO_SHARE,
      pick(_log(rest), _log(s)) - jnp.abs(pair.log_ratio),
      log_part,
    )
  return (
    log_part + jnp.maximum(pair.log_ratio, 0.0),
    log_part - jnp.minimum(pair.log_ratio, 0.0),
  )


def floored(log_probs: jax.Array) -> jax.Array:
  """Returns log-probs `[..., V]` in float32, at least -1e10."""
  return jnp.maximum(log_probs.astype(jnp.float32), _FLOOR)


def _log(share: float | jax.Array) -> jax.Array:
  """Computes log(share); at 0, a number below all differences of log-probs."""
  positive = jnp.greater(share, 0)
  return jnp.where(positive, jnp.log(jnp.where(positive, share, 1.0)), -1e12)
