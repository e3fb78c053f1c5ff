"""Generalized Knowledge Distillation (Agarwal et al., arXiv 2306.13649, algorithm 1).

`GKDModel` holds a student and a teacher of one kind. A step trains the student on
the dataset's outputs or on outputs that it samples itself, against the teacher's
next-token distributions.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import checks, decoding, losses, schedules, types
from gkd_jax.decoding import sampling
from gkd_jax.models import base_model, distillation_model, outputs, random_keys


class GKDModel(distillation_model.DistillationModel):
  """A student, a teacher, and the divergence between them.

  The teacher's parameters are an argument of the loss, never part of the
  student's.

  Args:
    student: the model that is trained.
    teacher: the frozen model, of the student's kind.
    divergence: see `DistillationModel`, as `beta`, `skew_alpha`,
      `student_temperature`, `length_normalization` and `output_buckets`.
    student_data_fraction: λ in [0, 1], a number or a schedule.
    beta: see there.
    skew_alpha: see there.
    student_data_granularity: "step": one coin per batch (algorithm 1).
      "example": one coin per row.
    teacher_temperature: of the teacher's softmax (paper, tables A.1-A.4), a
      number or a schedule.
    student_temperature: see there.
    sampling_temperature: of the student's samples, a number or a schedule.
    sampling_top_k: keep the k likeliest tokens; 0 keeps all.
    sampling_top_p: keep the likeliest tokens up to this mass; 1.0 keeps all.
    decode_slots: rows that the student samples at a time, see `decoding.sample`;
      None: the whole batch together.
    length_normalization: see there.
    loss_chunk_size: tokens per chunk of `losses.fused_distillation_loss`, on each
      device; 0 for `losses.distillation_loss` on whole logits. None: chunks of
      256 for batches of more than 2^22 logits (B T V), otherwise whole logits.
    output_buckets: see there.
    hard_label_weight: see there.

  Raises:
    ValueError: a setting is out of range, or student and teacher do not fit.
  """

  def __init__(
    self,
    student: types.TransformerModel,
    teacher: types.TransformerModel,
    divergence: str = "forward_kl",
    student_data_fraction: float | types.Schedule = 1.0,
    *,
    beta: float | types.Schedule | None = None,
    skew_alpha: float = 0.1,
    student_data_granularity: str = "step",
    teacher_temperature: float | types.Schedule = 1.0,
    student_temperature: float | types.Schedule = 1.0,
    sampling_temperature: float | types.Schedule = 1.0,
    sampling_top_k: int = 0,
    sampling_top_p: float = 1.0,
    decode_slots: int | None = None,
    length_normalization: str = "sequence",
    loss_chunk_size: int | None = None,
    output_buckets: Sequence[int] | None = None,
    hard_label_weight: float | types.Schedule = 0.0,
  ):
    super().__init__(
      student,
      divergence,
      beta=beta,
      skew_alpha=skew_alpha,
      student_temperature=student_temperature,
      length_normalization=length_normalization,
      output_buckets=output_buckets,
      hard_label_weight=hard_label_weight,
    )
    self.teacher = teacher
    self.student_data_fraction = student_data_fraction
    self.student_data_granularity = student_data_granularity
    self.teacher_temperature = teacher_temperature
    self.sampling = {
      "temperature": sampling_temperature,
      "top_k": sampling_top_k,
      "top_p": sampling_top_p,
      "suppress_ids": student.special_tokens.never_sampled,
    }
    self.decode_slots = decode_slots
    self.loss_chunk_size = loss_chunk_size
    distillation_model.check_pair(teacher, student)
    self._check_settings()

  def _check_settings(self):
    fraction = self.student_data_fraction
    self.check_number(
      fraction, "STUDENT_DATA_FRACTION", least=0, most=1, what="λ"
    )
    self.check_number(
      self.teacher_temperature,
      "TEACHER_TEMPERATURE",
      above=0,
      what="a teacher_temperature",
    )
    self.check_number(
      self.sampling["temperature"],
      "SAMPLING_TEMPERATURE",
      least=0,
      what="a temperature",
    )
    if self.hard_label_weight and fraction == 1:
      checks.refuse(
        "0 where no row is from the data (STUDENT_DATA_FRACTION = 1)",
        self.hard_label_weight,
        "HARD_LABEL_WEIGHT",
      )
    checks.one_of(
      self.student_data_granularity,
      "STUDENT_DATA_GRANULARITY",
      ("step", "example"),
    )
    checks.whole(self.decode_slots, "DECODE_SLOTS", none=True)
    checks.whole(self.loss_chunk_size, "LOSS_CHUNK_SIZE", least=0, none=True)
    decoding.check_options(
      {k: v for k, v in self.sampling.items() if k != "temperature"}
    )

  def with_special_tokens(self, special_tokens: types.SpecialTokens) -> Any:
    """See `DistillationModel.with_special_tokens`."""
    model = super().with_special_tokens(special_tokens)
    if model is not self:
      never = special_tokens.never_sampled
      model.sampling = self.sampling | {"suppress_ids": never}
    return model

  @property
  def sources(self) -> tuple[str, ...]:
    """Every source of outputs that a step of the run can have, by λ."""
    fraction = self.student_data_fraction
    if not callable(fraction) and fraction in (0, 1):
      return (base_model.STUDENT if fraction else base_model.DATA,)
    if self.student_data_granularity == "step":
      return (base_model.DATA, base_model.STUDENT)
    if callable(fraction):  # it may be 0 or 1 at some steps
      return (base_model.DATA, base_model.STUDENT, base_model.MIXED)
    return (base_model.MIXED,)

  def source_of_step(self, seed: int, step: int) -> str:
    """Returns whose outputs a step trains on: "data", "student" or "mixed".

    The coin of algorithm 1 is drawn from (seed, step) on the host, so that every
    host and every resumed run draws the same. `u < λ` with u in [0, 1): λ = 0
    never samples, λ = 1 always does.

    Args:
      seed: of the run.
      step: batches used so far.

    Raises:
      ValueError: a schedule left its range.
    """
    super().source_of_step(seed, step)
    fraction = schedules.host_value(self.student_data_fraction, step)
    if fraction in (0, 1):
      return base_model.STUDENT if fraction else base_model.DATA
    if self.student_data_granularity == "example":
      return base_model.MIXED
    u = np.random.default_rng([seed, step]).random()
    return base_model.STUDENT if u < fraction else base_model.DATA

  def train_loss(
    self,
    params: Any,
    teacher_params: Any,
    batch: types.Batch,
    inputs: types.StepInputs,
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns the GKD loss and its metrics; see `DistillationModel.train_loss`.

    A row's sample depends on the step's key and on the row's id alone.
    """
    # Whose outputs: the dataset's, or the student's own samples.
    keys = random_keys.step_keys(inputs.key)
    encoder_key, decoder_key = random_keys.dropout_keys(
      self.config.dropout_rate, keys.dropout, inputs.row_ids
    )
    with jax.named_scope("student"):
      encoded = self.student.encode(params, batch, encoder_key)
    sampled = {}
    if inputs.source == base_model.DATA:
      from_data = jnp.ones(inputs.row_ids.shape, bool)
      batch = dict(batch) | {types.FROM_DATA: from_data}
    else:
      # Samples are drawn without dropout; at rate 0 one encoding serves both.
      clean = encoded
      if encoder_key is not None:
        clean = self.student.encode(params, batch)
      batch, sampled = self.with_samples(
        params, clean, batch, inputs, teacher_params
      )

    # The teacher reads the same inputs and outputs.
    with jax.named_scope("teacher"):
      teacher = teacher_params, self.teacher.encode(teacher_params, batch)

    # The divergence between both models' distributions of each output token.
    student = self.student.decoder_params(params), encoded
    loss, metrics = self.outputs_loss(
      student, teacher, batch, inputs.step, decoder_key
    )
    return loss, metrics | sampled

  def outputs_loss(
    self,
    student: types.Encoded,
    teacher: types.Encoded,
    batch: types.Batch,
    step: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns the divergence on a batch's outputs and its metrics."""
    chunk_size = self._chunk_size(batch)
    if chunk_size == 0:
      logits = self.both_logits(student, teacher, batch, dropout_key)
      return self.divergence_loss(*logits, batch, step)
    with jax.named_scope("student"):
      student_hidden = self.student.decoder_hidden(*student, batch, dropout_key)
    with jax.named_scope("teacher"):
      teacher_hidden = self.teacher.decoder_hidden(*teacher, batch)
    loss, weight, metrics = losses.fused_distillation_loss(
      student_hidden,
      self.student.output_head(student[0]),
      teacher_hidden,
      self.teacher.output_head(teacher[0]),
      teacher_softcap=self.teacher.final_softcap,
      student_softcap=self.student.final_softcap,
      chunk_size=chunk_size,
      **self._loss_settings(batch, step),
    )
    return loss, metrics | {"loss": (loss, weight)}

  def both_logits(
    self,
    student: types.Encoded,
    teacher: types.Encoded,
    batch: types.Batch,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the teacher's logits, without a gradient, and the student's.

    Arguments as of `outputs_loss`; `[B, T, V]` each, see `losses.of_one_size`.
    """
    with jax.named_scope("teacher"):
      teacher_logits = self.teacher.decoder_logits(*teacher, batch)
    with jax.named_scope("student"):
      student_logits = self.student.decoder_logits(*student, batch, dropout_key)
    return losses.of_one_size(
      jax.lax.stop_gradient(teacher_logits),
      student_logits,
      self.student.num_real_tokens,
    )

  def divergence_loss(
    self,
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    batch: types.Batch,
    step: jax.Array,
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns `losses.distillation_loss` with the model's settings.

    Args:
      teacher_logits: `[B, T, V]`.
      student_logits: `[B, T, V]`.
      batch: features, outputs included.
      step: `[]`, for schedules.
    """
    loss, weight, metrics = losses.distillation_loss(
      teacher_logits, student_logits, **self._loss_settings(batch, step)
    )
    return loss, metrics | {"loss": (loss, weight)}

  def _chunk_size(self, batch):
    """Returns tokens per chunk of the fused loss, 0 for whole logits."""
    if self.loss_chunk_size is not None:
      return self.loss_chunk_size
    logits = batch["decoder_target_tokens"].size * self.config.vocab_size
    return losses.DEFAULT_CHUNK_SIZE if logits > 2**22 else 0

  def _loss_settings(self, batch, step):
    return {
      "hard_labels": self.hard_labels(batch, step),
      "weights": self.student.loss_weights(batch),
      "divergence": self.divergence_at(step),
      "teacher_temperature": schedules.at(self.teacher_temperature, step),
      "student_temperature": schedules.at(self.student_temperature, step),
      "length_normalization": self.length_normalization,
      "segment_ids": batch.get("decoder_segment_ids"),
      "num_real_tokens": self.student.num_real_tokens,
    }

  def with_samples(
    self,
    params: Any,
    encoded: types.PyTree,
    batch: types.Batch,
    inputs: types.StepInputs,
    teacher_params: Any = None,
  ) -> tuple[dict[str, jax.Array], types.Metrics]:
    """Returns the batch with outputs that the student samples, and metrics.

    Samples are data: no gradient flows through them (paper, section 3).

    Args:
      params: the student's.
      encoded: its encoded inputs.
      batch: features `[B, ...]`.
      inputs: with source "student" every row is sampled; with "mixed" a row is
        with probability λ.
      teacher_params: the teacher's, for a `draw` that mixes it in.

    Raises:
      ValueError: a packed batch.
    """
    outputs.check_unpacked(batch)
    keys = random_keys.step_keys(inputs.key)
    chosen = None
    if inputs.source == base_model.MIXED:
      chosen = self._coins(keys.coin, inputs)
    with jax.named_scope("sample"):
      tokens, weights, _ = self.draw(
        *jax.lax.stop_gradient((params, encoded)),
        batch,
        keys.sample,
        row_ids=inputs.row_ids,
        chosen=chosen,
        step=inputs.step,
        teacher_params=teacher_params,
      )
    # A row of padding alone (the last batch of a dataset) has no input.
    present = self.student.has_inputs(batch)
    weights = weights * present[:, None]
    used = present if chosen is None else present & chosen
    eos_id = self.student.special_tokens.eos_id
    ended = outputs.has_eos(tokens, weights, eos_id)
    metrics = _sample_metrics(weights, ended, used, present)
    new = self.student.output_features(batch, tokens * used[:, None], weights)
    if chosen is not None:
      old = {**batch, "decoder_loss_weights": self.student.loss_weights(batch)}
      new = {k: jnp.where(chosen[:, None], v, old[k]) for k, v in new.items()}
      new[types.FROM_DATA] = ~chosen
    return dict(batch) | new, metrics

  def _coins(self, key, inputs):
    """Returns which rows are sampled, `[B]` bool, by a coin of each row's own."""
    keys = sampling.row_keys(key, inputs.row_ids)
    coins = jax.vmap(jax.random.uniform)(keys)
    return coins < schedules.as_schedule(self.student_data_fraction)(
      inputs.step
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
    """Samples an output for each row, as training does.

    Args:
      params: the student's.
      encoded: its encoded inputs.
      batch: features `[B, ...]`; outputs in them are not read.
      key: random key.
      row_ids: `[B]`, see `decoding.sample`.
      chosen: `[B]` bool, rows that need a sample; None for all.
      step: `[]`, for schedules.
      teacher_params: not read here; a subclass may mix the teacher in.

    Returns:
      Tokens `[B, T]` int32 from the output's first on, zeros after its end; their
      weights `[B, T]` float32, 1 up to EOS or the row's end; and their log-probs
      `[B, T]` float32, nats, see `decoding.SampleResult`.
    """
    del teacher_params
    model, slots = self.student, self.decode_slots
    decode_step, cache, rows = model.start_decoding(
      params, encoded, batch, slots=slots
    )
    return outputs.draw(
      decode_step,
      cache,
      key,
      batch,
      eos_id=model.special_tokens.eos_id,
      row_ids=row_ids,
      active=chosen,
      slots=slots,
      **rows,
      **self.sampling_at(step),
    )

  def sampling_at(self, step: int | jax.Array) -> dict[str, Any]:
    """Returns the options of `decoding.sample` at a step, `[]`."""
    temperature = schedules.at(self.sampling["temperature"], step)
    return self.sampling | {"temperature": temperature}

  def sample_batch(
    self, params: Any, batch: types.Batch, key: jax.Array
  ) -> jax.Array:
    """Samples an output for each row, int32 `[B, T]`, as at step 0 of training.

    Args:
      params: the student's.
      batch: T5X's features, `[B, ...]`; T is the length of the targets.
      key: random key.
    """
    return self.draw(params, self.student.encode(params, batch), batch, key)[0]


def _sample_metrics(weights, ended, used, present):
  """Returns metrics of samples as (sum, weight); `used` and `present` are `[B]` bool."""
  rows = used.astype(jnp.float32)
  number = jnp.sum(rows)
  return {
    "sampled_length": (jnp.sum(jnp.sum(weights, axis=1) * rows), number),
    "sampled_eos": (jnp.sum(ended * rows), number),
    "on_policy_share": (number, jnp.sum(present.astype(jnp.float32))),
  }
