"""What the divergences sum over the vocabulary, with all of their digits.

Of distributions a and b, in float32 from their log-probs; see `divergences` for K_s. Every
term is at least 0 and keeps its relative precision where a and b nearly agree;
values and gradients are finite at log-probs of -inf.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# exp is 0 in float32 well above it, and differences and sums stay finite.
_FLOOR = -1e10
# Ratios of probabilities are cut at e to this.
_MOST = 40.0
# Logarithms of ratios up to which differences of probabilities are by a series.
_NEAR = 0.5
# A share below this counts as 0, so that nothing is divided by it.
_NO_SHARE = 1e-20


def skewed_kl(
  log_a: jax.Array,
  log_b: jax.Array,
  share: float | jax.Array,
  rest: float | jax.Array,
) -> jax.Array:
  """K_s(a, b) = KL(a ‖ m) / s, m = (1-s) a + s b; s is `share`, 1-s `rest`.

  0 at s = 0, where m = a, and KL(a ‖ b) at s = 1. `[..., V]` to `[...]` nats.
  The caller gives both shares: float32 knows a share next to 1 less well than
  its rest.
  """
  # A static 1 needs no mixture.
  plain = isinstance(share, float) and share == 1
  shares = None if plain else (share, rest)
  terms = _terms(floored(log_a), floored(log_b), shares)
  return jnp.sum(terms, axis=-1)


def normalized_jsd(
  log_p: jax.Array, log_q: jax.Array, beta: Any, rest: Any
) -> jax.Array:
  """K_{1-β}(p, q) + K_β(q, p), `[..., V]` to `[...]` nats; `rest` is 1-β.

  The sum of two `skewed_kl`, in less time, since they have one mixture; at a β of
  1/2 that is not traced, in still less. A β that is not traced lies within 0 and 1.
  """
  log_p, log_q = floored(log_p), floored(log_q)
  if isinstance(beta, float) and beta == 0.5:
    return jnp.sum(_even_terms(log_p, log_q), axis=-1)
  return jnp.sum(_jsd_terms(log_p, log_q, beta, rest), axis=-1)


class Compared(NamedTuple):
  """Two distributions a and b, entry by entry, `[..., V]` float32 each.

  Attributes:
    a: probabilities.
    b: likewise.
    log_ratio: log(b / a).
    exp_rest: (e^x - 1 - x) / x² of x = log_ratio; only where x is within 1/2.
    gap: b - a, with the digits that a difference loses near a = b.
    excess: b/a - 1, at most e^40.
    excess_of_a: a/b - 1, likewise.
    smaller: the smaller of a and b, as a part of the larger.
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
  """Compares two distributions by three exponentials, which is where the time goes."""
  a, b, log_ratio = jnp.exp(log_a), jnp.exp(log_b), log_b - log_a
  smaller = jnp.exp(-jnp.abs(log_ratio))
  ratio = 1 / jnp.maximum(smaller, math.exp(-_MOST))  # larger / smaller
  grows = log_ratio > 0
  # expm1 by its series where a - b would cancel; cut, so as to be finite.
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
  """KL(p ‖ q) and KL(q ‖ p), `[..., V]` to `[...]` nats each.

  For metrics: both from one comparison, which has no closed-form gradient.
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
  """What K_s(a, b) sums: (a log(a / m) - a + m) / s.

  `shares` is (s, 1-s), or None where s is 1.
  """
  pair = compared(log_a, log_b)
  if shares is None:
    return _kl_term(pair)
  log_m, _ = _log_mixture(pair, *shares)
  return _term(pair.a, pair.gap, pair.excess, log_m, shares)


def _kl_term(pair):
  """a log(a / b) - a + b = a (e^x - 1 - x), x = log(b / a)."""
  x = pair.log_ratio
  far_term = pair.gap - pair.a * x
  near_term = pair.a * x * x * pair.exp_rest
  return jnp.where(jnp.abs(x) <= _NEAR, near_term, jnp.maximum(far_term, 0.0))


def _term(a, gap, excess, log_m, shares):
  """One of `_terms`, of b - a, b/a - 1 (at most e^40), and log(m / a).

  The sum over V is KL(a ‖ m) / s, since a and m both sum to 1. None of these
  terms is negative, while the plain a log(a / m) cancel near a = b. With
  y = b/a - 1 and v = s y, so that m = a (1 + v), a term is

    a (v - log1p(v)) / s = (b - a) (v - log1p(v)) / v
  """
  s, _ = shares
  v = s * excess
  # log1p(v) = 2 artanh(z) = 2 (z + z³/3 + ...), and v - 2 z = v z.
  # A reciprocal, since XLA's CPU does not fuse a division that is used twice.
  z = v * (1 / (2 + v))
  near_term = gap * z * (1 - (1 - z) * z * _artanh_rest(z * z))
  # Far terms are positive, but for the rounding of products near underflow.
  far_term = gap - a * log_m / jnp.maximum(s, _NO_SHARE)
  # An excess that was cut, at e^40 or 2.4e17, is not near, however small s is.
  near = (jnp.abs(v) < 0.25) & (excess < 2e17)
  terms = jnp.where(near, near_term, jnp.maximum(far_term, 0.0))
  return jnp.where(jnp.less(s, _NO_SHARE), 0.0, terms)


def _slope(log_a: jax.Array, log_b: jax.Array, shares: Any) -> jax.Array:
  """Derivative of `_terms` with respect to log b: (b - a) s b / m."""
  pair = compared(log_a, log_b)
  if shares is None:
    return pair.gap
  s, rest = shares
  return pair.gap * jax.nn.sigmoid(pair.log_ratio + _log(s) - _log(rest))


# The closed form keeps its digits where automatic differentiation of the
# branches would not, and needs no second pass through them. A term scales with
# (a, b), so its derivatives with respect to log a and log b add up to itself.
_terms.defjvps(
  lambda dot, terms, *args: dot * (terms - _slope(*args)),
  lambda dot, terms, *args: dot * _slope(*args),
  None,
)


@jax.custom_jvp
def _jsd_terms(
  log_p: jax.Array, log_q: jax.Array, beta: Any, rest: Any
) -> jax.Array:
  """What `normalized_jsd` sums: two `_terms` of one mixture."""
  pair = compared(log_p, log_q)
  of_p, of_q = _log_mixture(pair, rest, beta)
  return _term(pair.a, pair.gap, pair.excess, of_p, (rest, beta)) + _term(
    pair.b, -pair.gap, pair.excess_of_a, of_q, (beta, rest)
  )


def _jsd_slope(a, gap, excess, log_m, s):
  """Derivative of `_jsd_terms` with respect to log a: a log(a / m) / s.

  a is either distribution and s the share of the other, b, in m; b - a cancels between
  the two terms. At s = 0 this is a - b.
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

