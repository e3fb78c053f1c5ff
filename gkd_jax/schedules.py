"""Numbers that change with the training step.

One kind of schedule serves the learning rate, the student-data fraction λ, a
divergence's β and the temperatures. A schedule is a function of the step. With
a Python integer it computes in numpy and never touches a device, so the host
may ask it at every step. With a traced step it is part of the compiled program,
so that a new value is not a new compilation. Both agree to float32 rounding;
the end points are exact on both.

Steps are exact up to 2**24 (float32), which is 400 times the longest run of the
paper (tables A.1-A.4).
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import types


def constant(value: float) -> types.Schedule:
  """Returns the schedule that is `value` at every step.

  Its value is a numpy scalar even for a traced step, so that it stays a
  constant of the compiled program and costs no transfer.

  >>> float(constant(0.5)(1_000))
  0.5

  Args:
    value: any finite number.

  Raises:
    ValueError: if `value` is not finite.
  """
  _check_finite("value", value)

  def schedule(step):
    del step
    return np.float32(value)

  return _between(schedule, [value])


def piecewise_linear(
  points: Sequence[tuple[int, float]],
) -> types.Schedule:
  """Returns straight lines between points, and constants outside them.

  >>> learning_rate = piecewise_linear(((0, 0.0), (10, 1.0), (20, 0.0)))
  >>> [float(learning_rate(step)) for step in (0, 5, 10, 15, 20, 99)]
  [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]

  Args:
    points: `((step, value), ...)`, at least one, steps strictly rising.

  Returns:
    A schedule that has exactly the given value at each given step, the first
    value before the first step and the last value after the last step.

  Raises:
    ValueError: if there is no point, if a point is no pair, if steps do not
      rise, or if a number is not finite.
  """
  if not points or any(len(point) != 2 for point in points):
    raise ValueError(
      f"expected points ((step, value), ...), got {points}; set points"
    )
  for step, value in points:
    _check_finite("a step in points", step)
    _check_finite("a value in points", value)
  steps, values = np.asarray(points, np.float32).T
  last = len(points) - 1
  if np.any(np.diff(steps) <= 0):
    raise ValueError(
      "expected steps that rise strictly, got "
      f"{[step for step, _ in points]}; set points"
    )

  if len(points) == 1:
    return constant(points[0][1])

  def schedule(step):
    # Not interp: neither numpy's nor jax's is exact at the last point.
    xp = jnp if isinstance(step, jax.Array) else np
    step = xp.asarray(step, xp.float32)
    after = xp.clip(xp.searchsorted(steps, step, side="right"), 1, last)
    left, right = xp.take(steps, after - 1), xp.take(steps, after)
    weight = xp.clip((step - left) / (right - left), 0, 1)
    value = (1 - weight) * xp.take(values, after - 1)
    return (value + weight * xp.take(values, after)).astype(xp.float32)

  return _between(schedule, [value for _, value in points])


def linear(start: float, end: float, steps: int) -> types.Schedule:
  """Returns a straight line from `start` at step 0 to `end` at `steps`.

  Args:
    start: value at step 0 and before.
    end: value at `steps` and after.
    steps: length of the line, at least 1.

  Raises:
    ValueError: if `steps` is below 1 or a value is not finite.
  """
  _check_steps(steps)
  return piecewise_linear(((0, start), (steps, end)))


def cosine(start: float, end: float, steps: int) -> types.Schedule:
  """Returns half a cosine wave from `start` at step 0 to `end` at `steps`.

  The value is w start + (1 - w) end with w = (1 + cos(π step / steps)) / 2.

  Args:
    start: value at step 0 and before.
    end: value at `steps` and after.
    steps: length of the half wave, at least 1.

  Raises:
    ValueError: if `steps` is below 1 or a value is not finite.
  """
  _check_steps(steps)
  _check_finite("start", start)
  _check_finite("end", end)

  def schedule(step):
    xp = jnp if isinstance(step, jax.Array) else np
    fraction = xp.clip(xp.asarray(step, xp.float32) / np.float32(steps), 0, 1)
    weight = (1 + xp.cos(np.float32(np.pi) * fraction)) / 2
    # The cosine of an accelerator is not exactly -1 at the float32 next to π.
    weight = xp.where(fraction < 1, weight, xp.float32(0))
    return (weight * np.float32(start) + (1 - weight) * np.float32(end)).astype(
      xp.float32
    )

  return _between(schedule, [start, end])


def warmup_cooldown(
  peak: float, warmup_steps: int, cooldown_start: int, total_steps: int
) -> types.Schedule:
  """Returns the paper's learning rate: up from 0, level, down to 0.

  XSum's, for example (paper table A.1), is
  `warmup_cooldown(3e-4, 2_000, 30_000, 40_000)`.

  Args:
    peak: value of the level part.
    warmup_steps: steps of the line from 0 to `peak`; 0 starts at `peak`.
    cooldown_start: step at which the line down to 0 begins; `total_steps`
      itself means no cooldown.
    total_steps: step at which 0 is reached.

  Raises:
    ValueError: if not 0 <= warmup_steps <= cooldown_start <= total_steps.
  """
  if not 0 <= warmup_steps <= cooldown_start <= total_steps:
    raise ValueError(
      "expected 0 <= warmup_steps <= cooldown_start <= total_steps, got "
      f"{warmup_steps}, {cooldown_start}, {total_steps}; set them"
    )
  points = {cooldown_start: peak, warmup_steps: peak}
  if warmup_steps > 0:
    points[0] = 0.0
  if cooldown_start < total_steps:
    points[total_steps] = 0.0
  return piecewise_linear(sorted(points.items()))


def as_schedule(value: float | types.Schedule) -> types.Schedule:
  """Returns `value` if it is a schedule, else the constant schedule of it.

  Raises:
    ValueError: if `value` is neither a number nor callable.
  """
  if callable(value):
    return value
  return constant(value)


def at(value: float | types.Schedule, step: int | jax.Array) -> Any:
  """Returns a schedule's value at `step`, and a number as it is."""
  return value(step) if callable(value) else value


def host_value(schedule: float | types.Schedule, step: int) -> float:
  """Returns the value at `step` as a Python float.

  For this module's schedules that is numpy alone, without a device.

  Args:
    schedule: a schedule, or a number.
    step: updates made so far, a Python or numpy integer.

  Raises:
    ValueError: if `schedule` is neither a number nor callable.
  """
  return float(as_schedule(schedule)(step))


def _between(schedule, values):
  """Returns the schedule, which says its smallest and its largest value."""
  schedule.ends = min(values), max(values)
  return schedule


def _check_finite(name, value):
  if not isinstance(value, numbers.Real) or not math.isfinite(value):
    raise ValueError(
      f"expected a finite number for {name}, got {value!r}; set {name}"
    )


def _check_steps(steps):
  _check_finite("steps", steps)
  if steps < 1:
    raise ValueError(f"expected steps of at least 1, got {steps}; set steps")
