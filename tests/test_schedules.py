"""Schedules against worked points, on the host and in a compiled program."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkd_jax import schedules


def on_both_sides(schedule, step):
  """The value at `step` on the host, having checked the compiled one."""
  host = schedule(step)
  compiled = jax.jit(schedule)(step)
  assert compiled.dtype == jnp.float32 and compiled.shape == ()
  assert host.dtype == np.float32 and np.ndim(host) == 0
  np.testing.assert_allclose(compiled, host, rtol=2e-6, atol=1e-9)
  return float(host)


@pytest.mark.parametrize(
  ("schedule", "points"),
  [
    (schedules.constant(0.25), {0: 0.25, 10**6: 0.25}),
    (
      schedules.linear(0.2, 1.0, 40),
      {0: 0.2, 10: 0.4, 20: 0.6, 39: 0.98, 40: 1.0, 41: 1.0},
    ),
    (schedules.linear(1.0, 0.0, 1), {0: 1.0, 1: 0.0, 2: 0.0}),
    (
      schedules.cosine(0.1, 0.3, 60),
      {0: 0.1, 20: 0.15, 30: 0.2, 40: 0.25, 60: 0.3, 99: 0.3},
    ),
    (
      schedules.piecewise_linear(((10, 1.0), (20, 3.0), (40, 2.0))),
      {0: 1.0, 10: 1.0, 15: 2.0, 20: 3.0, 30: 2.5, 40: 2.0, 50: 2.0},
    ),
    (schedules.piecewise_linear([[5, 2.0]]), {0: 2.0, 5: 2.0, 9: 2.0}),
    # XSum (table A.1), WMT without cooldown (A.2), FLAN without either (A.4).
    (
      schedules.warmup_cooldown(3e-4, 2_000, 30_000, 40_000),
      {
        0: 0.0,
        1: 1.5e-7,
        1_000: 1.5e-4,
        2_000: 3e-4,
        29_999: 3e-4,
        30_000: 3e-4,
        35_000: 1.5e-4,
        40_000: 0.0,
        41_000: 0.0,
      },
    ),
    (
      schedules.warmup_cooldown(3e-4, 5_000, 100_000, 100_000),
      {0: 0.0, 2_500: 1.5e-4, 5_000: 3e-4, 100_000: 3e-4, 200_000: 3e-4},
    ),
    (
      schedules.warmup_cooldown(1e-4, 0, 50_000, 50_000),
      {0: 1e-4, 25_000: 1e-4, 50_000: 1e-4},
    ),
    # Up and at once down again.
    (
      schedules.warmup_cooldown(1.0, 10, 10, 20),
      {0: 0.0, 5: 0.5, 10: 1.0, 15: 0.5, 20: 0.0},
    ),
  ],
)
def test_schedule_goes_through_its_points(schedule, points):
  for step, value in points.items():
    np.testing.assert_allclose(
      on_both_sides(schedule, step), value, rtol=1e-6, atol=1e-9
    )


@hypothesis.settings(deadline=None, max_examples=25, derandomize=True)
@hypothesis.given(
  start=st.integers(-10_000, 10_000).map(lambda n: float(np.float32(n / 997))),
  end=st.integers(-10_000, 10_000).map(lambda n: float(np.float32(n / 997))),
  steps=st.integers(1, 2**24 - 1),
)
def test_ends_are_exact(start, end, steps):
  for kind in (schedules.linear, schedules.cosine):
    schedule = kind(start, end, steps)
    for step, value in ((0, start), (steps, end), (steps + 1, end)):
      assert float(schedule(step)) == value
      assert float(schedule(jnp.int32(step))) == value


def test_cosine_equals_optax():
  ours = schedules.cosine(0.5, 0.0, 100)
  theirs = optax.cosine_decay_schedule(0.5, 100)
  for step in (0, 1, 37, 50, 99, 100, 150):
    np.testing.assert_allclose(ours(step), theirs(step), rtol=1e-5, atol=1e-8)


def test_host_never_touches_a_device():
  kinds = (
    schedules.constant(0.5),
    schedules.linear(0.0, 1.0, 10),
    schedules.cosine(0.0, 1.0, 10),
    schedules.warmup_cooldown(1.0, 2, 8, 10),
    0.5,
  )
  for schedule in kinds:
    for step in (3, np.int64(3)):
      # Any computation in jax would make an array out of these numbers.
      with jax.transfer_guard("disallow"):
        value = schedules.host_value(schedule, step)
      assert type(value) is float and 0 < value <= 1


def test_values_of_other_libraries_are_schedules():
  schedule = optax.linear_schedule(0.0, 1.0, 10)
  assert schedules.as_schedule(schedule) is schedule
  assert schedules.host_value(schedule, 5) == 0.5
  assert schedules.host_value(schedules.as_schedule(1), 5) == 1.0


def test_changing_the_step_does_not_compile_again():
  traces = []

  @jax.jit
  def value(step):
    traces.append(step)
    return schedules.linear(0.0, 1.0, 10)(step)

  assert [float(value(step)) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
  assert len(traces) == 1


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: schedules.constant(math.inf), "got inf; set value"),
    (lambda: schedules.constant("0.5"), "got '0.5'; set value"),
    (lambda: schedules.as_schedule(None), "got None; set value"),
    (lambda: schedules.linear(0, 1, 0), "at least 1, got 0; set steps"),
    (lambda: schedules.linear(0, math.nan, 5), "got nan"),
    (lambda: schedules.cosine(0, 1, -3), "at least 1, got -3; set steps"),
    (lambda: schedules.cosine(math.nan, 1, 3), "got nan; set start"),
    (lambda: schedules.piecewise_linear(()), r"got \(\); set points"),
    (lambda: schedules.piecewise_linear(((0, 1, 2),)), "set points"),
    (
      lambda: schedules.piecewise_linear(((0, 1), (5, 2), (5, 3))),
      r"rise strictly, got \[0, 5, 5\]; set points",
    ),
    (lambda: schedules.warmup_cooldown(1, 20, 10, 30), "got 20, 10, 30"),
    (lambda: schedules.warmup_cooldown(1, -1, 10, 30), "got -1, 10, 30"),
    (lambda: schedules.warmup_cooldown(1, 5, 40, 30), "got 5, 40, 30"),
  ],
)
def test_wrong_settings_say_what_to_change(make, message):
  with pytest.raises(ValueError, match=message):
    make()