# (4^n - 1) B_2n / (2n)!: x tanh(x/2) is twice Σ c_n x^2n, 2 log cosh(x/2) is
# Σ c_n x^2n / n. Within |x| = 1 what follows is 2e-8 of the sum.
_TANH_SERIES = tuple(
  (4**n - 1) * bernoulli / math.factorial(2 * n)
  for n, bernoulli in enumerate(
    (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510),
    start=1,
  )
)


@jax.custom_jvp
def _even_terms(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """`_jsd_terms` at β = 1/2: (p + q) (x tanh(x/2) - 2 log cosh(x/2)).

  x = log(q / p). Even in x, so that a short series does for both terms, without
  a division.
  """
  x = log_q - log_p
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  near = (p + q) * _even_series(x, lambda n: 2 - 1 / n)
  log_m = _log_even_mixture(x)
  # p log(m / p) + q log(m / q), of which the smaller distribution's has the larger log.
  far = p * (log_m + jnp.maximum(x, 0.0)) + q * (log_m - jnp.minimum(x, 0.0))
  return jnp.where(jnp.abs(x) <= 1, near, jnp.maximum(-2 * far, 0.0))


def _even_slope(log_p, log_q):
  """Derivative of `_even_terms` with respect to log q: 2 q log(q / m)."""
  x = log_q - log_p
  near = x - _even_series(x, lambda n: 1 / n)
  far = 2 * (jnp.minimum(x, 0.0) - _log_even_mixture(x))
  return jnp.exp(log_q) * jnp.where(jnp.abs(x) <= 1, near, far)


def _even_series(x, weight):
  """Σ weight(n) c_n x^2n of `_TANH_SERIES`, of |x| cut at 1."""
  x2 = jnp.minimum(x * x, 1.0)
  y = jnp.zeros_like(x)
  for n in range(len(_TANH_SERIES), 0, -1):
    y = (y + weight(n) * _TANH_SERIES[n - 1]) * x2
  return y


def _log_even_mixture(x):
  """log(m / larger distribution) of the distributions' mean m: log((1 + e) / 2), e = exp(-|x|).

  2 artanh((e - 1) / (e + 3)), which on a CPU takes half the time of a log.
  """
  smaller = jnp.exp(-jnp.abs(x))
  return 2 * _artanh((smaller - 1) * (1 / (smaller + 3)), 13)


_even_terms.defjvps(
  lambda dot, _, log_p, log_q: dot * _even_slope(log_q, log_p),
  lambda dot, _, log_p, log_q: dot * _even_slope(log_p, log_q),
)


def _artanh_rest(z2: jax.Array, last: int = 9) -> jax.Array:
  """(artanh(z) / z - 1) / z², from z², by its series to z^last / last.

  To 2e-8 for |z| < 1/7 with 9 and for |z| <= 1/3 with 13.
  """
  y = jnp.full_like(z2, 1 / last)
  for n in range(last - 2, 2, -2):
    y = y * z2 + 1 / n
  return y


def _artanh(z: jax.Array, last: int = 9) -> jax.Array:
  return z * (1 + z * z * _artanh_rest(z * z, last))


def _exp_rest(x: jax.Array) -> jax.Array:
  """(e^x - 1 - x) / x² for |x| up to 1/2, by Taylor's series; to 2e-8."""
  y = jnp.full_like(x, 1 / math.factorial(8))
  for n in range(7, 1, -1):
    y = y * x + 1 / math.factorial(n)
  return y


def _log_mixture(pair: Compared, s: Any, rest: Any) -> tuple:
  """log(m / a) and log(m / b) of the mixture m = rest a + s b.

  By way of the larger distribution, of which m is a part that cannot overflow.
  """
  pick = functools.partial(jnp.where, pair.log_ratio > 0)
  part = pick(s, rest) + pick(rest, s) * pair.smaller
  log_part = jnp.log(jnp.maximum(part, jnp.finfo(jnp.float32).tiny))
  if not (isinstance(s, float) and min(s, rest) >= _NO_SHARE):
    # Without a share of the larger distribution, the smaller one's exp may be 0.
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
  """Log-probs `[..., V]` in float32, -1e10 where they are lower."""
  return jnp.maximum(log_probs.astype(jnp.float32), _FLOOR)


def _log(share: float | jax.Array) -> jax.Array:
  """log(share), and a finite number below all log-probs' differences at 0."""
  positive = jnp.greater(share, 0)
  return jnp.where(positive, jnp.log(jnp.where(positive, share, 1.0)), -1e12)
