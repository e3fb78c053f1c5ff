"""Divergences against float64 numpy, by hand, and by their identities."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import divergences

BETAS = (0.1, 0.5, 0.9)
settings = hypothesis.settings(
  deadline=None, max_examples=25, derandomize=True
)
logits_pair = hnp.arrays(
  np.float32, (2, 3, 7), elements=st.floats(-30, 30, width=32)
)


def _kl(a, b):
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.sum(np.where(a > 0, a * (np.log(a) - np.log(b)), 0.0), axis=-1)


def oracle(name, p, q, beta=None, alpha=0.1):
  """The formulas of the paper in float64, from probabilities."""
  if name == "forward_kl":
    return _kl(p, q)
  if name == "reverse_kl":
    return _kl(q, p)
  if name == "total_variation":
    return 0.5 * np.abs(p - q).sum(-1)
  if name == "skew_forward_kl":
    return _kl(p, alpha * p + (1 - alpha) * q)
  if name == "skew_reverse_kl":
    return _kl(q, (1 - alpha) * p + alpha * q)
  m = beta * p + (1 - beta) * q
  value = beta * _kl(p, m) + (1 - beta) * _kl(q, m)
  return value / (beta * (1 - beta)) if name == "normalized_jsd" else value


def softmax64(logits):
  z = np.asarray(logits, np.float64)
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def hyper(name, beta):
  return {"beta": beta} if "jsd" in name else {}


def value(name, teacher, student, beta=0.5):
  p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
  return divergences.get(name, **hyper(name, beta))(p, q)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", divergences.names())
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_equals_float64(name, beta, scale):
  rng = np.random.default_rng(0)
  teacher, student = rng.normal(size=(2, 20, 50)).astype(np.float32) * scale
  expected = oracle(name, softmax64(teacher), softmax64(student), beta)
  got = value(name, teacher, student, beta)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


# p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): by hand.
@pytest.mark.parametrize(
  ("beta", "expected"),
  [
    (0.0, np.log(2) / 4),
    (1.0, np.log(2) / 4),
    (0.5, 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3)),
    (0.1, None),
  ],
)
def test_three_symbols_by_hand(beta, expected):
  p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
  if expected is None:
    # m = .1 p + .9 q = (.275, .25, .475)
    expected = 0.1 * (
      0.5 * np.log(0.5 / 0.275) + 0.25 * np.log(0.25 / 0.475)
    ) + 0.9 * (0.25 * np.log(0.25 / 0.275) + 0.5 * np.log(0.5 / 0.475))
  got = divergences.generalized_jsd(jnp.log(p), jnp.log(q), beta=beta)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_closed_form_gradients(beta):
  rng = np.random.default_rng(1)
  teacher, student = rng.normal(size=(2, 4, 9)).astype(np.float32) * 2
  p, q = softmax64(teacher), softmax64(student)
  m = beta * p + (1 - beta) * q
  expected = {
    "forward_kl": q - p,
    "reverse_kl": q * (np.log(q / p) - _kl(q, p)[:, None]),
    "jsd": (1 - beta) * q * (np.log(q / m) - _kl(q, m)[:, None]),
  }
  for name, gradient in expected.items():
    got = jax.grad(lambda s, n=name: value(n, teacher, s, beta).sum())(student)
    np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-6)


@settings
@hypothesis.given(logits_pair, st.sampled_from(BETAS))
def test_not_negative_and_zero_only_for_equal_laws(pair, beta):
  for name in divergences.names():
    assert np.all(np.asarray(value(name, pair[0], pair[1], beta)) >= 0)
    np.testing.assert_array_equal(value(name, pair[0], pair[0], beta), 0.0)


@settings
@hypothesis.given(logits_pair, st.sampled_from(BETAS))
def test_jsd_identities(pair, beta):
  teacher, student = pair
  got = value("jsd", teacher, student, beta)
  swapped = value("jsd", student, teacher, 1 - beta)
  np.testing.assert_allclose(got, swapped, rtol=1e-4, atol=1e-6)
  entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
  assert np.all(np.asarray(got) <= entropy + 1e-5)
  p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
  skewed = beta * divergences.skew_forward_kl(p, q, alpha=beta)
  skewed += (1 - beta) * divergences.skew_reverse_kl(p, q, alpha=1 - beta)
  np.testing.assert_allclose(got, skewed, rtol=1e-4, atol=1e-6)


def test_scaled_limits_and_small_gap():
  rng = np.random.default_rng(2)
  teacher, student = rng.normal(size=(2, 5, 11)).astype(np.float32)
  forward, reverse = (value(f"{w}_kl", teacher, student) for w in ("forward", "reverse"))
  low, high = (value("jsd", teacher, student, b) for b in (1e-3, 1 - 1e-3))
  np.testing.assert_allclose(low / 1e-3, forward, rtol=1e-2)
  np.testing.assert_allclose(high / 1e-3, reverse, rtol=1e-2)
  near = teacher + 0.01 * student
  for beta in BETAS:
    ratio = value("jsd", teacher, near, beta) / value("forward_kl", teacher, near)
    np.testing.assert_allclose(ratio, beta * (1 - beta), rtol=2e-2)


def test_normalized_jsd_joins_both_kls():
  rng = np.random.default_rng(3)
  teacher, student = rng.normal(size=(2, 5, 11)).astype(np.float32)
  for beta, end in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
    np.testing.assert_allclose(
      value("normalized_jsd", teacher, student, beta),
      value(end, teacher, student),
      rtol=1e-5,
    )
    near = abs(beta - 1e-4)
    np.testing.assert_allclose(
      value("normalized_jsd", teacher, student, near),
      value(end, teacher, student),
      rtol=1e-3,
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_traced_beta_equals_static(beta):
  rng = np.random.default_rng(4)
  teacher, student = rng.normal(size=(2, 5, 11)).astype(np.float32)
  for name in ("generalized_jsd", "normalized_jsd"):
    traced = jax.jit(lambda b, n=name: value(n, teacher, student, b))(beta)
    np.testing.assert_allclose(
      traced, value(name, teacher, student, beta), rtol=1e-5
    )


@pytest.mark.parametrize("bad", [-200.0, -1e9, -np.inf])
@pytest.mark.parametrize("name", divergences.names())
def test_finite_gradients_at_extreme_logits(name, bad):
  teacher = jnp.array([0.0, 1.0, bad, bad, 2.0])
  student = jnp.array([0.0, bad, 1.0, bad, 2.0])
  beta = 0.0 if name in ("generalized_jsd", "normalized_jsd") else 0.5
  result, grads = jax.value_and_grad(
    lambda t, s: value(name, t, s, beta), argnums=(0, 1)
  )(teacher, student)
  assert np.isfinite(result)
  assert all(np.all(np.isfinite(g)) for g in grads)


def test_bfloat16_near_equality_over_t5s_vocabulary():
  rng = np.random.default_rng(5)
  teacher = rng.normal(size=(4, 32128)) * 2
  student = teacher + 0.02 * rng.normal(size=teacher.shape)
  teacher, student = (jnp.asarray(x, jnp.bfloat16) for x in (teacher, student))
  p, q = (softmax64(np.asarray(x, np.float64)) for x in (teacher, student))
  for name in divergences.names():
    expected = oracle(name, p, q, 0.5)
    got = np.asarray(
      value(name, teacher.astype(jnp.float32), student.astype(jnp.float32))
    )
    assert np.all(got >= 0)
    assert np.all(got <= 2 * expected) and np.all(2 * got >= expected), name


def test_one_hot_teacher_gives_the_negative_log_likelihood():
  student = jnp.array([0.3, -1.0, 2.0])
  teacher = jnp.array([-jnp.inf, 0.0, -jnp.inf])
  got = value("forward_kl", teacher, student)
  np.testing.assert_allclose(got, -jax.nn.log_softmax(student)[1], rtol=1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: divergences.get("jsd", beta=0)(jnp.zeros(3), jnp.zeros(3)), "forward_kl"),
    (lambda: divergences.get("jsd", beta=1)(jnp.zeros(3), jnp.zeros(3)), "reverse_kl"),
    (lambda: divergences.get("jsd", beta=1.5), r"\[0, 1\], got 1.5; set BETA"),
    (lambda: divergences.get("forward_kll"), "forward_kl.*set DIVERGENCE"),
    (lambda: divergences.get("forward_kl", beta=0.5), "expected no beta"),
  ],
)
def test_wrong_settings(call, message):
  with pytest.raises(ValueError, match=message):
    call()
