"""Losses over sequences: temperature, mask, normalisation, sum and weight.

Every loss returns `(loss_sum, weight_sum, aux)`. The caller adds sums and
weights over microbatches and devices and divides once, so that the gradient
depends on none of them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import divergences, types


def token_weights(
  weights: jax.Array,
  length_normalization: str,
  segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Weights that turn per-token losses into the loss's sum.

  >>> w, n = token_weights(jnp.array([[1., 1.], [1., 0.]]), "sequence")
  >>> w.tolist(), float(n)
  ([[0.5, 0.5], [1.0, 0.0]], 2.0)

  Args:
    weights: `[B, T]`, 0 at padding.
    length_normalization: "sequence": each sequence's tokens share a weight of
      1, the paper's 1/L_y (equation 2). "token": as given.
    segment_ids: `[B, T]` int, the sequence of each token of a packed row, or
      None for one sequence a row.

  Returns:
    float32 `[B, T]`, and their total weight: sequences with at least one
    weighted token, or the sum of the weights.

  Raises:
    ValueError: another `length_normalization`.
  """
  weights = weights.astype(jnp.float32)
  if length_normalization == "token":
    return weights, jnp.sum(weights)
  if length_normalization != "sequence":
    raise ValueError(
      "expected length normalisation 'sequence' or 'token', got"
      f" {length_normalization!r}; set LENGTH_NORMALIZATION"
    )
  if segment_ids is None:
    totals = jnp.broadcast_to(
      jnp.sum(weights, axis=1, keepdims=True), weights.shape
    )
  else:
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    totals = jnp.einsum("bts,bs->bt", same.astype(jnp.float32), weights)
  shares = jnp.where(totals > 0, weights / jnp.where(totals > 0, totals, 1), 0)
  return shares, jnp.sum(shares)


def distillation_loss(
  teacher_logits: jax.Array,
  student_logits: jax.Array,
  weights: jax.Array,
  *,
  divergence: str | types.Divergence,
  teacher_temperature: float | jax.Array = 1.0,
  student_temperature: float | jax.Array = 1.0,
  length_normalization: str = "sequence",
  segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, types.Metrics]:
  """Divergence of the student from the teacher, position by position.

  Args:
    teacher_logits: `[B, T, V]`, any float type.
    student_logits: `[B, T, V]`, any float type.
    weights: `[B, T]`, 0 at padding: neither value nor gradient there, whatever
      the logits hold.
    divergence: a name in `divergences`, or a function.
    teacher_temperature: divides the teacher's logits.
    student_temperature: divides the student's logits.
    length_normalization: see `token_weights`.
    segment_ids: see `token_weights`.

  Returns:
    The weighted sum in nats, its weight, and metrics as (sum, weight) over
    tokens at the loss's temperatures: `forward_kl`, `reverse_kl`,
    `teacher_entropy`, `student_entropy` (nats per token), `top1_agreement`.

  Raises:
    ValueError: vocabularies that differ, or a temperature not above 0.
  """
  if teacher_logits.shape != student_logits.shape:
    raise ValueError(
      "expected teacher and student logits of one shape, got"
      f" {teacher_logits.shape} and {student_logits.shape}; set the same"
      " vocab_size for TEACHER and STUDENT"
    )
  if isinstance(divergence, str):
    divergence = divergences.get(divergence)
  present = weights > 0
  p = _log_probs(teacher_logits, teacher_temperature, present, "teacher")
  q = _log_probs(student_logits, student_temperature, present, "student")
  shares, weight_sum = token_weights(weights, length_normalization, segment_ids)
  loss_sum = jnp.sum(shares * divergence(p, q))
  p, q = jax.lax.stop_gradient((p, q))
  per_token = {
    "forward_kl": divergences.forward_kl(p, q),
    "reverse_kl": divergences.reverse_kl(p, q),
    "teacher_entropy": divergences.entropy(p),
    "student_entropy": divergences.entropy(q),
    "top1_agreement": jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1),
  }
  return loss_sum, weight_sum, _token_metrics(per_token, weights)


def cross_entropy_loss(
  logits: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  length_normalization: str = "token",
  segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, types.Metrics]:
  """T5X's cross-entropy with label smoothing and z-loss.

  Args:
    logits: `[B, T, V]`, any float type.
    targets: `[B, T]` int.
    weights: `[B, T]`, 0 at padding.
    label_smoothing: ε: the target keeps 1-ε, the other V-1 tokens share ε. The
      entropy of that law is taken off: a perfect prediction has loss 0.
    z_loss: factor of log(Z)², added per token.
    length_normalization: see `token_weights`.
    segment_ids: see `token_weights`.

  Returns:
    The weighted sum in nats, its weight, and metrics as (sum, weight) over
    tokens: `cross_entropy` (z-loss not included), `z_loss`, `accuracy`.
  """
  present = weights > 0
  logits = jnp.where(present[:, :, None], logits.astype(jnp.float32), 0.0)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  log_probs = logits - log_z[:, :, None]
  picked = jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)[:, :, 0]
  entropy = -picked
  if label_smoothing:
    others = label_smoothing / (logits.shape[-1] - 1)
    keep = 1.0 - label_smoothing
    constant = keep * np.log(keep) + label_smoothing * np.log(others)
    rest = jnp.sum(log_probs, axis=-1) - picked
    entropy = -(keep * picked + others * rest) + constant
  penalty = z_loss * jnp.square(log_z)
  shares, weight_sum = token_weights(weights, length_normalization, segment_ids)
  loss_sum = jnp.sum(shares * (entropy + penalty))
  per_token = {
    "cross_entropy": entropy,
    "z_loss": penalty,
    "accuracy": jnp.argmax(logits, axis=-1) == targets,
  }
  return loss_sum, weight_sum, _token_metrics(per_token, weights)


def _log_probs(logits, temperature, present, whose):
  if isinstance(temperature, (int, float)) and temperature <= 0:
    raise ValueError(
      f"expected a {whose}_temperature above 0, got {temperature};"
      f" set {whose.upper()}_TEMPERATURE"
    )
  # Padding may hold anything, NaN too: it is replaced before, not after.
  logits = jnp.where(present[:, :, None], logits.astype(jnp.float32), 0.0)
  return jax.nn.log_softmax(logits / temperature, axis=-1)


def _token_metrics(per_token, weights) -> types.Metrics:
  weights = weights.astype(jnp.float32)
  total = jnp.sum(weights)
  per_token = jax.lax.stop_gradient(per_token)
  return {
    name: (jnp.sum(value * weights), total)
    for name, value in per_token.items()
  }
