"""Distillation from a teacher's stored top-k log-probs, the tail kept.

Of each next-token distribution the k likeliest tokens are stored, and the mass
of all others as one more bucket. Merging tokens into a bucket can only lower an
f-divergence (the data-processing inequality), so the loss is between 0 and the
exact one, grows with k, and is exact at k = V. Every divergence in
`divergences` is an f-divergence of (p, q). Without the bucket neither holds: a
distribution renormalised over its top k misses the student's mass outside of
it, and a truncated sum may be negative.
"""

import jax
import jax.numpy as jnp

from gkd_jax import divergences, types
from gkd_jax.losses import distillation, vocabulary

# Lower bound of stored log-probs: its exp is 0, and float16 can represent it.
LEAST_LOG_PROB = -3e4
# A logit without mass; finite, so that a bucket without mass has a gradient.
_NO_MASS = -1e9


def top_k_log_probs(
  teacher_logits: jax.Array,
  top_k: int,
  *,
  teacher_temperature: float | jax.Array = 1.0,
  num_real_tokens: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes the k likeliest tokens, their log-probs and the tail's.

  >>> ids, log_probs = top_k_log_probs(jnp.log(jnp.array([0.1, 0.6, 0.3])), 1)
  >>> ids.tolist(), [round(float(x), 4) for x in jnp.exp(log_probs)]
  ([1], [0.6, 0.4])

  Args:
    teacher_logits: `[..., V]` in any float type.
    top_k: k, from 1 to V (to R, if there is padding).
    teacher_temperature: divides the logits; the tail's log-prob holds at this
      temperature only.
    num_real_tokens: see `vocabulary.mask_vocab_padding`.

  Returns:
    Ids `[..., k]` int32 from the likeliest down, the lowest id first among equal
    ones, and log-probs `[..., k + 1]` float32 in nats, at least
    `LEAST_LOG_PROB`. The last one is the tail's.

  Raises:
    ValueError: a k out of range.
  """
  size = num_real_tokens or teacher_logits.shape[-1]
  if not 1 <= top_k <= size:
    raise ValueError(
      f"expected top_k within 1..{size}, the number of tokens, got {top_k};"
      " set TOP_K"
    )
  logits = vocabulary.scaled_logits(
    teacher_logits, teacher_temperature, num_real_tokens
  )
  _, ids = jax.lax.top_k(logits, top_k)
  log_probs = jax.nn.log_softmax(_bucket_logits(logits, ids))
  return ids, jnp.maximum(log_probs, LEAST_LOG_PROB)


def stored_distillation_loss(
  teacher_ids: jax.Array,
  teacher_log_probs: jax.Array,
  student_logits: jax.Array,
  weights: jax.Array,
  *,
  divergence: str | types.Divergence,
  student_temperature: float | jax.Array = 1.0,
  length_normalization: str = "sequence",
  segment_ids: jax.Array | None = None,
  num_real_tokens: int | None = None,
  hard_labels: distillation.HardLabels | None = None,
) -> tuple[jax.Array, jax.Array, types.Metrics]:
  """Computes `distillation.distillation_loss` of k + 1 buckets.

  >>> ids, stored = top_k_log_probs(jnp.log(jnp.array([[[0.6, 0.3, 0.1]]])), 1)
  >>> student = jnp.log(jnp.array([[[0.75, 0.15, 0.1]]]))
  >>> loss, weight, _ = stored_distillation_loss(
  ...     ids, stored, student, jnp.ones((1, 1)), divergence="total_variation")
  >>> round(float(loss / weight), 4)  # exact: 0.15
  0.15

  Args:
    teacher_ids: `[B, T, k]` int of `top_k_log_probs`, distinct at each position
      of weight above 0.
    teacher_log_probs: `[B, T, k + 1]` nats in any float type, the tail's last;
      they are normalised again, since float16 rounds.
    student_logits: `[B, T, V]`.
    weights: `[B, T]`, 0 at padding.
    divergence: see `distillation.distillation_loss`.
    student_temperature: divides the student's logits.
    length_normalization: "sequence" or "token", see `distillation.token_weights`.
    segment_ids: `[B, T]` int for packed rows.
    num_real_tokens: see `vocabulary.mask_vocab_padding`.
    hard_labels: see `distillation.distillation_loss`; their cross-entropy is of
      the whole vocabulary.

  Returns:
    `loss_sum`, `weight_sum` and metrics, as `distillation.distillation_loss`.
    KLs and entropies are those of the buckets, which are lower bounds;
    `top1_agreement` is that of the whole vocabulary. `teacher_tail_mass` and
    `student_tail_mass` are the probabilities outside of the top k. An id outside
    of 0..V-1 gives NaN.

  Raises:
    ValueError: shapes that differ.
  """
  expected = (*teacher_ids.shape[:-1], teacher_ids.shape[-1] + 1)
  if teacher_log_probs.shape != expected:
    raise ValueError(
      f"expected teacher log-probs of shape {expected}, those of the ids and of"
      f" the tail, got {teacher_log_probs.shape}; write the teacher's data anew"
    )
  if teacher_ids.shape[:-1] != student_logits.shape[:-1]:
    raise ValueError(
      f"expected teacher ids for positions {student_logits.shape[:-1]}, got"
      f" {teacher_ids.shape[:-1]}; set TASK_FEATURE_LENGTHS"
    )
  # Masked before the softmax, which would leave NaN in the gradient.
  student_logits = distillation.masked(student_logits, weights)
  logits = vocabulary.scaled_logits(
    student_logits, student_temperature, num_real_tokens
  )
  teacher, student = (
    distillation.masked(x, weights)
    for x in (teacher_log_probs, _bucket_logits(logits, teacher_ids))
  )
  if isinstance(divergence, str):
    divergence = divergences.get(divergence)
  loss, per_token = distillation.token_losses(
    teacher,
    student,
    divergence=divergence,
    teacher_temperature=1.0,
    student_temperature=1.0,
    num_real_tokens=None,
  )
  loss, hard = distillation.with_hard_labels(
    loss, student_logits, hard_labels, num_real_tokens
  )
  shares, weight_sum = distillation.token_weights(
    weights, length_normalization, segment_ids
  )
  agrees = jnp.argmax(logits, axis=-1) == teacher_ids[..., 0]
  more = hard | {
    distillation.AGREEMENT: agrees,
    "teacher_tail_mass": jax.nn.softmax(teacher)[..., -1],
    "student_tail_mass": jax.nn.softmax(student)[..., -1],
  }
  metrics = distillation.token_metrics(per_token | more, weights, hard_labels)
  return jnp.sum(shares * loss), weight_sum, metrics


def _bucket_logits(logits: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns logits `[..., k + 1]` of the tokens `ids`, and of all others as one.

  The tail is summed, since 1 minus the others' mass loses precision where the
  tail is small.
  """
  picked = jnp.take_along_axis(logits, ids, axis=-1, mode="fill")
  others = jnp.put_along_axis(logits, ids, _NO_MASS, axis=-1, inplace=False)
  rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
  return jnp.concatenate([picked, rest], axis=-1)
