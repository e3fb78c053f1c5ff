"""Adafactor and AdamW from optax, with a learning rate by training step."""

import dataclasses

import jax.numpy as jnp
import optax

from gkd_jax import checks, schedules, types


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """A learning-rate schedule and the transformation that it multiplies.

  The training step applies the rate, by the state's step and not by a count of
  optax's own, so that a skipped update does not shift the schedule.

  Attributes:
    learning_rate: step -> rate.
    transform: optax transformation with learning rate 1.
  """

  learning_rate: types.Schedule
  transform: optax.GradientTransformation


def adafactor(
  learning_rate: float | types.Schedule,
  *,
  decay_rate: float = 0.8,
  step_offset: int = 0,
  multiply_by_parameter_scale: bool = True,
  clipping_threshold: float | None = 1.0,
  min_dim_size_to_factor: int = 128,
  beta1: float | None = None,
  max_grad_norm: float | None = None,
) -> Optimizer:
  """Returns Adafactor (Shazeer and Stern 2018) with T5X's settings as defaults.

  Args:
    learning_rate: relative to each parameter's scale, unless
      `multiply_by_parameter_scale` is off.
    decay_rate: exponent of the second moment's decay, 1 - step^-decay_rate.
    step_offset: step of this run that the decay counts from; before it the
      second moment is that of the step's gradient alone.
    multiply_by_parameter_scale: multiply updates by the parameter's RMS.
    clipping_threshold: largest RMS of an update, None for no clipping.
    min_dim_size_to_factor: smaller matrices keep the whole second moment.
    beta1: momentum, None for none.
    max_grad_norm: clip the gradient's global norm first, None for no clipping.
  """
  transform = optax.adafactor(
    1.0,
    min_dim_size_to_factor=min_dim_size_to_factor,
    decay_rate=decay_rate,
    multiply_by_parameter_scale=multiply_by_parameter_scale,
    clipping_threshold=clipping_threshold,
    momentum=beta1,
  )
  transform = _decaying_from(step_offset, transform)
  return _optimizer(learning_rate, transform, max_grad_norm)


def _decaying_from(offset, transform):
  """Returns Adafactor whose decay counts from a later step; optax's is NaN before."""
  if not offset:
    return transform

  def update(updates, state, params=None):
    first, *rest = state
    count = first.count
    shifted = first._replace(count=jnp.maximum(count - offset, 0))
    updates, (first, *rest) = transform.update(
      updates, (shifted, *rest), params
    )
    return updates, (first._replace(count=count + 1), *rest)

  return optax.GradientTransformation(transform.init, update)


def adamw(
  learning_rate: float | types.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  max_grad_norm: float | None = None,
) -> Optimizer:
  """Returns AdamW (Loshchilov and Hutter 2019).

  Args:
    learning_rate: absolute.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: times learning rate and parameter, taken off at each step.
    max_grad_norm: clip the gradient's global norm first, None for no clipping.
  """
  transform = optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
  return _optimizer(learning_rate, transform, max_grad_norm)


def _optimizer(learning_rate, transform, max_grad_norm):
  checks.number(learning_rate, "LEARNING_RATE", least=0, schedule=True)
  checks.number(max_grad_norm, "max_grad_norm", above=0, none=True)
  if max_grad_norm is not None:
    transform = optax.chain(optax.clip_by_global_norm(max_grad_norm), transform)
  return Optimizer(schedules.as_schedule(learning_rate), transform)
