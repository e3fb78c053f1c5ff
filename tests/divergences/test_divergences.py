"""Divergences against float64 numpy, by hand, and by their identities."""

import functools

import divergence_oracle
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import loss_batches
import numpy as np
import pytest
from jax import test_util

from gkd_jax import divergences
from gkd_jax.divergences import kl

BETAS = (0.1, 0.5, 0.9)
T5_VOCAB = 32128
settings = hypothesis.settings(deadline=None, max_examples=15, derandomize=True)
logits_pairs = hnp.arrays(
  np.float32, (2, 3, 7), elements=st.floats(-30, 30, width=32)
)


def _from_logits(name, teacher, student, beta=0.5, alpha=0.1):
  p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (teacher, student))
  hyper = {"beta": beta} if "jsd" in name else {}
  if "skew" in name:
    hyper = {"alpha": alpha}
  return divergences.get(name, **hyper)(p, q)


value = jax.jit(_from_logits, static_argnames=("name", "beta", "alpha"))


@functools.partial(jax.jit, static_argnames=("name", "beta"))
def gradients(name, teacher, student, beta=0.5):
  """With respect to both logits."""
  summed = lambda t, s: jnp.sum(_from_logits(name, t, s, beta))
  return jax.grad(summed, argnums=(0, 1))(teacher, student)


@functools.partial(jax.jit, static_argnames=("beta",))
def every_value(teacher, student, beta=0.5):
  """All divergences by name."""
  return {
    name: _from_logits(name, teacher, student, beta)
    for name in divergences.names()
  }


def random_pair(seed=0, shape=(5, 11), scale=1.0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, *shape)).astype(np.float32) * np.float32(scale)


@pytest.mark.parametrize("beta", BETAS)
def test_equals_float64(beta):
  for scale in (0.3, 3.0, 30.0):
    teacher, student = random_pair(shape=(20, 50), scale=scale)
    for name, got in every_value(teacher, student, beta).items():
      assert got.dtype == jnp.float32
      expected = divergence_oracle.divergence(name, teacher, student, beta)
      np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("low", [-200.0, -1e9])
def test_equals_float64_where_probabilities_underflow(low):
  teacher, student = random_pair(shape=(20, 50))
  teacher[:, :10] = low
  student[:, 5:20] = low
  for name, got in every_value(teacher, student).items():
    expected = divergence_oracle.divergence(name, teacher, student)
    np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
def test_equals_float64_near_equality(gap):
  # From log-probs: log_softmax itself rounds by as much as these gaps.
  rng = np.random.default_rng(1)
  p = np.float32(loss_batches.log_softmax64(rng.normal(size=(9, 40))))
  q = np.float32(p + gap * rng.normal(size=p.shape))
  a, b = np.exp(np.float64(p)), np.exp(np.float64(q))
  kl = lambda a, b: np.sum(a * np.log(a / b) - a + b, axis=-1)
  m = (a + b) / 2
  jsd = (kl(a, m) + kl(b, m)) / 2
  expected = {
    "forward_kl": kl(a, b),
    "reverse_kl": kl(b, a),
    "jsd": jsd,
    "generalized_jsd": jsd,
    "normalized_jsd": 4 * jsd,
    "total_variation": np.abs(a - b).sum(-1) / 2,
    "skew_forward_kl": kl(a, 0.1 * a + 0.9 * b),
    "skew_reverse_kl": kl(b, 0.1 * b + 0.9 * a),
  }
  assert expected.keys() == set(divergences.names())
  for name, number in expected.items():
    hyper = {"beta": 0.5} if "jsd" in name else {}
    got = divergences.get(name, **hyper)(p, q)
    np.testing.assert_allclose(got, number, rtol=2e-6, err_msg=name)


