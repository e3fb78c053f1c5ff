"""Checks of `gkd.GKDModel`'s settings, each in one sentence."""

from typing import Any

from gkd_jax.models import length_buckets


def check(model: Any) -> None:
  """Raises a ValueError for a setting that is out of range.

  Args:
    model: `gkd.GKDModel` with its attributes set.
  """
  _check_pair(model)
  _check_rest(model)
  length_buckets.check(model.output_buckets, "OUTPUT_BUCKETS")


def _check_pair(model):
  kinds = (
    model.teacher.FEATURE_CONVERTER_CLS,
    model.student.FEATURE_CONVERTER_CLS,
  )
  if kinds[0] != kinds[1]:
    raise ValueError(
      "expected teacher and student that read the same features, got those of"
      f" {kinds[0]} (teacher) and {kinds[1]} (student); set STUDENT_MODEL or"
      " TEACHER_MODEL"
    )
  sizes = model.teacher.config.vocab_size, model.student.config.vocab_size
  if sizes[0] != sizes[1]:
    raise ValueError(
      "expected teacher and student with one vocabulary, got vocab_size"
      f" {sizes[0]} (teacher) and {sizes[1]} (student); set TEACHER or STUDENT"
    )
  real = model.teacher.num_real_tokens, model.student.num_real_tokens
  if real[0] != real[1]:
    raise ValueError(
      "expected teacher and student with the same num_real_tokens, got"
      f" {real[0]} (teacher) and {real[1]} (student); set NUM_REAL_TOKENS"
    )
  for name, value, setting in (
    ("λ", model.student_data_fraction, "STUDENT_DATA_FRACTION"),
    ("β", model.beta, "BETA"),
  ):
    if isinstance(value, (int, float)) and not 0 <= value <= 1:
      raise ValueError(f"expected {name} in [0, 1], got {value}; set {setting}")


def _check_rest(model):
  for name in ("teacher_temperature", "student_temperature"):
    if getattr(model, name) <= 0:
      raise ValueError(
        f"expected a {name} above 0, got {getattr(model, name)};"
        f" set {name.upper()}"
      )
  if model.sampling["temperature"] < 0:
    raise ValueError(
      "expected a sampling temperature of at least 0, got"
      f" {model.sampling['temperature']}; set SAMPLING_TEMPERATURE"
    )
  if model.student_data_granularity not in ("step", "example"):
    raise ValueError(
      "expected student_data_granularity 'step' or 'example', got"
      f" {model.student_data_granularity!r};"
      " set models.GKDModel.student_data_granularity"
    )
  if model.length_normalization not in ("sequence", "token"):
    raise ValueError(
      "expected length normalisation 'sequence' or 'token', got"
      f" {model.length_normalization!r}; set LENGTH_NORMALIZATION"
    )
  if model.loss_chunk_size is not None and model.loss_chunk_size < 0:
    raise ValueError(
      "expected a loss_chunk_size of at least 0, got"
      f" {model.loss_chunk_size}; set LOSS_CHUNK_SIZE"
    )
