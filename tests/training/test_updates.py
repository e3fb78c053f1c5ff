"""What a step makes of a gradient: updates, skipped ones, weight decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_models
from flax import traverse_util

from gkd_jax import (
  optimizers,
  training,
)

_RATE = optax.linear_schedule(0.5, 0.01, 3)


class _RootModel:
  """Loss sqrt(w): at w = 0 it is finite, and its gradient is infinite."""

  def train_loss(self, params, teacher_params, batch, inputs):
    del teacher_params, batch, inputs
    loss = jnp.sqrt(params["w"])
    return loss, {"loss": (loss, jnp.ones(()))}


@pytest.mark.parametrize(
  ("bad", "loss_is_finite"), [(-1.0, False), (0.0, True)]
)
def test_a_non_finite_update_is_skipped_and_counted(bad, loss_is_finite):
  step, optimizer = toy_models.sgd_step(_RootModel(), "data")
  run = jax.jit(step)
  state = toy_models.state({"w": jnp.float32(bad)}, optimizer)
  for done in (1, 2):
    state, metrics = run(state, {}, toy_models.batch())
    assert bool(jnp.isfinite(metrics["loss"][0])) == loss_is_finite
    assert state.params["w"] == bad
    assert state.skipped == state.skipped_in_row == done == state.step
  good = state.replace(params={"w": jnp.float32(4.0)})
  state, metrics = run(good, {}, toy_models.batch())
  # 4 - 1 / (2 sqrt 4)
  assert state.params["w"] == 3.75
  assert (state.skipped, state.skipped_in_row, state.step) == (2, 0, 3)
  assert metrics["skipped_updates"][0] == 2


class _MatrixModel:
  """A product of matrices; a gradient that is no number where x is none."""

  def train_loss(self, params, teacher_params, batch, inputs):
    del teacher_params, inputs
    y = batch["x"]
    for w in params:
      y = jnp.tanh(y @ w)
    return jnp.sum(y * y), {"loss": (jnp.sum(y * y), jnp.ones(()))}


def _matrix_step(optimizer):
  step = functools.partial(
    training.train_step,
    model=_MatrixModel(),
    optimizer=optimizer,
    seed=0,
    source="data",
  )
  return jax.jit(step)


def _matrices(n, x):
  rows = {"x": x, "decoder_target_tokens": np.ones((4, 1), np.int32)}
  draw = np.random.default_rng(0).normal
  params = [jnp.asarray(draw(0, n**-0.5, (n, n)), jnp.float32) for _ in "abc"]
  return params, jax.tree.map(jnp.asarray, rows)


@pytest.mark.parametrize(
  "optimizer",
  [
    optimizers.adamw(1e-2, weight_decay=0.1, max_grad_norm=0.5),
    optimizers.adafactor(1e-2, min_dim_size_to_factor=8),
    optimizers.adafactor(1e-2),
    optimizers.Optimizer(lambda _: 1e-2, optax.sgd(1.0, momentum=0.9)),
  ],
)
def test_updates_are_those_of_optax_and_a_skip_changes_nothing(optimizer):
  params, batch = _matrices(8, np.ones((4, 8), np.float32))
  bad = batch | {"x": batch["x"].at[0, 0].set(jnp.nan)}
  step = _matrix_step(optimizer)
  loss = lambda p: _MatrixModel().train_loss(p, {}, batch, None)[0]
  state = training.create(params, optimizer.transform)
  # From the second step on moments hold something that a skip could lose.
  for features in (bad, batch, bad, batch):
    before = state
    state, _ = step(state, {}, features)
    if features is bad:
      expected = before.params, before.opt_state
      jax.tree.map(
        np.testing.assert_array_equal, (state.params, state.opt_state), expected
      )
      continue
    updates, moments = optimizer.transform.update(
      jax.grad(loss)(before.params), before.opt_state, before.params
    )
    expected = jax.tree.map(lambda p, u: p + 1e-2 * u, before.params, updates)
    for got, want in ((state.params, expected), (state.opt_state, moments)):
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        got,
        want,
      )


@pytest.mark.parametrize(
  ("ours", "theirs"),
  [
    (
      optimizers.adafactor(_RATE, min_dim_size_to_factor=8, beta1=0.9),
      optax.adafactor(_RATE, min_dim_size_to_factor=8, momentum=0.9),
    ),
    (
      optimizers.adafactor(_RATE, beta1=0.9, max_grad_norm=0.5),
      optax.chain(
        optax.clip_by_global_norm(0.5), optax.adafactor(_RATE, momentum=0.9)
      ),
    ),
    (
      optimizers.adamw(_RATE, weight_decay=0.5),
      optax.adamw(_RATE, weight_decay=0.5),
    ),
  ],
  ids=["adafactor", "clipped", "adamw"],
)
def test_a_schedule_moves_parameters_as_optax_does(ours, theirs):
  params, batch = _matrices(8, np.ones((4, 8), np.float32))
  step, state = _matrix_step(ours), training.create(params, ours.transform)
  loss = lambda p: _MatrixModel().train_loss(p, {}, batch, None)[0]
  moments, update = theirs.init(params), jax.jit(theirs.update)
  for _ in range(4):
    state, _ = step(state, {}, batch)
    updates, moments = update(jax.grad(loss)(params), moments, params)
    params = optax.apply_updates(params, updates)
  for got, want in zip(state.params, params, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_weight_decay_is_of_matrices():
  model = toy_models.model(8)
  params = toy_models.normal_params(model, 0)
  scanned = toy_models.stack_layers(params)
  zeros = functools.partial(jax.tree.map, np.zeros_like)
  for tree in (params, scanned):
    for decay_all in (False, True):
      optimizer = optimizers.adamw(1.0, weight_decay=0.25, decay_all=decay_all)
      updates, _ = optimizer.update(
        zeros(tree), optimizer.transform.init(tree), tree, 1.0
      )
      flat = traverse_util.flatten_dict(updates, sep="/")
      spared = set()
      for name, x in traverse_util.flatten_dict(tree, sep="/").items():
        if np.any(flat[name]):
          np.testing.assert_allclose(flat[name], -0.25 * x, rtol=1e-6)
        else:
          spared.add(name.rsplit("/", 2)[-2])
      expected = {
        "relpos_bias",
        "encoder_norm",
        "decoder_norm",
        "pre_attention_layer_norm",
        "pre_self_attention_layer_norm",
        "pre_cross_attention_layer_norm",
        "pre_mlp_layer_norm",
      }
      assert spared == (set() if decay_all else expected)


def _rate_at(step, value):
  return lambda now: jnp.where(now == step, value, 1e-2)


def _counted(update, state):
  """A transformation that counts its updates."""
  return optax.GradientTransformation(lambda _: state, update)


def _state_overflows(updates, state, params):
  del params
  return jax.tree.map(jnp.negative, updates), state * 1e30


NON_FINITE = {
  "rate nan": optimizers.adafactor(_rate_at(1, jnp.nan)),
  "rate inf": optimizers.adamw(_rate_at(1, jnp.inf)),
  "update": optimizers.Optimizer(
    lambda now: jnp.where(now == 1, 1e38, 1e-12), optax.sgd(1e10)
  ),
  "optimizer state": optimizers.Optimizer(
    _rate_at(1, 1e-2), _counted(_state_overflows, jnp.float32(1e5))
  ),
}


@pytest.mark.parametrize("name", NON_FINITE)
def test_what_an_update_makes_is_looked_at(name):
  """Loss and gradient are finite at all steps."""
  optimizer = NON_FINITE[name]
  params, batch = _matrices(8, np.ones((4, 8), np.float32))
  step = _matrix_step(optimizer)
  states = [training.create(params, optimizer.transform)]
  for _ in range(3):
    state, metrics = step(states[-1], {}, batch)
    assert np.isfinite(metrics["loss"][0])
    assert np.isfinite(metrics["gradient_norm"][0])
    states.append(state)
  expected = [0, 1, 2] if name == "optimizer state" else [0, 1, 1]
  assert [int(state.skipped) for state in states[1:]] == expected
  jax.tree.map(
    np.testing.assert_array_equal,
    (states[2].params, states[2].opt_state),
    (states[1].params, states[1].opt_state),
  )
  for leaf in jax.tree.leaves(states[-1]):
    assert np.all(np.isfinite(leaf))
  moved = lambda a, b: not np.array_equal(a.params[0], b.params[0])
  assert moved(states[1], states[0])
  assert moved(states[3], states[2]) == (name != "optimizer state")


def test_adafactors_decay_waits_for_its_offset():
  """By hand: up to step `step_offset` the second moment is the gradient's own."""
  optimizer = optimizers.adafactor(
    1.0,
    step_offset=2,
    multiply_by_parameter_scale=False,
    clipping_threshold=None,
  )
  gradients = np.array([3.0, -2.0, 5.0, 4.0, -1.0])
  state = optimizer.transform.init(jnp.zeros(1))
  second = 0.0
  for step, g in enumerate(gradients):
    decay = 1 - (max(step - 2, 0) + 1) ** -0.8
    second = decay * second + (1 - decay) * g**2
    updates, state = optimizer.transform.update(
      jnp.float32([g]), state, jnp.zeros(1)
    )
    np.testing.assert_allclose(updates, [-g / np.sqrt(second)], rtol=1e-5)
