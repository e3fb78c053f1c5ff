"""The GKD wrapper around a student and a teacher.

`EncoderDecoderModel` and `DecoderOnlyModel` are networks with T5X's methods.
`GKDModel` holds a student and a teacher, both of one kind, and adds what GKD
needs: the student's own samples, the teacher's distributions, and the divergence
between the two (Agarwal et al., arXiv 2306.13649, algorithm 1).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax import decoding, divergences, losses, schedules, types
from gkd_jax.models import base_model, gkd_settings, length_buckets


class Fixed(NamedTuple):
  """What the loss of a batch reads besides the student.

  Attributes:
    batch: features `[B, ...]`, their outputs chosen.
    decoder_key: of dropout in the student's decoder, or None.
    step: `[]`, for schedules.
    of_teacher: the teacher's parameters and encoded inputs, if there is one.
  """

  batch: types.Batch
  decoder_key: jax.Array | None
  step: jax.Array
  of_teacher: tuple[Any, Any] | None = None


class GKDModel:
  """A student, a teacher, and the divergence between them.

  The student's side keeps T5X's protocol. Parameters of the teacher are an
  argument of the loss, never part of the student's.

  Args:
    student: the model that is trained.
    teacher: the frozen model, of the student's kind.
    divergence: a name in `divergences`, "jsd" with `beta` 0 and 1 meaning
      forward and reverse KL.
    beta: of "jsd" and "normalized_jsd": a number in [0, 1] or a schedule.
    skew_alpha: of the skew KLs.
    student_data_fraction: λ in [0, 1], a number or a schedule.
    student_data_granularity: "step": one coin per batch (paper, algorithm 1).
      "example": one coin per row.
    teacher_temperature: of the teacher's softmax (paper, tables A.1-A.4).
    student_temperature: of the student's softmax in the loss.
    sampling_temperature: of the student's samples.
    sampling_top_k: 0 for none.
    sampling_top_p: 1.0 for none.
    decode_slots: the student samples so many rows at a time, see
      `decoding.sample`; None: the whole batch together.
    length_normalization: "sequence" (the paper's 1/L_y) or "token".
    loss_chunk_size: tokens of a chunk of `fused_loss`, on each device; 0 for
      `losses.distillation_loss` on whole logits; None for the former with chunks
      of 256 where a batch has more than 2^22 logits (B T V).
    output_buckets: ascending lengths; T of the decoders and of the loss is the
      first that holds the longest output of a (micro)batch, or the whole T where
      none does. The results are those of the whole T to rounding, but for dropout
      on the weights of the decoder's self-attention: its masks have the length of
      a row, and so other numbers of the same law. Each length below T is another
      branch of the compiled step. None: the whole T always.

  Raises:
    ValueError: a setting is out of range, or student and teacher do not fit.
  """

  # Whether the loss of a subclass is a function of whole logits.
  NEEDS_LOGITS = False
  # How the names of the features `[B, T]` begin.
  OF_OUTPUTS = ("decoder_",)

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
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    sampling_temperature: float = 1.0,
    sampling_top_k: int = 0,
    sampling_top_p: float = 1.0,
    decode_slots: int | None = None,
    length_normalization: str = "sequence",
    loss_chunk_size: int | None = None,
    output_buckets: Sequence[int] | None = None,
  ):
    self.student = student
    self.teacher = teacher
    self.divergence = divergence
    self.beta = beta
    self.skew_alpha = skew_alpha
    self.student_data_fraction = student_data_fraction
    self.student_data_granularity = student_data_granularity
    self.teacher_temperature = teacher_temperature
    self.student_temperature = student_temperature
    self.sampling = {
      "temperature": sampling_temperature,
      "top_k": sampling_top_k,
      "top_p": sampling_top_p,
      "suppress_ids": (decoding.PAD_ID,),
    }
    self.decode_slots = decode_slots
    self.length_normalization = length_normalization
    self.loss_chunk_size = loss_chunk_size
    self.output_buckets = tuple(output_buckets or ())
    gkd_settings.check(self)
    self._divergence_at(0)

  @property
  def config(self) -> Any:
    """The student's sizes."""
    return self.student.config

  @property
  def FEATURE_CONVERTER_CLS(self) -> Any:
    """What the batches of training are made with: the student's."""
    return self.student.FEATURE_CONVERTER_CLS

  def _divergence_at(self, step) -> types.Divergence:
    """The divergence at a step; only β may depend on it."""
    if self.divergence in ("jsd", "normalized_jsd"):
      if self.beta is None:
        raise ValueError(
          f"expected a β for the divergence {self.divergence!r}, got none;"
          " set BETA"
        )
      name = {"jsd": "generalized_jsd"}.get(self.divergence, self.divergence)
      beta = self.beta(step) if callable(self.beta) else self.beta
      return divergences.get(name, beta=beta)
    if self.beta is not None:
      raise ValueError(
        "expected no β for a divergence that has none, got BETA ="
        f" {self.beta} with {self.divergence!r}; set DIVERGENCE = 'jsd' or"
        " BETA = None"
      )
    if self.divergence in ("skew_forward_kl", "skew_reverse_kl"):
      return divergences.get(self.divergence, alpha=self.skew_alpha)
    return divergences.get(self.divergence)

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
    """The GKD loss: (loss_sum, weight_sum, metrics).

    Args:
      params: the student's; the only argument that the loss is a function of.
      teacher_params: the teacher's.
      batch: T5X's features, `[B, ...]`.
      source: whose outputs: "data", "student", or "mixed" (a coin per row).
      step: `[]`, for schedules.
      key: of this step; a row's sample depends on it and on the row alone.
      row_ids: `[B]`, place of each row in the whole batch.

    Returns:
      Sum of the divergence in nats over sequences (of its mean over tokens) or
      over tokens, the number of those, and metrics as (sum, weight).
    """
    dropout_key, sample_key, coin_key = jax.random.split(key, 3)
    encoder_key, decoder_key = base_model.dropout_keys(
      self.student.config.dropout_rate, dropout_key, row_ids
    )
    encoded = self.student.encode(params, batch, encoder_key)
    metrics = {}
    clean = encoded  # with dropout 0 the encoder runs once for both uses
    if encoder_key is not None and source != base_model.DATA:
      clean = self.student.encode(params, batch)
    if source != base_model.DATA:
      chosen = self._choose(source, step, coin_key, row_ids)
      batch, metrics = self._with_samples(
        params, clean, batch, chosen, sample_key, row_ids, teacher_params
      )
    of_teacher = teacher_params, self.teacher.encode(teacher_params, batch)
    fixed = Fixed(batch, decoder_key, step, of_teacher)
    loss, weight, aux = self._outputs_loss(params, encoded, fixed)
    return loss, weight, aux | metrics

  def _outputs_loss(self, params, encoded, fixed):
    """The loss of a batch whose outputs are chosen: (loss, weight, metrics)."""
    weights = self.student.loss_weights(fixed.batch)
    lengths = length_buckets.lengths(self.output_buckets, weights.shape[1])
    if len(lengths) == 1:
      loss, (weight, aux) = self._loss_of_length(
        *lengths, (params, encoded), fixed
      )
    else:
      loss, (weight, aux) = length_buckets.loss(
        self._loss_of_length,
        lengths,
        length_buckets.used_length(weights),
        (self.student.decoder_params(params), encoded),
        fixed,
      )
    return loss, weight, aux

  def _loss_of_length(self, length, trained, fixed):
    """See `length_buckets.LossOfLength`: the loss, and (weight, metrics)."""
    params, encoded = trained
    batch, decoder_key, step, of_teacher = fixed
    teacher_params, encoded_by_teacher = of_teacher
    batch = length_buckets.cut(batch, length, self.OF_OUTPUTS)
    chunk = self._loss_chunk(batch)
    run = self.student.decoder_hidden if chunk else self.student.decoder_logits
    outputs = run(params, encoded, batch, decoder_key)
    if chunk:
      loss, weight, aux = losses.fused_distillation_loss(
        outputs,
        self.student.output_head(params),
        self.teacher.decoder_hidden(teacher_params, encoded_by_teacher, batch),
        self.teacher.output_head(teacher_params),
        chunk_size=chunk,
        **self._loss_settings(batch, step),
      )
    else:
      teacher_logits = self.teacher.decoder_logits(
        teacher_params, encoded_by_teacher, batch
      )
      loss, weight, aux = self._loss(
        batch, jax.lax.stop_gradient(teacher_logits), outputs, step
      )
    return loss, (weight, aux)

  def _loss_chunk(self, batch):
    """Tokens of a chunk of the fused loss; 0 where logits are needed whole."""
    if self.NEEDS_LOGITS:
      return 0
    if self.loss_chunk_size is not None:
      return self.loss_chunk_size
    logits = batch["decoder_target_tokens"].size * self.config.vocab_size
    return 256 if logits > 2**22 else 0

  def _loss_settings(self, batch, step):
    return {
      "weights": self.student.loss_weights(batch),
      "divergence": self._divergence_at(step),
      "teacher_temperature": self.teacher_temperature,
      "student_temperature": self.student_temperature,
      "length_normalization": self.length_normalization,
      "segment_ids": batch.get("decoder_segment_ids"),
      "num_real_tokens": self.student.num_real_tokens,
    }

  def _loss(self, batch, teacher_logits, student_logits, step):
    """The divergence on a batch whose outputs are chosen, and its metrics."""
    return losses.distillation_loss(
      teacher_logits, student_logits, **self._loss_settings(batch, step)
    )

  def _choose(self, source, step, key, row_ids):
    """Which rows use the student's own output, `[B]` bool, or None for all."""
    if source == base_model.STUDENT:
      return None
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)
    coins = jax.vmap(jax.random.uniform)(keys)
    return coins < schedules.as_schedule(self.student_data_fraction)(step)

  def _with_samples(
    self, params, encoded, batch, chosen, key, row_ids, teacher_params=None
  ):
    """The batch with the chosen rows' outputs sampled by the student."""
    base_model.check_unpacked(batch)
    # Tokens are data: no gradient flows through sampling (paper, section 3).
    tokens, weights, _ = self._sample(
      *jax.lax.stop_gradient((params, encoded)),
      batch,
      key,
      row_ids,
      chosen,
      teacher_params,
    )
    # A row of padding alone (the last batch of a data set) has no input.
    present = self.student.has_inputs(batch)
    weights = weights * present[:, None]
    used = present if chosen is None else present & chosen
    rows = used.astype(jnp.float32)
    ended = jnp.any(tokens == base_model.EOS_ID, axis=1)
    number = jnp.sum(rows)
    metrics = {
      "sampled_length": (jnp.sum(jnp.sum(weights, axis=1) * rows), number),
      "sampled_eos": (jnp.sum(ended * rows), number),
      "on_policy_share": (number, jnp.sum(present.astype(jnp.float32))),
    }
    new = self.student.output_features(batch, tokens * used[:, None], weights)
    if chosen is not None:
      old = batch | {"decoder_loss_weights": self.student.loss_weights(batch)}
      new = {k: jnp.where(chosen[:, None], v, old[k]) for k, v in new.items()}
    return dict(batch) | new, metrics

  def _sample(
    self, params, encoded, batch, key, row_ids, chosen, teacher_params=None
  ):
    """The student's output for each chosen row, as training draws it.

    Here the teacher has no part in it; a subclass may mix it in.

    Returns:
      See `types.TransformerModel.sample_outputs`.
    """
    del teacher_params
    slots = {} if self.decode_slots is None else {"slots": self.decode_slots}
    return self.student.sample_outputs(
      params,
      encoded,
      batch,
      key,
      row_ids=row_ids,
      active=chosen,
      **self.sampling,
      **slots,
    )

  def sample_batch(
    self, params: Any, batch: types.Batch, key: jax.Array
  ) -> jax.Array:
    """The student's output for each row of a batch, int32 `[B, T]`.

    Args:
      params: the student's.
      batch: T5X's features, `[B, ...]`; T is the length of the targets.
      key: of the samples.
    """
    return self.sample_outputs(params, batch, key)[0]

  def sample_outputs(
    self, params: Any, batch: types.Batch, key: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `sample_batch`, with weights and log-probs.

    Args:
      params: the student's.
      batch: see `sample_batch`.
      key: of the samples.

    Returns:
      See `types.TransformerModel.sample_outputs`.
    """
    encoded = self.student.encode(params, batch)
    row_ids = jnp.arange(batch["decoder_target_tokens"].shape[0])
    return self._sample(params, encoded, batch, key, row_ids, None)

  # T5X's protocol, on the student.

  def get_initial_variables(self, rng, input_shapes, input_types=None):
    """See `types.TransformerModel.get_initial_variables`."""
    return self.student.get_initial_variables(rng, input_shapes, input_types)

  def loss_fn(self, params, batch, dropout_rng):
    """See `types.TransformerModel.loss_fn`: cross-entropy on the data."""
    return self.student.loss_fn(params, batch, dropout_rng)

  def eval_fn(self, params, batch):
    """See `types.TransformerModel.eval_fn`."""
    return self.student.eval_fn(params, batch)

  def predict_batch(self, params, batch, rng=None):
    """See `types.TransformerModel.predict_batch`."""
    return self.student.predict_batch(params, batch, rng)

  def predict_batch_with_aux(
    self,
    params,
    batch,
    rng=None,
    decoder_params=None,
    return_all_decodes=None,
    num_decodes=None,
  ):
    """See `types.TransformerModel.predict_batch_with_aux`."""
    return self.student.predict_batch_with_aux(
      params, batch, rng, decoder_params, return_all_decodes, num_decodes
    )

  def score_batch(self, params, batch):
    """See `types.TransformerModel.score_batch`."""
    return self.student.score_batch(params, batch)
