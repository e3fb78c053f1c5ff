"""Losses over sequences: temperature, mask, normalisation, sum and weight.

Every loss returns `(loss_sum, weight_sum, aux)`. The caller adds sums and
weights over microbatches and devices and divides once, so that the gradient
does not depend on how a batch is split. `aux` are `types.Metrics`, per token
whatever the normalisation of the loss, without a gradient.

Everything is computed in float32. A position of weight 0 contributes neither
value nor gradient, even where its logits are NaN or infinite.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import divergences, kernels, types
from gkd_jax.divergences import stable
from gkd_jax.losses import vocabulary


def token_weights(
  weights: jax.Array,
  length_normalization: str,
  segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes the weights of per-token losses in the loss's sum.

  >>> w, n = token_weights(jnp.array([[1., 1.], [1., 0.]]), "sequence")
  >>> w.tolist(), float(n)
  ([[0.5, 0.5], [1.0, 0.0]], 2.0)

  Args:
    weights: `[B, T]`, 0 at padding.
    length_normalization: "sequence": the tokens of each sequence share a weight
      of 1, the paper's 1/L_y (equation 2). "token": `weights` unchanged.
    segment_ids: `[B, T]` int, the sequence of a packed row that each token
      belongs to; None for one sequence per row.

  Returns:
    The weights `[B, T]` float32, and their sum `[]` float32: the number of
    sequences with at least one weighted token, or
    the sum of `weights`.

  Raises:
    ValueError: an unknown `length_normalization`, or shapes that differ.
  """
  if length_normalization not in ("sequence", "token"):
    raise ValueError(
      "expected length normalisation 'sequence' or 'token', got"
      f" {length_normalization!r}; set LENGTH_NORMALIZATION"
    )
  weights = weights.astype(jnp.float32)
  if length_normalization == "token":
    return weights, jnp.sum(weights)
  if segment_ids is None:
    totals = jnp.sum(weights, axis=1, keepdims=True)  # [B, 1]
    number = jnp.sum(totals > 0)
  else:
    _check_shape("segment_ids", segment_ids, weights.shape)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]  # [B, T, T]
    of_others = jnp.where(same, weights[:, None, :], 0.0)
    totals = jnp.sum(of_others, axis=2)  # [B, T]
    # A sequence is counted at its first weighted token.
    before = jnp.sum(jnp.tril(of_others, k=-1), axis=2)
    number = jnp.sum((weights > 0) & (before == 0))
  shares = weights / jnp.where(totals > 0, totals, 1.0)
  return shares, number.astype(jnp.float32)


class HardLabels(NamedTuple):
  """Tokens of the data, and how much of the loss is their cross-entropy.

  Attributes:
    targets: `[...]` int32.
    weight: `[...]` or broadcastable, α in [0, 1]: a token's loss is
      (1-α) divergence + α cross-entropy (Hinton et al., arXiv 1503.02531).
  """

  targets: jax.Array
  weight: float | jax.Array

  def total(self, weights: jax.Array) -> jax.Array:
    """Returns the sum of the weights `[...]` of tokens whose α is above 0."""
    return jnp.sum(weights * (self.weight > 0))


@jax.named_scope("loss")
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
  num_real_tokens: int | None = None,
  hard_labels: HardLabels | None = None,
) -> tuple[jax.Array, jax.Array, types.Metrics]:
  """Computes the divergence of the student from the teacher at each position.

  `loss_sum / weight_sum` is the paper's equation 2 averaged over sequences, or
  the mean over tokens. The result is not multiplied by squared temperatures.

  >>> teacher = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1]]]))
  >>> student = jnp.log(jnp.array([[[0.75, 0.25], [0.1, 0.9]]]))
  >>> loss, weight, _ = distillation_loss(
  ...     teacher, student, jnp.array([[1.0, 0.0]]), divergence="forward_kl")
  >>> round(float(loss / weight), 4)
  0.1438

  Args:
    teacher_logits: `[B, T, V]`. Gradients flow into them as into the student's;
      stop them outside.
    student_logits: `[B, T, V]`.
    weights: `[B, T]`, 0 at padding.
    divergence: a name in `divergences` without required hyper-parameters, or
      what `divergences.get` returns.
    teacher_temperature: divides the teacher's logits, a number above 0 or a
      traced scalar.
    student_temperature: divides the student's logits.
    length_normalization: "sequence" or "token", see `token_weights`.
    segment_ids: `[B, T]` int for packed rows, see `token_weights`.
    num_real_tokens: R; token ids from R on are padding of the vocabulary.
      Value, gradient and metrics are those of the first R logits, so that V may
      differ between teacher and student. None: R = V.
    hard_labels: `[B, T]`; None: the divergence alone. The cross-entropy is at
      temperature 1, whatever those of the divergence are.

  Returns:
    `loss_sum` in nats and `weight_sum`, both `[]` float32: over sequences, of
    the mean over tokens of each ("sequence"), or over tokens ("token"). Then
    metrics per token: `forward_kl`, `reverse_kl`, `teacher_entropy`,
    `student_entropy` in nats, all at the temperatures of the loss, and
    `top1_agreement`, the share of tokens that both rank first; with hard labels
    `hard_label_cross_entropy` in nats, per token whose α is above 0.

  Raises:
    ValueError: shapes that differ, a temperature not above 0, a
      `num_real_tokens` outside of 1..V, or an unknown name or length
      normalisation.
  """
  teacher_logits, student_logits = vocabulary.of_one_size(
    teacher_logits, student_logits, num_real_tokens
  )
  if teacher_logits.shape != student_logits.shape:
    raise ValueError(
      "expected teacher and student logits of one shape, got"
      f" {teacher_logits.shape} and {student_logits.shape}"
    )
  _check_shape("weights", weights, student_logits.shape[:-1])
  if isinstance(divergence, str):
    divergence = divergences.get(divergence)
  loss, per_token = token_losses(
    masked(teacher_logits, weights),
    masked(student_logits, weights),
    hard_labels,
    divergence=divergence,
    teacher_temperature=teacher_temperature,
    student_temperature=student_temperature,
    num_real_tokens=num_real_tokens,
  )
  shares, weight_sum = token_weights(weights, length_normalization, segment_ids)
  metrics = token_metrics(per_token, weights, hard_labels)
  return jnp.sum(shares * loss), weight_sum, metrics


