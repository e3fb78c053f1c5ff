"""Distillation on fixed data without a teacher in memory.

The teacher's next-token distributions come with the data: its top-k log-probs at
each target, as `gkd infer` stores them (`evaluation.teacher_data`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import losses, schedules, types
from gkd_jax.models import base_model, distillation_model, random_keys


class StoredTeacherModel(distillation_model.DistillationModel):
  """A student, and a teacher whose top-k log-probs are features of each batch.

  Training is on the data alone: the log-probs belong to its targets and to no
  other output. The teacher's temperature is that at which they were stored.
  Arguments are those of `DistillationModel`.
  """

  features_have_known_shapes = False  # k is the data's

  @property
  def FEATURE_CONVERTER_CLS(self) -> str:
    """The converter in `data.feature_converters` that keeps the log-probs."""
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
    inputs: types.StepInputs,
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns the loss on the data and its metrics; see `DistillationModel`.

    Args:
      params: the student's.
      teacher_params: not read.
      batch: T5X's features, `[B, ...]`, and `top_k_ids` `[B, T, k]` and
        `top_k_log_probs` `[B, T, k + 1]`.
      inputs: source "data", step, key and row ids.

    Raises:
      ValueError: another source.
    """
    del teacher_params
    if inputs.source != base_model.DATA:
      raise ValueError(
        f"expected source {base_model.DATA!r} of stored log-probs, got"
        f" {inputs.source!r}"
      )
    encoder_key, decoder_key = random_keys.dropout_keys(
      self.config.dropout_rate,
      random_keys.step_keys(inputs.key).dropout,
      inputs.row_ids,
    )
    encoded = self.student.encode(params, batch, encoder_key)
    from_data = jnp.ones(inputs.row_ids.shape, bool)
    batch = dict(batch) | {types.FROM_DATA: from_data}
    student = self.student.decoder_params(params), encoded
    return self.outputs_loss(student, None, batch, inputs.step, decoder_key)

  def outputs_loss(
    self,
    student: types.Encoded,
    teacher: None,
    batch: types.Batch,
    step: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns the divergence from the stored log-probs and its metrics."""
    del teacher
    loss, weight, metrics = losses.stored_distillation_loss(
      batch[types.TOP_K_IDS],
      batch[types.TOP_K_LOG_PROBS],
      self.student.decoder_logits(*student, batch, dropout_key),
      self.student.loss_weights(batch),
      divergence=self.divergence_at(step),
      student_temperature=schedules.at(self.student_temperature, step),
      length_normalization=self.length_normalization,
      num_real_tokens=self.student.num_real_tokens,
      hard_labels=self.hard_labels(batch, step),
    )
    return loss, metrics | {"loss": (loss, weight)}
