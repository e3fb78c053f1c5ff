"""MiniLLM: the reverse KL between distributions of whole sequences, by policy gradient.

Gu et al. (arXiv 2306.08543) minimise KL(q ‖ p) over whole outputs y, with q the
student's distribution and p the teacher's. With r_t = log p(y_t | y_<t) -
log q(y_t | y_<t) its gradient is, after their single-step decomposition,

  E_y[ Σ_t ∇ KL(q(. | y_<t) ‖ p(. | y_<t)) - Σ_t R_{t+1} ∇ log q(y_t | y_<t) ],

R_{t+1} = Σ_{s>t} r_s. The first sum is exact at each position of y; the second
credits a token with its effect on later ones. Outputs are sampled from a mixture
with the teacher, 0.2 p + 0.8 q for each token, and importance weights correct for
it. R_{t+1} is divided by the number of its terms, so that short outputs are not
preferred.

There is one update per sample, no replay and no ratio to an older policy, so the
paper's PPO clipping does not apply. Its language-modelling loss on a pre-training
corpus is left out.
"""

from collections.abc import Sequence
from typing import Any

import jax

from gkd_jax import checks, decoding, losses, schedules, types
from gkd_jax.losses import policy_gradient
from gkd_jax.models import gkd, outputs, rl_gkd


class MiniLLMModel(gkd.GKDModel):
  """A student, a teacher, and the reverse KL between their sequences.

  λ is 1, the divergence is the reverse KL, and the loss is a mean over sequences.

  Args:
    student: the model that is trained.
    teacher: the frozen model, of the student's kind.
    teacher_mix: the teacher's share in each token's distribution while sampling.
    importance: see `losses.minillm_loss`.
    normalize_returns: see `losses.minillm_loss`.
    teacher_temperature: of p.
    sampling_temperature: of q, in sampling and in the loss.
    decode_slots: see `GKDModel`.
    output_buckets: see `DistillationModel`.

  Raises:
    ValueError: a setting is out of range, or student and teacher do not fit.
  """

  def __init__(
    self,
    student: types.TransformerModel,
    teacher: types.TransformerModel,
    *,
    teacher_mix: float = 0.2,
    importance: str = "token",
    normalize_returns: bool = True,
    teacher_temperature: float | types.Schedule = 1.0,
    sampling_temperature: float | types.Schedule = 1.0,
    decode_slots: int | None = None,
    output_buckets: Sequence[int] | None = None,
  ):
    super().__init__(
      student,
      teacher,
      divergence="reverse_kl",
      teacher_temperature=teacher_temperature,
      student_temperature=sampling_temperature or 1.0,
      sampling_temperature=sampling_temperature,
      decode_slots=decode_slots,
      output_buckets=output_buckets,
    )
    rl_gkd.check_on_policy(self)
    self.teacher_mix = teacher_mix
    self.importance = importance
    self.normalize_returns = normalize_returns
    checks.number(
      teacher_mix, "TEACHER_MIX", least=0, below=1, what="a teacher_mix"
    )
    checks.boolean(normalize_returns, "NORMALIZE_RETURNS")
    policy_gradient.check_importance(importance)

  def _log_p(self, logits, step, weights=None):
    return self._log_probs(logits, weights, self.teacher_temperature, step)

  def _log_q(self, logits, step, weights=None):
    return self._log_probs(logits, weights, self.sampling["temperature"], step)

  def _log_probs(self, logits, weights, temperature, step):
    return decoding.sampling_log_probs(
      logits,
      weights,
      num_real_tokens=self.student.num_real_tokens,
      temperature=schedules.at(temperature, step),
      suppress_ids=self.sampling["suppress_ids"],
    )

  def draw(
    self,
    params: Any,
    encoded: types.PyTree,
    batch: types.Batch,
    key: jax.Array,
    *,
    row_ids: jax.Array | None = None,
    chosen: jax.Array | None = None,
    step: int | jax.Array = 0,
    teacher_params: Any = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Samples as `GKDModel.draw`, each token from the mixture of both models.

    Without the teacher's parameters the student alone is sampled.
    """
    if teacher_params is None or self.teacher_mix == 0:
      return super().draw(
        params, encoded, batch, key, row_ids=row_ids, chosen=chosen, step=step
      )
    slots = self.decode_slots
    teacher_step, teacher_cache, teacher_rows = self.teacher.start_decoding(
      teacher_params,
      self.teacher.encode(teacher_params, batch),
      batch,
      slots=slots,
    )
    student_step, student_cache, rows = self.student.start_decoding(
      params, encoded, batch, slots=slots
    )
    axes = teacher_rows["row_axes"], rows.pop("row_axes")

    def decode_step(tokens, caches):
      teacher_logits, teacher_cache = teacher_step(tokens, caches[0])
      student_logits, student_cache = student_step(tokens, caches[1])
      teacher_logits, student_logits = losses.of_one_size(
        teacher_logits, student_logits, self.student.num_real_tokens
      )
      log_probs = policy_gradient.mixture(
        self._log_p(teacher_logits, step),
        self._log_q(student_logits, step),
        self.teacher_mix,
      )
      return log_probs, (teacher_cache, student_cache)

    return outputs.draw(
      decode_step,
      (teacher_cache, student_cache),
      key,
      batch,
      eos_id=self.student.special_tokens.eos_id,
      row_ids=row_ids,
      active=chosen,
      suppress_ids=self.sampling["suppress_ids"],
      slots=slots,
      row_axes=axes if slots else None,
      **rows,
    )

  def outputs_loss(
    self,
    student: types.Encoded,
    teacher: types.Encoded,
    batch: types.Batch,
    step: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns `losses.minillm_loss` of the batch's outputs and its metrics."""
    logits = self.both_logits(student, teacher, batch, dropout_key)
    _, metrics = self.divergence_loss(*logits, batch, step)
    teacher_logits, student_logits = logits
    weights = self.student.loss_weights(batch)
    loss, weight, more = losses.minillm_loss(
      self._log_p(teacher_logits, step, weights),
      self._log_q(student_logits, step, weights),
      batch["decoder_target_tokens"],
      weights,
      teacher_mix=self.teacher_mix,
      importance=self.importance,
      normalize_returns=self.normalize_returns,
    )
    return loss, metrics | more | {"loss": (loss, weight)}