# p = (1/2, 3/8, 1/8) and q = (1/4, 1/4, 1/2). The mixture is (0.275, 0.2625,
# 0.4625) at β = 0.1, (0.375, 0.3125, 0.3125) at 0.5, (0.475, 0.3625, 0.1625) at
# 0.9. By hand: KL(p ‖ m), then KL(q ‖ m).
HAND_TABLE = {
  0.1: (0.26913000, 0.00295568),
  0.5: (0.09767528, 0.07784965),
  0.9: (0.00556420, 0.30861069),
}
# KL(p ‖ q) and KL(q ‖ p).
HAND_KLS = {0.0: 0.32533621, 1.0: 0.41849411}


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_three_symbols_by_hand(beta):
  p, q = jnp.log(jnp.array([[0.5, 0.375, 0.125], [0.25, 0.25, 0.5]]))
  if beta in HAND_KLS:
    plain = "forward_kl" if beta == 0 else "reverse_kl"
    expected = dict.fromkeys(
      (plain, "generalized_jsd", "normalized_jsd"), HAND_KLS[beta]
    )
  else:
    of_p, of_q = HAND_TABLE[beta]
    jsd = beta * of_p + (1 - beta) * of_q
    normalized = of_p / (1 - beta) + of_q / beta
    expected = {
      "jsd": jsd,
      "generalized_jsd": jsd,
      "normalized_jsd": normalized,
    }
  for name, number in expected.items():
    hyper = {"beta": beta} if "jsd" in name else {}
    got = divergences.get(name, **hyper)(p, q)
    np.testing.assert_allclose(got, number, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gap", [None, 1e-2])
def test_closed_form_gradients(beta, gap):
  teacher, student = random_pair(1, (4, 9), 2.0)
  if gap:
    student = teacher + np.float32(gap) * student
  log_p, log_q = map(loss_batches.log_softmax64, (teacher, student))
  p, q = np.exp(log_p), np.exp(log_q)
  log_m = divergence_oracle.mix(log_p, log_q, beta)
  jsd = (
    (1 - beta)
    * q
    * (log_q - log_m - divergence_oracle.kl(log_q, log_m)[:, None])
  )
  expected = {
    "forward_kl": q - p,
    "reverse_kl": q
    * (log_q - log_p - divergence_oracle.kl(log_q, log_p)[:, None]),
    "jsd": jsd,
    "generalized_jsd": jsd,
    "normalized_jsd": jsd / (beta * (1 - beta)),
  }
  # log_softmax rounds a small gap.
  tolerance = 1e-4 if gap else 2e-6
  for name, gradient in expected.items():
    _, got = gradients(name, teacher, student, beta)
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(
      got / scale, gradient / scale, atol=tolerance, err_msg=name
    )


# The second derivative checks that the closed form of the first can itself be
# differentiated; total variation has none.
@pytest.mark.parametrize(
  ("name", "order"),
  [
    ("forward_kl", 2),
    ("jsd", 2),
    ("skew_forward_kl", 1),
    ("skew_reverse_kl", 1),
    ("total_variation", 1),
  ],
)
def test_gradients_equal_finite_differences(name, order):
  teacher, student = random_pair(2, (2, 5))
  function = lambda t, s: value(name, t, s)
  test_util.check_grads(
    function, (teacher, student), order=order, atol=2e-2, rtol=2e-2, eps=1e-2
  )


@settings
@hypothesis.given(logits_pairs, st.sampled_from(BETAS))
def test_not_negative_and_zero_only_for_equal_distributions(pair, beta):
  teacher, student = pair
  p, q = (np.exp(loss_batches.log_softmax64(x)) for x in pair)
  differ = np.abs(p - q).max(-1) > 1e-5
  for got in every_value(teacher, student, beta).values():
    assert np.all(np.asarray(got) >= 0)
    assert np.all(np.asarray(got)[differ] > 0)
  for got in every_value(teacher, teacher, beta).values():
    np.testing.assert_array_equal(got, 0.0)


@settings
@hypothesis.given(logits_pairs, st.floats(-20, 20, width=32))
def test_shifted_logits_change_nothing(pair, shift):
  teacher, student = pair
  shifted = every_value(teacher + shift, student - shift)
  for name, expected in every_value(teacher, student).items():
    np.testing.assert_allclose(
      shifted[name], expected, rtol=1e-4, atol=1e-5, err_msg=name
    )


@settings
@hypothesis.given(logits_pairs, st.sampled_from(BETAS))
def test_identities_and_bounds(pair, beta):
  teacher, student = pair
  other = round(1 - beta, 1)
  got = value("jsd", teacher, student, beta)
  swapped = value("jsd", student, teacher, other)
  np.testing.assert_allclose(got, swapped, rtol=1e-5, atol=1e-7)
  entropy = -beta * np.log(beta) - other * np.log(other)
  assert np.all(np.asarray(got) <= entropy * (1 + 1e-5))
  # Remark 1 of the skew KLs' paper.
  forward = value("skew_forward_kl", teacher, student, alpha=beta)
  reverse = value("skew_reverse_kl", teacher, student, alpha=other)
  np.testing.assert_allclose(
    got, beta * forward + other * reverse, rtol=1e-5, atol=1e-7
  )
  assert np.all(np.asarray(forward) <= -np.log(beta) * (1 + 1e-5))


def test_disjoint_distributions_reach_the_bounds():
  teacher, student = jnp.array([[0.0, -1e9], [-1e9, 0.0]])
  for beta in BETAS:
    entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
    got = value("jsd", teacher, student, beta)
    np.testing.assert_allclose(got, entropy, rtol=1e-6)
  np.testing.assert_allclose(
    value("skew_forward_kl", teacher, student), np.log(10), rtol=1e-6
  )
  assert value("total_variation", teacher, student) == 1.0


def test_scaled_limits_and_small_gap():
  teacher, student = random_pair(2)
  low, high = (value("jsd", teacher, student, b) for b in (1e-3, 1 - 1e-3))
  forward, reverse = (
    value(name, teacher, student) for name in ("forward_kl", "reverse_kl")
  )
  np.testing.assert_allclose(low / 1e-3, forward, rtol=1e-2)
  np.testing.assert_allclose(high / 1e-3, reverse, rtol=1e-2)
  near = teacher + np.float32(0.01) * student
  kl = value("forward_kl", teacher, near)
  for beta in BETAS:
    ratio = value("jsd", teacher, near, beta) / kl
    np.testing.assert_allclose(ratio, beta * (1 - beta), rtol=2e-2)


@pytest.mark.parametrize("low", [None, -1e9])
def test_normalized_jsd_joins_both_kls(low):
  teacher, student = random_pair(3)
  if low:
    teacher[:, 0] = student[:, 1] = low
  for end, name in ((0, "forward_kl"), (1, "reverse_kl")):
    at_end = value("normalized_jsd", teacher, student, end)
    expected = value(name, teacher, student)
    np.testing.assert_allclose(at_end, expected, rtol=1e-6)
    # A KL that one -1e9 makes huge is reached only at the end itself.
    for step in (1e-8, 1e-5, 1e-4) if low is None else ():
      near = value("normalized_jsd", teacher, student, abs(end - step))
      np.testing.assert_allclose(near, at_end, rtol=10 * step + 1e-6)
  for beta in (1e-4, 1e-3, 1 - 1e-3, 1 - 1e-4):
    got = value("normalized_jsd", teacher, student, beta)
    expected = divergence_oracle.divergence(
      "normalized_jsd", teacher, student, beta
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["generalized_jsd", "normalized_jsd"])
def test_traced_beta_equals_static(name):
  teacher, student = random_pair(4)
  teacher[:, 0] = student[:, 1] = -1e9

  def value_and_gradient(beta):
    loss = lambda s: jnp.sum(_from_logits(name, teacher, s, beta))
    return jax.value_and_grad(loss)(jnp.asarray(student))

  traced = jax.jit(value_and_gradient)
  static = jax.jit(value_and_gradient, static_argnums=0)
  for beta in (0.0, 1e-6, 0.3, 1.0):
    for got, expected in zip(traced(beta), static(beta), strict=True):
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_traced_skew_equals_static():
  p, q = jax.nn.log_softmax(random_pair(4))
  for name, plain in (
    ("skew_forward_kl", "forward_kl"),
    ("skew_reverse_kl", "reverse_kl"),
  ):
    function = lambda alpha, n=name: divergences.get(n, alpha=alpha)(p, q)
    traced = jax.jit(function)
    np.testing.assert_allclose(traced(0.3), function(0.3), rtol=1e-5)
    unskewed = divergences.get(plain)(p, q)
    np.testing.assert_allclose(traced(0.0), unskewed, rtol=1e-5)


def test_generalized_jsd_computes_one_branch_and_maps_over_beta():
  p, q = jax.nn.log_softmax(random_pair(5))
  function = lambda beta: divergences.generalized_jsd(p, q, beta=beta)
  jaxpr = jax.make_jaxpr(function)(0.5)
  primitives = [equation.primitive.name for equation in jaxpr.eqns]
  # All of the work lies in the branches.
  assert primitives.count("cond") == 1
  assert "exp" not in primitives and "reduce_sum" not in primitives
  betas = jnp.array([0.0, 0.4, 1.0])
  expected = jnp.stack([function(float(b)) for b in betas])
  np.testing.assert_allclose(jax.vmap(function)(betas), expected, rtol=1e-5)


def test_no_gradient_flows_into_beta():
  p, q = jax.nn.log_softmax(random_pair(5))
  for name in ("jsd", "normalized_jsd", "generalized_jsd"):
    loss = lambda beta, n=name: jnp.sum(divergences.get(n, beta=beta)(p, q))
    assert jax.grad(loss)(0.4) == 0.0


@pytest.mark.parametrize("name", divergences.names())
def test_finite_at_extreme_logits(name):
  for low in (-200.0, -1e9, -1e30, -np.inf):
    # Low in the teacher, in the student, in both.
    teacher = jnp.array([0.0, 1.0, low, low, 2.0])
    student = jnp.array([0.0, low, 1.0, low, 2.0])
    for beta in (0.0, 0.5, 1.0) if name.endswith("ized_jsd") else (0.5,):
      assert np.isfinite(value(name, teacher, student, beta))
      for gradient in gradients(name, teacher, student, beta):
        assert np.all(np.isfinite(gradient))
        assert gradient[3] == 0.0


def test_nan_is_not_hidden():
  # A step that sees one must be skipped and counted.
  teacher, student = jnp.array([0.0, 1.0]), jnp.array([0.0, jnp.nan])
  for got in every_value(teacher, student).values():
    assert np.isnan(got)


def test_bfloat16_near_equality_over_t5s_vocabulary():
  rng = np.random.default_rng(5)
  teacher = rng.normal(size=(2, T5_VOCAB)) * 2
  student = teacher + 0.02 * rng.normal(size=teacher.shape)
  teacher, student = (jnp.asarray(x, jnp.bfloat16) for x in (teacher, student))
  in_float64 = [np.asarray(x, np.float64) for x in (teacher, student)]
  for name, got in every_value(teacher, student).items():
    assert np.all(np.asarray(got) >= 0)
    expected = divergence_oracle.divergence(name, *in_float64)
    np.testing.assert_allclose(got, expected, rtol=1e-3, err_msg=name)
  # Without the cast the same inputs are off by more than a factor of 2.
  p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
  naive = np.asarray(jnp.sum(jnp.exp(p) * (p - q), axis=-1), np.float64)
  ratio = naive / divergence_oracle.divergence("forward_kl", *in_float64)
  assert not np.any((ratio > 0.5) & (ratio < 2))


def test_bfloat16_log_probs_are_computed_in_float32():
  p, q = jax.nn.log_softmax(random_pair(6)).astype(jnp.bfloat16)
  for name in ("forward_kl", "total_variation"):
    got = divergences.get(name)(p, q)
    assert got.dtype == jnp.float32
    wide = divergences.get(name)(p.astype(jnp.float32), q.astype(jnp.float32))
    np.testing.assert_array_equal(got, wide)


def test_one_hot_teacher_gives_the_negative_log_likelihood():
  student = jnp.array([0.3, -1.0, 2.0])
  teacher = jnp.array([-jnp.inf, 0.0, -jnp.inf])
  got = value("forward_kl", teacher, student)
  np.testing.assert_allclose(got, -jax.nn.log_softmax(student)[1], rtol=1e-6)
  _, gradient = gradients("forward_kl", teacher, student)
  expected = jax.nn.softmax(student) - jnp.array([0.0, 1.0, 0.0])
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_entropy():
  logits, _ = random_pair(7)
  log_p = loss_batches.log_softmax64(logits)
  got = divergences.entropy(jax.nn.log_softmax(logits))
  np.testing.assert_allclose(got, -(np.exp(log_p) * log_p).sum(-1), rtol=1e-6)
  one_hot = jnp.array([0.0, -jnp.inf])
  assert divergences.entropy(one_hot) == 0.0
  assert np.all(np.isfinite(jax.grad(divergences.entropy)(one_hot)))


@pytest.mark.parametrize(
  ("name", "hyper", "message"),
  [
    (
      "jsd",
      {"beta": 0},
      "0 for all inputs; set the divergence to 'forward_kl'",
    ),
    ("jsd", {"beta": 1.0}, "set the divergence to 'reverse_kl'"),
    ("jsd", {"beta": 1.5}, r"beta in \[0, 1\], got 1.5; set BETA"),
    ("normalized_jsd", {"beta": -0.1}, r"beta in \[0, 1\], got -0.1"),
    ("generalized_jsd", {"beta": float("nan")}, r"beta in \[0, 1\], got nan"),
    ("jsd", {}, "expected a beta for the divergence 'jsd', got none; set BETA"),
    ("skew_forward_kl", {"alpha": 1.0}, r"alpha in \[0, 1\), got 1.0"),
    ("skew_reverse_kl", {"alpha": 2}, r"alpha in \[0, 1\], got 2; set ALPHA"),
    ("forward_kll", {}, "such as forward_kl.*got 'forward_kll'; set DIVERG"),
    ("zzz", {}, "such as forward_kl, generalized_jsd, jsd, .*got 'zzz'"),
    ("forward_kl", {"beta": 0.5}, "expected no beta for .* 'forward_kl'"),
  ],
)
def test_wrong_settings(name, hyper, message):
  with pytest.raises(ValueError, match=message):
    divergences.get(name, **hyper)


def test_known_arrays_are_checked_as_numbers_are():
  with pytest.raises(ValueError, match=r"got 1\.5"):
    divergences.get("jsd", beta=jnp.float32(1.5))
  with pytest.raises(ValueError, match="forward_kl"):
    divergences.get("jsd", beta=np.float32(0.0))


def test_a_registered_divergence_is_found_with_its_parameters(monkeypatch):
  monkeypatch.setattr(kl, "_REGISTRY", dict(kl._REGISTRY))

  @divergences.register
  def renyi(p, q, *, order):
    return jax.nn.logsumexp(order * p + (1 - order) * q, axis=-1) / (order - 1)

  assert "renyi" in divergences.names()
  assert divergences.parameters("renyi") == ("order",)
  p, q = np.log([[0.5, 0.5], [0.75, 0.25]]).astype(np.float32)
  expected = np.log(0.5**2 / 0.75 + 0.5**2 / 0.25)
  got = divergences.get("renyi", order=2.0)(p, q)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  with pytest.raises(ValueError, match="set ORDER"):
    divergences.get("renyi")
