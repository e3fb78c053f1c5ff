"""What all distilled students share: the divergence, its settings, T5X's protocol."""

import copy
from collections.abc import Sequence
from typing import Any

import jax

from gkd_jax import checks, divergences, losses, schedules, types
from gkd_jax.models import base_model, length_buckets


class DistillationModel:
  """A student that is trained on a divergence from a teacher.

  A subclass says where outputs come from (`train_loss`) and what is computed of
  them (`outputs_loss`). Everything else of T5X's model protocol is the student's.

  Args:
    student: the model that is trained.
    divergence: a name in `divergences`; "jsd" accepts β of 0 and 1 and means
      forward and reverse KL by them, as the paper does.
    beta: β of "jsd" and "normalized_jsd": a number in [0, 1] or a schedule.
    skew_alpha: α of the skew KLs.
    student_temperature: of the student's softmax in the loss, a number or a
      schedule.
    length_normalization: "sequence" (the paper's 1/L_y) or "token".
    output_buckets: ascending lengths; decoders and loss run at the first that
      holds the longest output of a (micro)batch, or at the full length where
      none does; see `length_buckets`. None: always at the full length.
    hard_label_weight: α in [0, 1], a number or a schedule: the loss of a row from
      the data, never of a sample, is (1-α) divergence + α cross-entropy.

  Raises:
    ValueError: a setting is out of range.
  """

  teacher: Any = None
  needs_rewards = False
  """Whether `roll_out` samples the outputs and a reward judges them before a step."""

  features_have_known_shapes = True
  """Whether TASK_FEATURE_LENGTHS says the shapes of all features of a batch."""

  def __init__(
    self,
    student: types.TransformerModel,
    divergence: str = "forward_kl",
    *,
    beta: float | types.Schedule | None = None,
    skew_alpha: float = 0.1,
    student_temperature: float | types.Schedule = 1.0,
    length_normalization: str = "sequence",
    output_buckets: Sequence[int] | None = None,
    hard_label_weight: float | types.Schedule = 0.0,
  ):
    self.student = student
    self.divergence = divergence
    self.beta = beta
    self.skew_alpha = skew_alpha
    self.student_temperature = student_temperature
    self.length_normalization = length_normalization
    self.hard_label_weight = hard_label_weight
    check_model(student, "STUDENT_MODEL")
    checks.one_of(divergence, "DIVERGENCE", divergences.names())
    self._schedules: dict[str, tuple[types.Schedule, dict[str, Any]]] = {}
    self.check_number(beta, "BETA", least=0, most=1, none=True, what="β")
    self.check_number(
      student_temperature,
      "STUDENT_TEMPERATURE",
      above=0,
      what="a student_temperature",
    )
    checks.one_of(
      length_normalization, "LENGTH_NORMALIZATION", ("sequence", "token")
    )
    self.check_number(
      hard_label_weight, "HARD_LABEL_WEIGHT", least=0, most=1, what="α"
    )
    self.divergence_at(0)
    self._output_buckets = output_buckets
    checks.ascending(output_buckets, "OUTPUT_BUCKETS")
    self._cut_to_buckets()

  def _cut_to_buckets(self):
    if self._output_buckets is not None:
      whole = type(self).outputs_loss.__get__(self)
      self.outputs_loss = length_buckets.bucketed(
        whole, self._output_buckets, self.student
      )

  def with_special_tokens(self, special_tokens: types.SpecialTokens) -> Any:
    """Returns this model, of a student and a teacher with these special tokens."""
    student = self.student.with_special_tokens(special_tokens)
    teacher = self.teacher
    if teacher is not None:
      teacher = teacher.with_special_tokens(special_tokens)
    if student is self.student and teacher is self.teacher:
      return self
    model = copy.copy(self)
    model.student, model.teacher = student, teacher
    model._cut_to_buckets()
    return model

  def check_number(self, value: Any, setting: str, **limits: Any) -> None:
    """Checks a number as `checks.number`, and a schedule before every step too."""
    checks.number(value, setting, schedule=True, **limits)
    if callable(value):
      self._schedules[setting] = value, limits
      self._check_schedules(0)

  def _check_schedules(self, step):
    for setting, (schedule, limits) in self._schedules.items():
      try:
        value = schedules.host_value(schedule, step)
      except TypeError as error:
        raise ValueError(
          "expected a function of the step, such as @schedules.linear() with its"
          f" parentheses, got {schedule!r} ({error}); set {setting}"
        ) from error
      checks.number(value, setting, where=f" at step {step}", **limits)

  @property
  def config(self) -> Any:
    """The student's sizes."""
    return self.student.config

  @property
  def FEATURE_CONVERTER_CLS(self) -> Any:
    """The seqio feature converter of training batches: the student's."""
    return self.student.FEATURE_CONVERTER_CLS

  @property
  def sources(self) -> tuple[str, ...]:
    """Every source of outputs that a step of the run can have."""
    return (base_model.DATA,)

  def source_of_step(self, seed: int, step: int) -> str:
    """Returns whose outputs a step trains on: "data", "student" or "mixed".

    Called on the host before each step, it also checks the schedules' values.

    Args:
      seed: of the run.
      step: batches used so far.

    Raises:
      ValueError: a schedule left its range.
    """
    del seed
    self._check_schedules(step)
    return base_model.DATA

  def divergence_at(self, step: int | jax.Array) -> types.Divergence:
    """Returns the divergence at a step, on which β may depend.

    Args:
      step: `[]`.

    Raises:
      ValueError: a β is missing, or given to a divergence without one.
    """
    parameters = divergences.parameters(self.divergence)
    if "beta" in parameters:
      if self.beta is None:
        raise ValueError(
          f"expected a β for the divergence {self.divergence!r}, got none;"
          " set BETA"
        )
      name = {"jsd": "generalized_jsd"}.get(self.divergence, self.divergence)
      return divergences.get(name, beta=schedules.at(self.beta, step))
    if self.beta is not None:
      raise ValueError(
        "expected no β for a divergence that has none, got BETA ="
        f" {self.beta} with {self.divergence!r}; set DIVERGENCE = 'jsd' or"
        " BETA = None"
      )
    if "alpha" in parameters:
      return divergences.get(self.divergence, alpha=self.skew_alpha)
    return divergences.get(self.divergence)

  def hard_labels(
    self, batch: types.Batch, step: int | jax.Array
  ) -> losses.HardLabels | None:
    """Returns the hard labels of a batch's rows from the data, if there are any.

    Args:
      batch: features; `types.FROM_DATA` says which rows are from the data, and
        without it none is.
      step: `[]`, for a schedule.
    """
    if not self.hard_label_weight or types.FROM_DATA not in batch:
      return None
    share = schedules.at(self.hard_label_weight, step)
    return losses.HardLabels(
      batch["decoder_target_tokens"], share * batch[types.FROM_DATA][:, None]
    )

  def train_loss(
    self,
    params: Any,
    teacher_params: Any,
    batch: types.Batch,
    inputs: types.StepInputs,
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns the loss of a training step and its metrics.

    Args:
      params: the student's; the loss is differentiated by them alone.
      teacher_params: the teacher's, or an empty dict.
      batch: T5X's features, `[B, ...]`.
      inputs: source of the outputs, step, key and row ids.

    Returns:
      The sum in nats over sequences (of each one's mean over tokens) or over
      tokens, and metrics as (sum, weight). `metrics["loss"]` is that sum and
      the number of sequences or tokens.
    """
    raise NotImplementedError

  def outputs_loss(
    self,
    student: types.Encoded,
    teacher: types.Encoded | None,
    batch: types.Batch,
    step: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns the loss of the outputs that a batch holds, as `train_loss`.

    Args:
      student: the student's parameters and encoded inputs.
      teacher: the teacher's, or None where there is none in memory.
      batch: features, outputs included.
      step: `[]`, for schedules.
      dropout_key: of the student's decoder; None for no dropout.
    """
    raise NotImplementedError

  # T5X's protocol, on the student.

  def get_initial_variables(self, rng, input_shapes, input_types=None):
    """See `types.TransformerModel.get_initial_variables`."""
    return self.student.get_initial_variables(rng, input_shapes, input_types)

  def loss_fn(self, params, batch, dropout_rng):
    """Returns the cross-entropy on the data, as `BaseTransformerModel`."""
    return self.student.loss_fn(params, batch, dropout_rng)

  def eval_fn(self, params, batch):
    """See `BaseTransformerModel.eval_fn`."""
    return self.student.eval_fn(params, batch)

  def predict_batch(self, params, batch, rng=None):
    """See `BaseTransformerModel.predict_batch`."""
    return self.student.predict_batch(params, batch, rng)

  def predict_batch_with_aux(self, params, batch, rng=None, **options):
    """See `BaseTransformerModel.predict_batch_with_aux`."""
    return self.student.predict_batch_with_aux(params, batch, rng, **options)

  def score_batch(self, params, batch):
    """See `BaseTransformerModel.score_batch`."""
    return self.student.score_batch(params, batch)


def check_model(model: Any, setting: str) -> None:
  """Raises a ValueError for what is no model."""
  if not hasattr(model, "FEATURE_CONVERTER_CLS"):
    checks.refuse(
      "a model such as @student/models.EncoderDecoderModel()", model, setting
    )


def check_pair(
  teacher: types.TransformerModel, student: types.TransformerModel
) -> None:
  """Raises a ValueError unless teacher and student fit each other."""
  check_model(teacher, "TEACHER_MODEL")
  kinds = teacher.FEATURE_CONVERTER_CLS, student.FEATURE_CONVERTER_CLS
  if kinds[0] != kinds[1]:
    raise ValueError(
      "expected teacher and student that read the same features, got those of"
      f" {kinds[0]} (teacher) and {kinds[1]} (student); set STUDENT_MODEL or"
      " TEACHER_MODEL"
    )
  special = teacher.special_tokens, student.special_tokens
  if special[0] != special[1]:
    raise ValueError(
      "expected teacher and student with the same special tokens, got"
      f" {special[0]} (teacher) and {special[1]} (student); set special_tokens"
    )
  real = teacher.num_real_tokens, student.num_real_tokens
  if real[0] != real[1]:
    raise ValueError(
      "expected teacher and student with the same num_real_tokens, got"
      f" {real[0]} (teacher) and {real[1]} (student); set NUM_REAL_TOKENS"
    )
  losses.check_sizes(
    teacher.config.vocab_size, student.config.vocab_size, real[0]
  )
