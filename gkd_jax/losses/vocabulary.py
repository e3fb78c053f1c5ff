"""From logits to log-probs: soft cap, temperature, padding of the vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import types


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """Computes c tanh(x / c), or `x` itself without a cap (arXiv 2408.00118).

  >>> soft_cap(jnp.array([0.0, 1e9]), 30.0).tolist()
  [0.0, 30.0]

  Args:
    x: logits, of any shape.
    cap: c > 0, the bound of what is returned; None: there is none.
  """
  return x if cap is None else cap * jnp.tanh(x / cap)


def mask_vocab_padding(
  logits: jax.Array,
  num_real_tokens: int | None,
  *,
  fill_value: float = -1e9,
) -> jax.Array:
  """Sets the logits of vocabulary padding to a value that gives no mass.

  A mask, since a slice would move a sharded vocabulary between devices. Apply
  it after a temperature, which would scale the fill value.

  >>> x = jnp.array([1.0, 2.0, 3.0])
  >>> mask_vocab_padding(x, 2, fill_value=-jnp.inf).tolist()
  [1.0, 2.0, -inf]

  Args:
    logits: `[..., V]`.
    num_real_tokens: R; ids from R on are padding. None for R = V.
    fill_value: logit of padding; finite for divergences, -inf for sampling.

  Returns:
    Logits of the same shape and type.

  Raises:
    ValueError: R is outside of 1..V.
  """
  if num_real_tokens is None:
    return logits
  check_num_real_tokens(num_real_tokens, logits.shape[-1])
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  return jnp.where(ids < num_real_tokens, logits, fill_value)


def of_one_size(
  teacher: jax.Array | types.Int8Matrix,
  student: jax.Array,
  num_real_tokens: int | None,
) -> tuple[Any, jax.Array]:
  """Cuts vocabularies of one tokenizer that are padded to different sizes.

  Args:
    teacher: `[..., V]` logits, or a head `[D, V]`.
    student: `[..., V']`, likewise.
    num_real_tokens: R, see `mask_vocab_padding`.

  Returns:
    Both, the larger one with the smaller one's number of columns.

  Raises:
    ValueError: they differ, and R is not known or larger than one of them.
  """
  is_int8 = isinstance(teacher, types.Int8Matrix)
  columns = (teacher.values if is_int8 else teacher).shape[-1]
  sizes = columns, student.shape[-1]
  check_sizes(*sizes, num_real_tokens)
  if sizes[0] == sizes[1]:
    return teacher, student
  cut = lambda x: x[..., : min(sizes)]
  if is_int8:
    return types.Int8Matrix(*map(cut, teacher)), cut(student)
  return cut(teacher), cut(student)


def check_sizes(
  teacher_size: int, student_size: int, num_real_tokens: int | None
) -> None:
  """Raises a ValueError for two vocabularies that cannot be one.

  Args:
    teacher_size: V, padding included.
    student_size: V', likewise; another one only where R is given.
    num_real_tokens: R.
  """
  smaller = min(teacher_size, student_size)
  known = num_real_tokens is not None and num_real_tokens <= smaller
  if teacher_size != student_size and not known:
    raise ValueError(
      "expected teacher and student with one vocabulary, got vocab_size"
      f" {teacher_size} (teacher) and {student_size} (student); set the same"
      " vocab_size for TEACHER and STUDENT, or NUM_REAL_TOKENS where only their"
      " padding differs"
    )


def scaled_logits(
  logits: jax.Array,
  temperature: float | jax.Array = 1.0,
  num_real_tokens: int | None = None,
) -> jax.Array:
  """Divides logits by a temperature and masks vocabulary padding.

  Args:
    logits: `[..., V]` in any float type.
    temperature: above 0.
    num_real_tokens: see `mask_vocab_padding`.

  Returns:
    `[..., V]` float32.
  """
  logits = logits.astype(jnp.float32) / temperature
  return mask_vocab_padding(logits, num_real_tokens)


def log_probs(
  logits: jax.Array,
  temperature: float | jax.Array = 1.0,
  num_real_tokens: int | None = None,
) -> jax.Array:
  """Computes a model's next-token log-probs.

  >>> logits = jnp.log(jnp.array([1.0, 3.0, 4.0]))
  >>> jnp.exp(log_probs(logits, num_real_tokens=2)).round(2).tolist()
  [0.25, 0.75, 0.0]

  Args:
    logits: `[..., V]` in any float type.
    temperature: divides the logits; above 0.
    num_real_tokens: see `mask_vocab_padding`.

  Returns:
    `[..., V]` nats, float32; -1e9 or below at vocabulary padding.
  """
  return jax.nn.log_softmax(scaled_logits(logits, temperature, num_real_tokens))


def target_log_probs(
  log_probs: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
  """Picks the log-probs of the target tokens.

  Args:
    log_probs: `[B, T, V]` nats.
    targets: `[B, T]` int32.
    weights: `[B, T]`.

  Returns:
    `[B, T]` nats; 0 where the weight is 0, as PAD may have a log-prob of -inf.
  """
  picked = jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)
  return jnp.where(weights > 0, picked[:, :, 0], 0.0)


def check_num_real_tokens(number: int | None, vocab_size: int) -> None:
  """Raises ValueError unless the number is None or within 1..V."""
  if number is not None and not 1 <= number <= vocab_size:
    raise ValueError(
      f"expected num_real_tokens within 1..{vocab_size}, the vocab_size, got"
      f" {number}; set NUM_REAL_TOKENS"
    )


def check_temperatures(
  teacher_temperature: float | jax.Array,
  student_temperature: float | jax.Array,
) -> None:
  """Raises ValueError if a temperature is known when tracing and not above 0."""
  for name, value in (
    ("teacher_temperature", teacher_temperature),
    ("student_temperature", student_temperature),
  ):
    if not isinstance(value, jax.core.Tracer) and not value > 0:
      raise ValueError(
        f"expected a {name} above 0, got {value}; set {name.upper()}"
      )
