"""Credit, baselines and the policy gradient, against loops and enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import losses
from gkd_jax.losses import policy_gradient


def of_lengths(lengths, width):
  """Weights `[B, N, T]` of outputs with these lengths `[B, N]`."""
  return (np.arange(width) < np.asarray(lengths)[..., None]).astype(np.float32)


def advantage(r, lengths, b, i, t, *, baseline, credit, discount):
  """One entry, from the definition, in Python floats."""
  if t >= lengths[b][i]:
    return 0.0

  def part(j):  # what output j has of its reward at t; all of it once ended
    left = max(lengths[b][j] - 1 - t, 0) if credit == "token" else 0
    return r[b][j] * discount**left

  others = [part(j) for j in range(len(r[b])) if j != i]
  return part(i) - (
    sum(others) / len(others) if baseline == "leave_one_out" else 0.0
  )


@pytest.mark.parametrize("baseline", ["leave_one_out", "none"])
@pytest.mark.parametrize(
  ("credit", "discount"), [("sequence", 1.0), ("token", 1.0), ("token", 0.7)]
)
def test_advantages_equal_the_definition(baseline, credit, discount):
  rng = np.random.default_rng(0)
  r = rng.normal(size=(3, 4))
  lengths = rng.integers(1, 6, (3, 4))
  settings = {"baseline": baseline, "credit": credit, "discount": discount}
  got = losses.advantages(
    jnp.asarray(r), jnp.asarray(of_lengths(lengths, 6)), **settings
  )
  expected = np.array(
    [
      [
        [advantage(r, lengths, b, i, t, **settings) for t in range(6)]
        for i in range(4)
      ]
      for b in range(3)
    ]
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_outputs_without_a_reward_have_no_credit_and_are_in_no_baseline():
  nan = np.nan
  r = jnp.array([[1.0, nan, 3.0, 0.0], [nan, 5.0, nan, nan], [nan] * 4])
  of = lambda **settings: losses.advantages(r, jnp.ones((3, 4, 1)), **settings)
  got = of(baseline="leave_one_out")[:, :, 0]
  # 1 against 3 and 0, 3 against 1 and 0, 0 against 1 and 3; 5 against nothing.
  np.testing.assert_allclose(got, [[-0.5, 0, 2.5, -2], [0] * 4, [0] * 4])
  got = of(baseline="running_mean", running_mean=0.5)[:, :, 0]
  np.testing.assert_allclose(
    got, [[0.5, 0, 2.5, -0.5], [0, 4.5, 0, 0], [0] * 4]
  )
  # An output of one token and one of two, both with a discount.
  got = losses.advantages(
    jnp.array([[4.0, nan, 8.0]]),
    jnp.array([[[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]]),
    baseline="leave_one_out",
    credit="token",
    discount=0.5,
  )
  np.testing.assert_allclose(got, [[[4 - 4, 0], [0, 0], [4 - 4, 8 - 4]]])


def test_outputs_may_stand_anywhere_in_a_row():
  # A decoder-only row: the prompt, the output, padding.
  weights = jnp.array([[[0.0, 0.0, 1.0, 1.0, 0.0]]])
  got = losses.advantages(
    jnp.array([[8.0]]), weights, baseline="none", credit="token", discount=0.5
  )
  assert got.tolist() == [[[0, 0, 4, 8, 0]]]


def test_running_mean():
  got = losses.advantages(
    jnp.array([[3.0]]),
    jnp.ones((1, 1, 2)),
    baseline="running_mean",
    running_mean=1.5,
  )
  assert got.tolist() == [[[1.5, 1.5]]]
  mean = losses.RunningMean()
  assert mean.mean() == 0
  values, decay = [5.0, -1.0, 2.0], 0.9
  for value in values:
    mean = mean.updated(value, decay)
  shares = decay ** np.arange(3)[::-1]
  np.testing.assert_allclose(mean.mean(), np.average(values, weights=shares))


def test_whitening():
  x = np.random.default_rng(1).normal(3, 2, (5, 4)).astype(np.float32)
  got = np.asarray(losses.whiten(jnp.asarray(x)), np.float64)
  np.testing.assert_allclose(got, (x - x.mean()) / x.std(), atol=1e-5)
  some = losses.whiten(jnp.array([[1.0, np.nan], [3.0, np.nan]]))
  np.testing.assert_array_equal(some, [[-1, np.nan], [1, np.nan]])
  # 0.1 is no float: the mean of equal ones is off by rounding.
  assert not np.any(losses.whiten(jnp.full((7, 3), 0.1)))


# ---- expectations, over all outputs of a tiny policy -------------------------
# Token 0 ends an output; there are at most two tokens of three.
OUTPUTS = [(0,), *itertools.product((1, 2), (0, 1, 2))]
THETA = np.array(
  [[0.3, -0.2, 0.5], [0.1, 0.4, -0.6], [-0.3, 0.2, 0.7]], np.float32
)  # logits of the first token; of the second after 1, after 2
REWARD = np.array([1.0, -0.5, 2.0, 0.3, 0.0, 1.5, -2.0])


def logs(theta, xp):
  return theta - xp.log(xp.sum(xp.exp(theta), axis=1, keepdims=True))


def probability(theta, y):
  log_q = logs(np.asarray(theta, np.float64), np)
  return np.exp(log_q[0, y[0]] + (log_q[y[0], y[1]] if len(y) > 1 else 0.0))


def token_log_probs(theta, y):
  log_q = logs(theta, jnp)
  return [log_q[0, y[0]], log_q[y[0], y[1]] if len(y) > 1 else jnp.zeros(())]


def expected_gradient(**settings):
  """Mean over all pairs of outputs of the gradient for that pair."""
  pairs = list(itertools.product(range(len(OUTPUTS)), repeat=2))
  lengths = [[len(OUTPUTS[i]) for i in pair] for pair in pairs]
  weights = jnp.asarray(of_lengths(lengths, 2))
  r = jnp.asarray([[REWARD[i] for i in pair] for pair in pairs])
  a = losses.advantages(r, weights, **settings)

  def losses_of_pairs(theta):
    table = jnp.stack([jnp.stack(token_log_probs(theta, y)) for y in OUTPUTS])
    log_probs = table[jnp.asarray(pairs)]  # [pairs, 2, T]
    loss = lambda *x: losses.policy_gradient_loss(*x)[0]
    return jax.vmap(loss)(log_probs, a, weights)

  gradients = np.asarray(jax.jacobian(losses_of_pairs)(jnp.asarray(THETA)))
  p = [np.prod([probability(THETA, OUTPUTS[i]) for i in x]) for x in pairs]
  return -np.tensordot(p, gradients.astype(np.float64), 1) / 2


def test_the_expected_gradient_is_that_of_the_expected_reward():
  def objective(theta):
    return sum(
      r * probability(theta, y) for r, y in zip(REWARD, OUTPUTS, strict=True)
    )

  exact = np.zeros((3, 3))
  for i, j in np.ndindex(3, 3):
    shift = np.zeros((3, 3))
    shift[i, j] = 1e-5
    exact[i, j] = (objective(THETA + shift) - objective(THETA - shift)) / 2e-5
  for baseline in ("leave_one_out", "none"):
    got = expected_gradient(baseline=baseline)
    np.testing.assert_allclose(got, exact, atol=2e-6)
  got = expected_gradient(baseline="running_mean", running_mean=0.7)
  np.testing.assert_allclose(got, exact, atol=2e-6)


def test_the_baseline_of_token_credit_has_no_part_in_the_expectation():
  settings = {"credit": "token", "discount": 0.6}
  a, b = (
    expected_gradient(baseline=name, **settings)
    for name in ("none", "leave_one_out")
  )
  np.testing.assert_allclose(a, b, atol=2e-6)
  assert np.abs(a - expected_gradient(baseline="none")).max() > 0.05


# ---- the losses ---------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_the_weight_is_that_of_the_divergence(normalization):
  weights = jnp.asarray(of_lengths([3, 0, 1], 4))
  log_probs = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4)))
  loss, weight, aux = losses.policy_gradient_loss(
    log_probs.at[1].set(jnp.nan),
    2 * jnp.ones((3, 4)),
    weights,
    length_normalization=normalization,
  )
  logits = jnp.zeros((3, 4, 2))
  _, expected, _ = losses.distillation_loss(
    logits,
    logits,
    weights,
    divergence="forward_kl",
    length_normalization=normalization,
  )
  assert weight == expected == (2 if normalization == "sequence" else 4)
  used = np.asarray(log_probs)[np.asarray(weights) > 0]
  np.testing.assert_allclose(loss, -2 * used.sum(), rtol=1e-5)
  np.testing.assert_allclose(aux["sampled_log_prob"], (used.sum(), 4))


def test_the_mix_leaves_out_what_has_no_share():
  nan = jnp.float32(np.nan)
  assert losses.rl_gkd_loss(jnp.float32(3.0), nan, 0.0) == 3
  assert losses.rl_gkd_loss(nan, jnp.float32(3.0), 1.0) == 3
  got = losses.rl_gkd_loss(jnp.float32(4.0), jnp.float32(8.0), 0.25)
  assert got == 0.75 * 4 + 0.25 * 8


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (("mean", "sequence", 1.0, 2), "'mean'; set BASELINE"),
    (("none", "word", 1.0, 2), "'word'; set CREDIT"),
    (("none", "token", 0.0, 2), "set DISCOUNT"),
    (("none", "sequence", 0.5, 2), "set CREDIT = 'token' or DISCOUNT"),
    (("leave_one_out", "sequence", 1.0, 1), "set SAMPLES_PER_PROMPT or BASE"),
    (("none", "sequence", 1.0, 0), "1 or more samples .* got 0"),
  ],
)
def test_wrong_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    policy_gradient.check_settings(*settings)


def test_wrong_length_normalization():
  with pytest.raises(ValueError, match="set LENGTH_NORMALIZATION"):
    losses.policy_gradient_loss(
      jnp.zeros((1, 1)),
      jnp.zeros((1, 1)),
      jnp.ones((1, 1)),
      length_normalization="mean",
    )
