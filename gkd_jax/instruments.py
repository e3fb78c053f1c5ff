"""What is measured of a student and its teacher, token by token.

All functions are pure and return sums, which add up over batches; a runner
divides once. p is the teacher's and q the student's next-token law, both
normalised over the real tokens.

Sources: expected calibration error, Guo et al. (arXiv 1706.04599), equation 3;
acceptance rate of speculative decoding, Leviathan et al. (arXiv 2211.17192),
corollary 3.6.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import divergences, losses

NUM_BINS = 15  # of Guo et al.


def log_law(
  logits: jax.Array,
  *,
  temperature: float = 1.0,
  num_real_tokens: int | None = None,
) -> jax.Array:
  """Log-probs of the next-token law, float32.

  >>> logits = jnp.log(jnp.array([1.0, 3.0, 5.0]))
  >>> jnp.exp(log_law(logits, num_real_tokens=2)).round(2).tolist()
  [0.25, 0.75, 0.0]

  Args:
    logits: `[..., V]` in any float type.
    temperature: divides the logits, above 0.
    num_real_tokens: ids from here on have no mass; None for V.

  Returns:
    `[..., V]` nats, -1e9 or below where the law has no mass.
  """
  logits = logits.astype(jnp.float32) / temperature
  return jax.nn.log_softmax(losses.without_padding(logits, num_real_tokens))


def acceptance_rate(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array
) -> jax.Array:
  """Σ min(p, q): how likely the teacher accepts the student's next token.

  In speculative decoding with the student as draft model, the expectation over
  the student's token; 1 minus the total variation.

  >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
  >>> round(float(acceptance_rate(p, q)), 4)
  0.75

  Args:
    teacher_log_probs: `[..., V]` log p.
    student_log_probs: `[..., V]` log q.

  Returns:
    `[...]` in [0, 1], float32.
  """
  return jnp.sum(
    jnp.exp(jnp.minimum(teacher_log_probs, student_log_probs)), axis=-1
  )


def compare_laws(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array
) -> dict[str, jax.Array]:
  """The divergences and rates that are reported, each `[...]`.

  Args:
    teacher_log_probs: `[..., V]` log p.
    student_log_probs: `[..., V]` log q.

  Returns:
    `forward_kl`, `reverse_kl`, `teacher_entropy`, `student_entropy` in nats, and
    `acceptance`, see `acceptance_rate`.
  """
  p, q = teacher_log_probs, student_log_probs
  return {
    "forward_kl": divergences.forward_kl(p, q),
    "reverse_kl": divergences.reverse_kl(p, q),
    "teacher_entropy": divergences.entropy(p),
    "student_entropy": divergences.entropy(q),
    "acceptance": acceptance_rate(p, q),
  }


def sum_by_position(values: jax.Array, weights: jax.Array) -> jax.Array:
  """Sums over rows of what stands at the output's first token, second, ...

  A position is counted within a row's output: its first token of weight above 0
  is at 0, wherever it stands in the row, so that rows may begin with a prompt.

  >>> weights = jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
  >>> values = jnp.array([[9.0, 1.0, 2.0], [5.0, 9.0, 9.0]])
  >>> sum_by_position(values, weights).tolist()
  [6.0, 2.0, 0.0]

  Args:
    values: `[B, T]`.
    weights: `[B, T]`, 0 at what is no output; there a value may be anything.

  Returns:
    `[T]` float32.
  """
  counted = weights > 0
  position = jnp.cumsum(counted, axis=1) - 1
  # Set aside before the sum: 0 times NaN would be NaN.
  values = jnp.where(counted, values.astype(jnp.float32), 0.0)
  position = jnp.where(counted, position, 0)
  return jax.ops.segment_sum(
    values.ravel(), position.ravel(), num_segments=values.shape[1]
  )


def calibration_sums(
  log_probs: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  num_bins: int = NUM_BINS,
) -> dict[str, jax.Array]:
  """Confidence and accuracy of the likeliest token, in bins of confidence.

  Bin m of M holds the tokens whose likeliest next token has a probability in
  (m/M, (m+1)/M].

  Args:
    log_probs: `[B, T, V]` the student's, teacher forced.
    targets: `[B, T]` int.
    weights: `[B, T]`, 0 at what is no output.
    num_bins: M, of equal width.

  Returns:
    `confidence`, `correct` and `count`: sums in each bin, `[M]` float32. See
    `expected_calibration_error`.

  Raises:
    ValueError: shapes that differ.
  """
  shape = log_probs.shape[:-1]
  if targets.shape != shape or weights.shape != shape:
    raise ValueError(
      f"expected targets and weights of shape {shape}, got"
      f" {targets.shape} and {weights.shape}; one entry per position"
    )
  counted = (weights > 0).ravel()
  best = jnp.argmax(log_probs, axis=-1)
  confidence = jnp.exp(jnp.max(log_probs, axis=-1)).ravel()
  confidence = jnp.where(counted, confidence, 1.0)
  bins = jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1
  bins = jnp.clip(bins, 0, num_bins - 1)

  def in_bins(values):
    values = jnp.where(counted, values.astype(jnp.float32), 0.0)
    return jax.ops.segment_sum(values, bins, num_segments=num_bins)

  return {
    "confidence": in_bins(confidence),
    "correct": in_bins((best == targets).ravel()),
    "count": in_bins(counted),
  }


def expected_calibration_error(sums: dict[str, np.ndarray]) -> float:
  """Mean over tokens of |accuracy - confidence| of the token's bin, in percent.

  >>> sums = {"confidence": np.array([0.5, 2.7]), "correct": np.array([1, 2]),
  ...         "count": np.array([1, 3])}
  >>> round(expected_calibration_error(sums), 1)
  30.0

  Args:
    sums: from `calibration_sums`, over all batches.

  Raises:
    ValueError: there is no token.
  """
  total = float(np.sum(sums["count"]))
  if not total:
    raise ValueError(
      "expected target tokens to measure the calibration on, got none; set"
      " EVAL_SPLIT or MIXTURE_OR_TASK_NAME"
    )
  gaps = np.abs(np.subtract(sums["correct"], sums["confidence"]))
  return float(100.0 * np.sum(gaps) / total)
