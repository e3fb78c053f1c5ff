"""Distillation on fixed data without a teacher in memory.

The teacher's laws come with the data: its top-k log-probs at each target, as
`gkd infer` stores them (`teacher_data`).
"""

from collections.abc import Sequence
from typing import Any

import jax

from gkd_jax import losses, types
from gkd_jax.models import base_model, gkd, length_buckets


class StoredTeacherModel(gkd.GKDModel):
  """A student, and a teacher's laws that are features of each batch.

  Training is on the data alone: the laws are of its targets, and of no other
  output. The teacher's temperature is that at which they were stored.

  Args:
    student: the model that is trained.
    divergence: see `GKDModel`.
    beta: see `GKDModel`.
    skew_alpha: see `GKDModel`.
    student_temperature: of the student's softmax in the loss.
    length_normalization: "sequence" (the paper's 1/L_y) or "token".
    output_buckets: see `GKDModel`.

  Raises:
    ValueError: a setting is out of range.
  """

  OF_OUTPUTS = (
    *gkd.GKDModel.OF_OUTPUTS,
    types.TOP_K_IDS,
    types.TOP_K_LOG_PROBS,
  )

  def __init__(
    self,
    student: types.TransformerModel,
    divergence: str = "forward_kl",
    *,
    beta: float | types.Schedule | None = None,
    skew_alpha: float = 0.1,
    student_temperature: float = 1.0,
    length_normalization: str = "sequence",
    output_buckets: Sequence[int] | None = None,
  ):
    super().__init__(
      student,
      student,  # checked against itself: there is no other
      divergence,
      0.0,
      beta=beta,
      skew_alpha=skew_alpha,
      student_temperature=student_temperature,
      length_normalization=length_normalization,
      output_buckets=output_buckets,
    )
    self.teacher = None

  @property
  def FEATURE_CONVERTER_CLS(self) -> str:
    """The converter of `feature_converters` that keeps the stored laws."""
    name = self.student.FEATURE_CONVERTER_CLS
    if not isinstance(name, str):
      raise ValueError(
        "expected a student with the name of a seqio converter, got"
        f" {name}; set STUDENT_MODEL"
      )
    return f"TopK{name}"

  def train_loss(
    self,
    params: Any,
    teacher_params: Any,
    batch: types.Batch,
    *,
    source: str,
    step: jax.Array,
    key: jax.Array,
    row_ids: jax.Array,
  ) -> tuple[jax.Array, jax.Array, types.Metrics]:
    """`GKDModel.train_loss` on data, from the batch's stored laws.

    Args:
      params: the student's.
      teacher_params: not read.
      batch: T5X's features, `[B, ...]`, and `top_k_ids` `[B, T, k]` and
        `top_k_log_probs` `[B, T, k + 1]`.
      source: "data".
      step: `[]`, for schedules.
      key: of this step.
      row_ids: `[B]`, place of each row in the whole batch.

    Raises:
      ValueError: another source.
    """
    del teacher_params
    if source != base_model.DATA:
      raise ValueError(
        f"expected source {base_model.DATA!r} of stored laws, got {source!r}"
      )
    # The key is split as in `GKDModel`, so that dropout is the same.
    encoder_key, decoder_key = base_model.dropout_keys(
      self.student.config.dropout_rate, jax.random.split(key, 3)[0], row_ids
    )
    encoded = self.student.encode(params, batch, encoder_key)
    fixed = gkd.Fixed(batch, decoder_key, step)
    return self._outputs_loss(params, encoded, fixed)

  def _loss_of_length(self, length, trained, fixed):
    params, encoded = trained
    batch = length_buckets.cut(fixed.batch, length, self.OF_OUTPUTS)
    loss, weight, aux = losses.stored_distillation_loss(
      batch[types.TOP_K_IDS],
      batch[types.TOP_K_LOG_PROBS],
      self.student.decoder_logits(params, encoded, batch, fixed.decoder_key),
      self.student.loss_weights(batch),
      divergence=self._divergence_at(fixed.step),
      student_temperature=self.student_temperature,
      length_normalization=self.length_normalization,
      num_real_tokens=self.student.num_real_tokens,
    )
    return loss, (weight, aux)
