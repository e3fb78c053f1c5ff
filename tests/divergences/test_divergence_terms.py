"""Terms of divergences, entry by entry, against extended precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.divergences import stable

# Largest |log(q / p)|, on both sides of where a series gives way to a logarithm.
GAPS = (1e-5, 1e-3, 0.1, 0.49, 0.51, 0.99, 1.01, 4.0, 30.0)


def distributions(gap):
  """log p and log q of 4000 entries, `[4000, 1]`: no sum hides an entry."""
  rng = np.random.default_rng(0)
  log_p = -rng.uniform(0.1, 12, (4000, 1))
  log_q = log_p - gap * rng.uniform(0.7, 1, log_p.shape)
  pair = np.float32(log_p), np.float32(log_q)
  return [np.concatenate(pair), np.concatenate(pair[::-1])]


def extended(log_p, log_q):
  """p, q, log(q / p), and log of (p + q) / 2 over each."""
  log_p, log_q = np.longdouble(log_p), np.longdouble(log_q)
  x = log_q - log_p
  log_m = [np.log1p(np.expm1(y) / 2) for y in (x, -x)]
  return np.exp(log_p), np.exp(log_q), x, *log_m


def assert_digits(got, expected, rtol):
  np.testing.assert_allclose(
    np.asarray(got, np.longdouble), expected[..., 0], rtol=rtol
  )


@pytest.mark.parametrize("gap", GAPS)
def test_kls_of_entries_keep_their_digits(gap):
  pair = distributions(gap)
  p, q, x, *_ = extended(*pair)
  forward, reverse = p * (np.expm1(x) - x), q * (np.expm1(-x) + x)
  got = jax.jit(stable.both_kls)(*pair)
  assert_digits(got[0], forward, 2e-6)
  assert_digits(got[1], reverse, 2e-6)
  kl = jax.jit(lambda a, b: stable.skewed_kl(a, b, 1.0, 0.0))
  assert_digits(kl(*pair), forward, 2e-6)
  assert_digits(kl(*pair[::-1]), reverse, 2e-6)


@pytest.mark.parametrize("beta", [0.5, np.float32(0.5)])
@pytest.mark.parametrize("gap", GAPS)
def test_jsd_of_entries_keeps_its_digits(gap, beta):
  """At a β of 1/2 that is known, and at one that is traced."""
  pair = distributions(gap)
  p, q, _, of_p, of_q = extended(*pair)

  def loss(log_p, log_q, beta):
    return stable.normalized_jsd(log_p, log_q, beta, 1 - beta)

  def total(log_p, log_q, beta):
    return jnp.sum(loss(log_p, log_q, beta))

  known = isinstance(beta, float)
  static = {"static_argnums": 2} if known else {}
  value = jax.jit(loss, **static)(*pair, beta)
  slopes = jax.jit(jax.grad(total, (0, 1)), **static)(*pair, beta)
  assert_digits(value, -2 * (p * of_p + q * of_q), 4e-6)
  assert_digits(slopes[0][..., 0], -2 * p * of_p, 1e-6)
  assert_digits(slopes[1][..., 0], -2 * q * of_q, 1e-6)
