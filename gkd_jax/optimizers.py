"""Adafactor and AdamW from optax, with a learning rate by training step."""

import dataclasses
from typing import Any

import jax
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
    transform: optax transformation with learning rate 1. One that keeps a mean
      of updates, and not of gradients, takes the rate as `learning_rate`.
    takes_rate: whether it does.
  """

  learning_rate: types.Schedule
  transform: optax.GradientTransformation
  takes_rate: bool = False

  def update(
    self, grads: Any, opt_state: Any, params: Any, rate: jax.Array
  ) -> tuple[Any, Any]:
    """Returns what is added to the parameters, and the transformation's state.

    Args:
      grads: of the parameters.
      opt_state: of `transform`.
      params: that are updated.
      rate: `[]` float32.
    """
    transform: Any = self.transform
    if self.takes_rate:
      return transform.update(grads, opt_state, params, learning_rate=rate)
    updates, opt_state = transform.update(grads, opt_state, params)
    return _scaled(updates, rate), opt_state


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
    beta1: decay of the mean of updates (momentum), None for none.
    max_grad_norm: clip the gradient's global norm first, None for no clipping.
  """
  checks.number(beta1, "beta1", least=0, below=1, none=True)
  transform = optax.adafactor(
    1.0,
    min_dim_size_to_factor=min_dim_size_to_factor,
    decay_rate=decay_rate,
    multiply_by_parameter_scale=multiply_by_parameter_scale,
    clipping_threshold=clipping_threshold,
  )
  transform = _decaying_from(step_offset, transform)
  if beta1 is not None:
    # A mean of updates, each at the rate of its own step.
    mean = optax.ema(beta1, debias=False)
    transform = optax.chain(transform, _scale_by_rate(), mean)
  return _optimizer(
    learning_rate, transform, max_grad_norm, takes_rate=beta1 is not None
  )


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
  decay_all: bool = False,
  max_grad_norm: float | None = None,
) -> Optimizer:
  """Returns AdamW (Loshchilov and Hutter 2019).

  Args:
    learning_rate: absolute.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: times learning rate and parameter, taken off at each step.
    decay_all: norm scales, biases and relative-position biases too. By default
      only matrices decay.
    max_grad_norm: clip the gradient's global norm first, None for no clipping.
  """
  checks.number(weight_decay, "weight_decay", least=0)
  checks.boolean(decay_all, "decay_all")
  transform = optax.chain(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    _decay(weight_decay, decay_all),
    optax.scale(-1.0),
  )
  return _optimizer(learning_rate, transform, max_grad_norm)


# Last names of parameters that are no matrices, or not used as such, whatever
# their number of axes is: a scan over layers adds one.
_NO_MATRICES = ("scale", "bias", "rel_embedding")


def _decay(weight_decay, decay_all):
  """Returns optax's decoupled weight decay, of matrices or of all."""

  def decayed(path, update, param):
    name = jax.tree_util.keystr(path[-1:], simple=True) if path else ""
    if decay_all or name not in _NO_MATRICES:
      return update + weight_decay * param
    return update

  return optax.stateless(
    lambda updates, params: jax.tree_util.tree_map_with_path(
      decayed, updates, params
    )
  )


def _scale_by_rate():
  """Returns a transformation that takes the learning rate as an argument."""

  def update(updates, state, params=None, *, learning_rate, **_):
    del params
    return _scaled(updates, learning_rate), state

  init = lambda _: optax.EmptyState()
  return optax.GradientTransformationExtraArgs(init, update)


def _scaled(updates, rate):
  return jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)


def _optimizer(learning_rate, transform, max_grad_norm, takes_rate=False):
  checks.number(learning_rate, "LEARNING_RATE", least=0, schedule=True)
  checks.number(max_grad_norm, "max_grad_norm", above=0, none=True)
  if max_grad_norm is not None:
    transform = optax.chain(optax.clip_by_global_norm(max_grad_norm), transform)
  rate = schedules.as_schedule(learning_rate)
  return Optimizer(rate, transform, takes_rate)
