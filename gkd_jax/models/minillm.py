"""MiniLLM: the reverse KL of whole sequences, by policy gradient.

Gu et al. (arXiv 2306.08543) minimise KL(q ‖ p) between the laws of whole
outputs y, q the student's and p the teacher's. With r_t = log p(y_t | y_<t) -
log q(y_t | y_<t) its gradient is, after their single-step decomposition,

  E_y[ Σ_t ∇ KL(q(. | y_<t) ‖ p(. | y_<t)) - Σ_t R_{t+1} ∇ log q(y_t | y_<t) ],

R_{t+1} = Σ_{s>t} r_s: the first sum is exact at each position of y, the second
is what a token does to those after it. Outputs are drawn from a mixture with
the teacher, 0.2 p + 0.8 q token by token, and importance weights make up for
it. R_{t+1} is divided by the number of its terms, against a preference for
short outputs.

One update per sample: no replay and no ratio to an older policy, so the
paper's PPO clipping has nothing to do here. Its language-modelling loss on a
pre-training corpus is left out.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from gkd_jax import decoding, losses, types
from gkd_jax.losses import policy_gradient
from gkd_jax.models import base_model, gkd, rl_gkd

_FIXED = {
  "student_data_fraction": 1.0,
  "divergence": "reverse_kl",
  "beta": None,
  "decode_slots": None,
  "length_normalization": "sequence",
}


class MiniLLMModel(gkd.GKDModel):
  """A student, a teacher, and the reverse KL between their sequences' laws.

  Args:
    student: the model that is trained.
    teacher: the frozen model, of the student's kind.
    teacher_mix: the teacher's share in each token's law while sampling.
    importance: see `minillm_loss`.
    normalize_returns: see `minillm_loss`.
    teacher_temperature: of p.
    sampling_temperature: of q, in sampling and in the loss alike.
    output_buckets: see `GKDModel`.
    **fixed: `student_data_fraction` 1, `divergence` "reverse_kl", `beta` and
      `decode_slots` None, `length_normalization` "sequence":
      a run that sets another value of what GKD can choose learns that it has no
      effect here.

  Raises:
    ValueError: a setting is out of range, or student and teacher do not fit.
  """

  NEEDS_LOGITS = True  # of the teacher's and the student's law of each token

  def __init__(
    self,
    student: types.TransformerModel,
    teacher: types.TransformerModel,
    *,
    teacher_mix: float = 0.2,
    importance: str = "token",
    normalize_returns: bool = True,
    teacher_temperature: float = 1.0,
    sampling_temperature: float = 1.0,
    output_buckets: Sequence[int] | None = None,
    **fixed: Any,
  ):
    for name, value in fixed.items():
      if name not in _FIXED or value != _FIXED[name]:
        raise ValueError(
          f"expected MiniLLM's {name} to be {_FIXED.get(name)!r}, got"
          f" {value!r}; set {name.upper()}"
        )
    super().__init__(
      student,
      teacher,
      divergence="reverse_kl",
      teacher_temperature=teacher_temperature,
      student_temperature=sampling_temperature or 1.0,
      sampling_temperature=sampling_temperature,
      output_buckets=output_buckets,
    )
    rl_gkd.check_on_policy(self)
    self.teacher_mix = teacher_mix
    self.importance = importance
    self.normalize_returns = normalize_returns
    if not 0 <= teacher_mix < 1:
      raise ValueError(
        f"expected a teacher_mix in [0, 1), got {teacher_mix}; set TEACHER_MIX"
      )
    if importance not in policy_gradient.IMPORTANCE:
      raise ValueError(
        f"expected importance weights of {', '.join(policy_gradient.IMPORTANCE)}, got"
        f" {importance!r}; set IMPORTANCE"
      )
    law = functools.partial(
      decoding.sampling_log_probs,
      num_real_tokens=student.num_real_tokens,
      suppress_ids=self.sampling["suppress_ids"],
    )
    self._teacher_law = functools.partial(law, temperature=teacher_temperature)
    self._student_law = functools.partial(law, temperature=sampling_temperature)

  def _sample(
    self, params, encoded, batch, key, row_ids, chosen, teacher_params=None
  ):
    """As `GKDModel._sample`, each token from the mixture of both laws.

    Without the teacher's parameters, as when sampling is timed, by the student.
    """
    if teacher_params is None or self.teacher_mix == 0:
      return super()._sample(params, encoded, batch, key, row_ids, chosen)
    teacher_step, teacher_cache, rows = self.teacher.start_decoding(
      teacher_params, self.teacher.encode(teacher_params, batch), batch
    )
    student_step, student_cache, _ = self.student.start_decoding(
      params, encoded, batch
    )

    def step(tokens, caches):
      teacher_logits, teacher_cache = teacher_step(tokens, caches[0])
      student_logits, student_cache = student_step(tokens, caches[1])
      law = policy_gradient.mixture(
        self._teacher_law(teacher_logits),
        self._student_law(student_logits),
        self.teacher_mix,
      )
      return law, (teacher_cache, student_cache)

    batch_size, length = batch["decoder_target_tokens"].shape
    tokens, log_probs = decoding.sample(
      step,
      (teacher_cache, student_cache),
      key,
      batch_size=batch_size,
      max_decode_length=length,
      eos_id=base_model.EOS_ID,
      row_ids=row_ids,
      active=chosen,
      **rows,
    )
    # PAD is suppressed, so that zeros stand after an output's end alone.
    weights = (tokens != decoding.PAD_ID).astype(jnp.float32)
    return tokens, weights, log_probs

  def _loss(self, batch, teacher_logits, student_logits, step):
    _, _, aux = super()._loss(batch, teacher_logits, student_logits, step)
    weights = self.student.loss_weights(batch)
    loss, weight, more = losses.minillm_loss(
      self._teacher_law(teacher_logits, weights),
      self._student_law(student_logits, weights),
      batch["decoder_target_tokens"],
      weights,
      teacher_mix=self.teacher_mix,
      importance=self.importance,
      normalize_returns=self.normalize_returns,
    )
    return loss, weight, aux | more