HARD_LABELS = "hard_label_cross_entropy"
TOKEN_METRICS = (
  "forward_kl",
  "reverse_kl",
  "teacher_entropy",
  "student_entropy",
  "top1_agreement",
)


def token_losses(
  teacher_logits: jax.Array,
  student_logits: jax.Array,
  hard_labels: HardLabels | None = None,
  *,
  divergence: types.Divergence,
  teacher_temperature: float | jax.Array,
  student_temperature: float | jax.Array,
  num_real_tokens: int | None,
  teacher_softcap: float | None = None,
  student_softcap: float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the loss and the metrics of each token.

  Args:
    teacher_logits: `[..., V]`, finite.
    student_logits: `[..., V]`, finite.
    hard_labels: `[...]`, see `distillation_loss`.
    divergence: see `distillation_loss`, as the other arguments.
    teacher_temperature: divides the teacher's logits.
    student_temperature: divides the student's logits.
    num_real_tokens: see `vocabulary.mask_vocab_padding`.
    teacher_softcap: of the teacher's logits, if they are not capped yet; see
      `vocabulary.soft_cap`.
    student_softcap: likewise of the student's.

  Returns:
    Nats `[...]`, and `TOKEN_METRICS`, `[...]` each, without a gradient; with hard
    labels `HARD_LABELS` as well.

  Raises:
    ValueError: a temperature not above 0, or a `num_real_tokens` outside of
      1..V.
  """
  vocabulary.check_temperatures(teacher_temperature, student_temperature)
  teacher_logits = vocabulary.soft_cap(teacher_logits, teacher_softcap)
  student_logits = vocabulary.soft_cap(student_logits, student_softcap)
  p = vocabulary.log_probs(teacher_logits, teacher_temperature, num_real_tokens)
  q = vocabulary.log_probs(student_logits, student_temperature, num_real_tokens)
  loss, hard = with_hard_labels(
    divergence(p, q), student_logits, hard_labels, num_real_tokens
  )
  p, q = jax.lax.stop_gradient((p, q))
  agree = kernels.argmax(p) == kernels.argmax(q)
  return loss, summed_metrics(p, q) | {AGREEMENT: agree} | hard


def with_hard_labels(
  loss: jax.Array,
  student_logits: jax.Array,
  hard_labels: HardLabels | None,
  num_real_tokens: int | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mixes the cross-entropy of hard labels into the loss of each token.

  Args:
    loss: `[...]` nats.
    student_logits: `[..., V]`, finite, without a temperature.
    hard_labels: `[...]`; None: there are none.
    num_real_tokens: see `vocabulary.mask_vocab_padding`.

  Returns:
    Nats `[...]`, and `HARD_LABELS`, the cross-entropy of tokens whose α is above
    0 and 0 of others, without a gradient; `{}` without hard labels.
  """
  if hard_labels is None:
    return loss, {}
  alpha = hard_labels.weight
  log_probs = vocabulary.log_probs(student_logits, 1.0, num_real_tokens)
  cross_entropy = -_picked(log_probs, hard_labels.targets)
  counted = jnp.where(alpha > 0, jax.lax.stop_gradient(cross_entropy), 0.0)
  mixed = (1 - alpha) * loss + alpha * cross_entropy
  return mixed, {HARD_LABELS: counted}


def _picked(log_probs, targets):
  """Returns log-probs `[...]` of targets; as a sum, which a mesh can split."""
  axis = log_probs.ndim - 1
  ids = jax.lax.broadcasted_iota(jnp.int32, log_probs.shape, axis)
  return jnp.sum(jnp.where(ids == targets[..., None], log_probs, 0.0), axis)


AGREEMENT = "top1_agreement"


def summed_metrics(p: jax.Array, q: jax.Array) -> dict[str, jax.Array]:
  """Computes all of `TOKEN_METRICS` but `AGREEMENT`.

  Args:
    p: `[..., V]` the teacher's log-probs.
    q: `[..., V]` the student's log-probs.

  Returns:
    `[...]` nats each.
  """
  forward, reverse = stable.both_kls(p, q)
  return {
    "forward_kl": forward,
    "reverse_kl": reverse,
    "teacher_entropy": divergences.entropy(p),
    "student_entropy": divergences.entropy(q),
  }


@jax.named_scope("loss")
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
  """Computes T5X's cross-entropy with label smoothing and z-loss.

  With smoothing ε the target's probability is 1-ε, and ε is spread evenly over
  the other V-1 tokens. The entropy of that distribution is subtracted, so that
  the minimum of the loss is 0 for every ε.

  >>> logits = jnp.log(jnp.array([[[0.75, 0.25], [0.5, 0.5]]]))
  >>> loss, weight, _ = cross_entropy_loss(
  ...     logits, jnp.array([[1, 0]]), jnp.array([[1.0, 0.0]]))
  >>> round(float(loss / weight), 4)
  1.3863

  Args:
    logits: `[B, T, V]`.
    targets: `[B, T]` int.
    weights: `[B, T]`, 0 at padding.
    label_smoothing: ε in [0, 1).
    z_loss: factor of log(Z)², added to each token's loss; Z is the sum of
      exp(logits).
    length_normalization: "sequence" or "token", see `token_weights`.
    segment_ids: `[B, T]` int for packed rows, see `token_weights`.

  Returns:
    `loss_sum` in nats and `weight_sum`, both `[]` float32, as in
    `distillation_loss`; with "token", T5X's loss without a normalising factor.
    Then metrics per token: `cross_entropy` (without z-loss), `z_loss`, and
    `accuracy` of the most likely token.

  Raises:
    ValueError: shapes that differ, an ε outside of [0, 1), or an unknown length
      normalisation.
  """
  _check_shape("targets", targets, logits.shape[:-1])
  _check_shape("weights", weights, logits.shape[:-1])
  if not 0 <= label_smoothing < 1:
    raise ValueError(
      f"expected label_smoothing in [0, 1), got {label_smoothing};"
      " set label_smoothing"
    )
  logits = masked(logits, weights)
  # log_softmax without `[B, T, V]` log-probs in memory: only the target's, and
  # with smoothing their sum, are needed.
  largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
  shifted = logits - largest[:, :, None]
  log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
  log_z = log_sum + largest
  picked = jnp.take_along_axis(shifted, targets[:, :, None], axis=-1)[:, :, 0]
  cross_entropy = log_sum - picked
  if label_smoothing:
    others = logits.shape[-1] - 1
    keep, low = 1 - label_smoothing, label_smoothing / others
    least = -keep * np.log(keep) - label_smoothing * np.log(low)
    of_others = others * log_sum - (jnp.sum(shifted, axis=-1) - picked)
    cross_entropy = keep * cross_entropy + low * of_others - least
  penalty = z_loss * jnp.square(log_z)
  shares, weight_sum = token_weights(weights, length_normalization, segment_ids)
  loss_sum = jnp.sum(shares * (cross_entropy + penalty))
  per_token = {
    "cross_entropy": cross_entropy,
    "z_loss": penalty,
    "accuracy": kernels.argmax(logits) == targets,
  }
  return loss_sum, weight_sum, token_metrics(per_token, weights)


def masked(logits: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns float32 logits `[B, T, V]`, 0 where the weight `[B, T]` is 0.

  Masking the loss after the softmax would leave NaN in the gradient.
  """
  return jnp.where(weights[:, :, None] > 0, logits.astype(jnp.float32), 0.0)


def token_metrics(
  per_token: dict[str, jax.Array],
  weights: jax.Array,
  hard_labels: HardLabels | None = None,
) -> types.Metrics:
  """Returns metrics of tokens, `[B, T]` each, as `summed`."""
  weights = weights.astype(jnp.float32)
  sums = {name: jnp.sum(x * weights) for name, x in per_token.items()}
  return summed(sums, weights, hard_labels)


def summed(
  sums: dict[str, jax.Array],
  weights: jax.Array,
  hard_labels: HardLabels | None,
) -> types.Metrics:
  """Returns sums over tokens as (sum, weight), without a gradient.

  Args:
    sums: name to `[]`.
    weights: `[B, T]` float32; the weight of `HARD_LABELS` is that of tokens with
      hard labels.
    hard_labels: `[B, T]`, or None.
  """
  totals = dict.fromkeys(sums, jnp.sum(weights))
  if hard_labels is not None:
    totals[HARD_LABELS] = hard_labels.total(weights)
  return {k: (jax.lax.stop_gradient(x), totals[k]) for k, x in sums.items()}


def _check_shape(name: str, array: jax.Array, shape: tuple[int, ...]):
  if array.shape != shape:
    raise ValueError(
      f"expected {name} of shape {shape}, got {array.shape}; one entry per"
      " position of the batch"
    )
