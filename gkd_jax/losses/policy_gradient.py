"""Rewards of sampled outputs: credit, baselines, and the policy gradient.

The gradient of E[r(y)] over the student's outputs y is E[A ∇ log q(y)], where
the advantage A is the reward minus a baseline that does not depend on y
(REINFORCE, Williams 1992; leave-one-out: Kool et al. 2019). Log-probs are those
of the distribution that y was drawn from. Rewards and advantages are constants.

Equation 5 of the GKD paper (arXiv 2306.13649) mixes the reward with the
divergence: maximise (1-α) r(y) - α D(p ‖ q)(y). `rl_gkd_loss` is its negative.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax import checks, divergences, types
from gkd_jax.losses import vocabulary

BASELINES = ("leave_one_out", "running_mean", "none")
CREDITS = ("sequence", "token")


class RunningMean(NamedTuple):
  """Exponential moving average of the batches' mean rewards.

  Attributes:
    total: weighted sum of the batches' means.
    weight: sum of the weights; 0 before the first batch.
  """

  total: float = 0.0
  weight: float = 0.0

  def mean(self) -> float:
    """Returns the mean; 0 before the first batch."""
    return self.total / self.weight if self.weight else 0.0

  def updated(self, mean: float, decay: float) -> "RunningMean":
    """Returns the average with one more batch, of this mean.

    >>> RunningMean().updated(4.0, 0.5).updated(1.0, 0.5).mean()
    2.0
    """
    return RunningMean(
      decay * self.total + (1 - decay) * mean,
      decay * self.weight + (1 - decay),
    )


def reward_to_go(
  token_rewards: jax.Array, discount: float | jax.Array = 1.0
) -> jax.Array:
  """Computes the reward to go, G_t = Σ_{s ≥ t} γ^(s-t) r_s.

  >>> reward_to_go(jnp.array([[1.0, 0.0, 4.0]]), discount=0.5).tolist()
  [[2.0, 2.0, 4.0]]

  Args:
    token_rewards: `[B, T]`.
    discount: γ.

  Returns:
    `[B, T]` float32.
  """
  rewards = jnp.asarray(token_rewards, jnp.float32).T  # [T, B]

  def step(later, reward):
    here = reward + discount * later
    return here, here

  zeros = jnp.zeros(rewards.shape[1:], jnp.float32)
  return jax.lax.scan(step, zeros, rewards, reverse=True)[1].T


def whiten(rewards: jax.Array) -> jax.Array:
  """Normalises rewards to mean 0 and standard deviation 1; 0 if all are equal.

  >>> whiten(jnp.array([[1.0, 3.0], [1.0, 3.0]])).tolist()
  [[-1.0, 1.0], [-1.0, 1.0]]

  Args:
    rewards: any shape, of the whole batch; NaN where there is none, which stays
      NaN and does not count.
  """
  centred = rewards - jnp.nanmean(rewards)
  deviation = jnp.sqrt(jnp.nanmean(jnp.square(centred)))
  # Equal rewards differ from their mean by rounding, which must not be scaled.
  equal = deviation <= 1e-6 * jnp.nanmax(jnp.abs(rewards))
  scaled = centred / jnp.where(equal, 1.0, deviation)
  return jnp.where(equal & ~jnp.isnan(rewards), 0.0, scaled)


def advantages(
  rewards: jax.Array,
  weights: jax.Array,
  *,
  baseline: str,
  credit: str = "sequence",
  discount: float = 1.0,
  running_mean: float = 0.0,
) -> jax.Array:
  """Computes each token's credit for the reward, minus the baseline.

  With credit "sequence" every token of an output gets r - b. With "token" it
  gets γ^(tokens after it) r - b_t, so that the last token gets the most. Under
  leave-one-out, b is the mean reward of the prompt's other outputs, and b_t the
  mean of their credits at the same t (their reward, once they have ended). With
  γ = 1 both credits are the same.

  An output without a reward has no credit and counts in no baseline. Without
  another output that has one, leave-one-out gives no credit.

  >>> r = jnp.array([[1.0, 0.0, 2.0]])
  >>> one = jnp.ones((1, 3, 1))
  >>> advantages(r, one, baseline="leave_one_out").ravel().tolist()
  [0.0, -1.5, 1.5]

  Args:
    rewards: `[B, N]`, one for each output; NaN where there is none.
    weights: `[B, N, T]`, 1 at the tokens of an output.
    baseline: "leave_one_out" (N of at least 2), "running_mean" or "none".
    credit: "sequence" or "token".
    discount: γ in (0, 1], of "token".
    running_mean: b of "running_mean": of batches before this one.

  Returns:
    `[B, N, T]` float32, 0 where the weight is.

  Raises:
    ValueError: see `check_settings`.
  """
  check_settings(baseline, credit, discount, rewards.shape[1])
  weights = (weights > 0).astype(jnp.float32)
  rewards = rewards.astype(jnp.float32)[:, :, None]
  judged = jnp.isfinite(rewards)
  rewards = jnp.where(judged, rewards, 0.0)
  returns = jnp.broadcast_to(rewards, weights.shape)
  if credit == "token":
    # Tokens after each one; 0 from the last one on, wherever it stands.
    after = jnp.flip(jnp.cumsum(jnp.flip(weights, 2), axis=2), 2) - weights
    returns = rewards * discount**after
  if baseline == "leave_one_out":
    others = jnp.sum(returns, axis=1, keepdims=True) - returns
    number = jnp.sum(judged, axis=1, keepdims=True) - 1
    judged &= number > 0
    returns = returns - others / jnp.maximum(number, 1)
  elif baseline == "running_mean":
    returns = returns - running_mean
  return jnp.where(judged, returns * weights, 0.0)


def check_settings(
  baseline: str, credit: str, discount: float, num_samples: int
):
  """Raises ValueError for settings of `advantages` that do not fit together.

  Args:
    baseline: see `advantages`.
    credit: see `advantages`.
    discount: see `advantages`.
    num_samples: N, the number of outputs of each prompt.
  """
  checks.one_of(baseline, "BASELINE", BASELINES)
  checks.one_of(credit, "CREDIT", CREDITS)
  checks.number(discount, "DISCOUNT", above=0, most=1, what="a discount")
  if discount != 1 and credit != "token":
    raise ValueError(
      f"expected no discount of per-sequence credit, got {discount};"
      " set CREDIT = 'token' or DISCOUNT = 1.0"
    )
  if num_samples < 1 or (baseline == "leave_one_out" and num_samples < 2):
    raise ValueError(
      f"expected {'2' if baseline == 'leave_one_out' else '1'} or more samples"
      f" per prompt for the baseline {baseline!r}, got {num_samples};"
      " set SAMPLES_PER_PROMPT or BASELINE"
    )


def policy_gradient_loss(
  log_probs: jax.Array,
  advantages: jax.Array,
  weights: jax.Array,
  *,
  length_normalization: str = "sequence",
) -> tuple[jax.Array, jax.Array, types.Metrics]:
  """Computes -Σ A_t log q(y_t), whose gradient is REINFORCE's.

  Tokens of an output are summed, not averaged, since the gradient of the
  expected reward is that of the whole output's log-prob. `weight_sum` is that
  of `distillation.distillation_loss` with the same `length_normalization`, so
  that the sums of the two losses can be mixed.

  >>> loss, weight, _ = policy_gradient_loss(
  ...     jnp.array([[-1.0, -2.0]]), jnp.array([[3.0, 3.0]]), jnp.ones((1, 2)))
  >>> float(loss), float(weight)
  (9.0, 1.0)

  Args:
    log_probs: `[B, T]` nats of the tokens, under the distribution that they were
      drawn from.
    advantages: `[B, T]`; no gradient flows into them.
    weights: `[B, T]`, 0 outside of outputs.
    length_normalization: "sequence": the weight is the number of outputs.
      "token": the number of their tokens.

  Returns:
    `loss_sum` and `weight_sum`, `[]` float32, and metrics: `policy_gradient`,
    the loss, and `sampled_log_prob`, nats per token.

  Raises:
    ValueError: an unknown `length_normalization`.
  """
  if length_normalization not in ("sequence", "token"):
    raise ValueError(
      "expected length normalisation 'sequence' or 'token', got"
      f" {length_normalization!r}; set LENGTH_NORMALIZATION"
    )
  weights = weights.astype(jnp.float32)
  log_probs = jnp.where(weights > 0, log_probs, 0.0)
  gains = weights * jax.lax.stop_gradient(advantages) * log_probs
  tokens = jnp.sum(weights)
  number = tokens
  if length_normalization == "sequence":
    number = jnp.sum(jnp.any(weights > 0, axis=1).astype(jnp.float32))
  loss = -jnp.sum(gains)
  log_prob = jnp.sum(weights * log_probs)
  aux = {
    "policy_gradient": (loss, number),
    "sampled_log_prob": (log_prob, tokens),
  }
  return loss, number, jax.lax.stop_gradient(aux)


def rl_gkd_loss(
  policy_gradient: jax.Array, divergence: jax.Array, alpha: float
) -> jax.Array:
  """Computes equation 5 as a loss: (1-α) policy gradient + α divergence.

  A term of weight 0 is left out, even if it is NaN.

  Args:
    policy_gradient: `[]`, from `policy_gradient_loss`.
    divergence: `[]`, from `distillation.distillation_loss`, with the same
      `weight_sum`.
    alpha: in [0, 1].
  """
  if alpha == 0:
    return policy_gradient
  if alpha == 1:
    return divergence
  return (1 - alpha) * policy_gradient + alpha * divergence


IMPORTANCE = ("token", "exact")


def mixture(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array, share: float
) -> jax.Array:
  """Computes log(share p + (1-share) q), for a share below 1.

  Args:
    teacher_log_probs: log p, any shape.
    student_log_probs: log q, of the same shape.
    share: the teacher's, in [0, 1).
  """
  student = student_log_probs + jnp.log1p(-share)
  if share == 0:
    return student
  return jnp.logaddexp(teacher_log_probs + jnp.log(share), student)


def minillm_loss(
  teacher_log_probs: jax.Array,
  student_log_probs: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  teacher_mix: float = 0.2,
  importance: str = "token",
  normalize_returns: bool = True,
) -> tuple[jax.Array, jax.Array, types.Metrics]:
  """Computes a loss whose gradient is MiniLLM's estimate (arXiv 2306.08543).

  The loss's value has no meaning. Importance weights, with m the mixture that
  outputs were drawn from: "token": q(y_t) / m(y_t) on both terms of position t,
  the paper's approximation, of low variance. "exact": the unbiased estimate,
  which weights r_s by the product of the ratios of y_1 to y_s; its variance
  grows exponentially with the length.

  Args:
    teacher_log_probs: `[B, T, V]` log p; -inf only where log q is.
    student_log_probs: `[B, T, V]` log q, which the gradient is of.
    targets: `[B, T]` int32, drawn from the mixture.
    weights: `[B, T]`, 1 at the tokens of an output and 0 elsewhere.
    teacher_mix: the teacher's share in the mixture.
    importance: "token" or "exact".
    normalize_returns: divide R_{t+1} by the number of its terms. (The paper
      divides by one less, which is 0 for the last token but one.)

  Returns:
    `loss_sum`, over outputs and their tokens; `weight_sum`, the number of
    outputs; and metrics: `sequence_reverse_kl`, the mean of log q(y) - log p(y)
    over outputs of the mixture, unweighted, `importance_weight` per token, and
    `policy_gradient`, the second term.

  Raises:
    ValueError: an unknown `importance`.
  """
  check_importance(importance)
  weights = weights.astype(jnp.float32)
  log_p = vocabulary.target_log_probs(teacher_log_probs, targets, weights)
  log_q = vocabulary.target_log_probs(student_log_probs, targets, weights)
  p, q = jax.lax.stop_gradient((log_p, log_q))
  ratios = q - mixture(p, q, teacher_mix)  # log q - log m, at most -log(1-mix)
  ratios = jnp.where(weights > 0, ratios, 0.0)
  token_rewards = p - q
  if importance == "exact":
    ratios = jnp.cumsum(ratios, axis=1)
    token_rewards = jnp.exp(ratios) * token_rewards
  token_rewards = weights * token_rewards
  later = reward_to_go(token_rewards) - token_rewards
  if normalize_returns:
    terms = reward_to_go(weights) - weights
    later = later / jnp.maximum(terms, 1.0)
  shares = weights * jnp.exp(ratios)
  advantages = later if importance == "exact" else shares * later
  long, number, _ = policy_gradient_loss(log_q, advantages, weights)
  single = divergences.reverse_kl(teacher_log_probs, student_log_probs)
  # Log-probs at padding may hold anything.
  single = jnp.sum(shares * jnp.where(weights > 0, single, 0.0))
  aux = {
    "sequence_reverse_kl": (jnp.sum(q - p), number),
    "importance_weight": (jnp.sum(shares), jnp.sum(weights)),
    "policy_gradient": (long, number),
  }
  return single + long, number, jax.lax.stop_gradient(aux)


def check_importance(importance: str) -> None:
  """Raises a ValueError for another kind of importance weights."""
  checks.one_of(importance, "IMPORTANCE", IMPORTANCE)
