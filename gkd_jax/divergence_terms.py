"""What the divergences sum over the vocabulary, with all of their digits.

Of laws a and b, in float32 from their log-probs; see `divergences` for K_s. Every
term is at least 0 and keeps its relative precision where a and b nearly agree;
values and gradients are finite at log-probs of -inf.
"""

from typing import Any

import jax
import jax.numpy as jnp

# exp is 0 in float32 well above it, and differences and sums stay finite.
_FLOOR = -1e10

# Logarithms of ratios are cut here before exp.
_MOST = 40.0

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

  The sum of two `skewed_kl`, in less time, since they have one mixture. A β that is not traced
  lies within 0 and 1.
  """
  terms = _jsd_terms(floored(log_p), floored(log_q), beta, rest)
  return jnp.sum(terms, axis=-1)


@jax.custom_jvp
def _terms(log_a: jax.Array, log_b: jax.Array, shares: Any) -> jax.Array:
  """What K_s(a, b) sums: (a log(a / m) - a + m) / s.

  `shares` is (s, 1-s), or None where s is 1.
  """
  gap, excess = difference(log_a, log_b)
  if shares is None:
    log_m = log_b - log_a
  else:
    log_m = _log_mixture(log_b - log_a, *shares)
  return _term(jnp.exp(log_a), gap, excess, log_m, shares)


def _term(a, gap, excess, log_m, shares):
  """One of `_terms`, of b - a, b/a - 1 (at most e^40), and log(m / a).

  The sum over V is KL(a ‖ m) / s, since a and m both sum to 1. None of these
  terms is negative, while the plain a log(a / m) cancel near a = b. With
  y = b/a - 1 and v = s y, so that m = a (1 + v), a term is

    a (v - log1p(v)) / s = (b - a) (v - log1p(v)) / v
  """
  s = shares[0] if shares else 1.0
  v = s * excess
  # log1p(v) = 2 artanh(z) = 2 (z + z³/3 + ...), and v - 2 z = v z.
  z = v / (2 + v)
  near_term = gap * z * (1 - (1 - z) * z * _artanh_rest(z * z))
  # Far terms are positive, but for the rounding of products near underflow.
  far_term = gap - a * log_m / jnp.maximum(s, _NO_SHARE)
  # An excess that was cut, at e^40 or 2.4e17, is not near, however small s is.
  near = (jnp.abs(v) < 0.25) & (excess < 2e17)
  terms = jnp.where(near, near_term, jnp.maximum(far_term, 0.0))
  return jnp.where(jnp.less(s, _NO_SHARE), 0.0, terms)


def _slope(log_a: jax.Array, log_b: jax.Array, shares: Any) -> jax.Array:
  """Derivative of `_terms` with respect to log b: (b - a) s b / m."""
  gap, _ = difference(log_a, log_b)
  if shares is None:
    return gap
  s, rest = shares
  return gap * jax.nn.sigmoid(log_b - log_a + _log(s) - _log(rest))


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
  log_ratio = log_q - log_p
  gap, excess = difference(log_p, log_q)
  log_m = _log_mixture(log_ratio, rest, beta)  # log(m / p)
  forward = _term(jnp.exp(log_p), gap, excess, log_m, (rest, beta))
  excess = jnp.expm1(jnp.minimum(-log_ratio, _MOST))
  log_m = _log_mixture(-log_ratio, beta, rest)  # log(m / q)
  reverse = _term(jnp.exp(log_q), -gap, excess, log_m, (beta, rest))
  return forward + reverse


def _jsd_slope(log_own: jax.Array, log_other: jax.Array, s: Any, rest: Any):
  """Derivative of `_jsd_terms` with respect to log_own: a log(a / m) / s.

  a is the law of log_own and s the share of the other, b, in m; b - a cancels
  between the two terms. At s = 0 this is a - b.
  """
  log_ratio = log_other - log_own
  a = jnp.exp(log_own)
  v = s * jnp.expm1(jnp.minimum(log_ratio, _MOST))
  near = 2 * _artanh(v / (2 + v))
  far = _log_mixture(log_ratio, s, rest)
  log_m = jnp.where((jnp.abs(v) < 0.25) & (log_ratio < _MOST), near, far)
  slope = -a * log_m / jnp.maximum(s, _NO_SHARE)
  if isinstance(s, float):
    return slope
  gap, _ = difference(log_own, log_other)
  return jnp.where(s < _NO_SHARE, -gap, slope)


_jsd_terms.defjvps(
  lambda dot, _, p, q, beta, rest: dot * _jsd_slope(p, q, rest, beta),
  lambda dot, _, p, q, beta, rest: dot * _jsd_slope(q, p, beta, rest),
  None,
  None,
)


def _artanh_rest(z2: jax.Array) -> jax.Array:
  """(artanh(z) / z - 1) / z² for |z| < 1/7, from z²."""
  return 1 / 3 + z2 * (1 / 5 + z2 * (1 / 7 + z2 / 9))


def _artanh(z: jax.Array) -> jax.Array:
  return z * (1 + z * z * _artanh_rest(z * z))


def _log_mixture(log_ratio: jax.Array, s: Any, rest: Any) -> jax.Array:
  """log(rest + s e^log_ratio), from the larger one where e^ would overflow."""
  within = jnp.clip(log_ratio, -87.0, 87.0)
  larger = jnp.maximum(_log(rest), log_ratio + _log(s))
  log_m = jnp.log(rest + s * jnp.exp(within))
  return jnp.where(within == log_ratio, log_m, larger)


def difference(
  log_a: jax.Array, log_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """b - a, with the digits that exp(log_b) - exp(log_a) loses near a = b.

  And b/a - 1, which is at most e^40; `[..., V]` float32 all.
  """
  log_ratio = log_b - log_a
  a = jnp.exp(log_a)
  excess = jnp.expm1(jnp.minimum(log_ratio, _MOST))
  # Where b > e a nothing cancels, and a might be 0.
  gap = jnp.where(log_ratio < 1, a * excess, jnp.exp(log_b) - a)
  return gap, excess


def floored(log_probs: jax.Array) -> jax.Array:
  """Log-probs `[..., V]` in float32, -1e10 where they are lower."""
  return jnp.maximum(log_probs.astype(jnp.float32), _FLOOR)


def _log(share: float | jax.Array) -> jax.Array:
  """log(share), and a finite number below all log-probs' differences at 0."""
  positive = jnp.greater(share, 0)
  return jnp.where(positive, jnp.log(jnp.where(positive, share, 1.0)), -1e12)
