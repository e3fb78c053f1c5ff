"""RL + GKD in the training step: its ends, its gradient, its bookkeeping."""

import functools

import jax
import jax.numpy as jnp
import nightly
import numpy as np
import optax
import pytest
import toy_models

from gkd_jax import losses, models, partitioning, schedules, training
from gkd_jax.decoding import sampling


def judge(inputs, outputs, examples):
  """A stand-in where the reward itself is not under test."""
  raise AssertionError("not called")


def rl(alpha, n=2, **settings):
  """The model, student's and teacher's parameters."""
  student, teacher = toy_models.model(8), toy_models.model(12)
  model = models.RLGKDModel(
    student,
    teacher,
    reward=judge,
    alpha=alpha,
    samples_per_prompt=n,
    **settings,
  )
  return model, toy_models.params(student, 1), toy_models.params(teacher, 2)


KEY = jax.random.fold_in(jax.random.key(0), 0)  # of the first step of seed 0


def judged(model, params, seed=3, **settings):
  """Outputs for the toy batch, with random rewards and their advantages."""
  batch = jax.jit(model.roll_out)(params, toy_models.batch(), KEY)
  n = model.samples_per_prompt
  r = np.random.default_rng(seed).normal(size=(8, n)).astype(np.float32)
  weights = batch["decoder_loss_weights"]
  a = losses.advantages(
    jnp.asarray(r),
    weights.reshape(8, n, -1),
    baseline="leave_one_out" if n > 1 else "none",
    **settings,
  )
  features = jax.tree.map(np.asarray, batch)
  return features | {
    "rewards": r.reshape(-1),
    "advantages": np.asarray(a).reshape(weights.shape),
  }


def gradient(model, params, teacher, batch, *, microbatches=1, run=jax.jit):
  """Gradient (the parameters' change under SGD) and metrics."""
  step, optimizer = toy_models.sgd_step(
    model, "student", num_microbatches=microbatches
  )
  state = toy_models.state(params, optimizer)
  new, metrics = run(step)(state, teacher, batch)
  return jax.tree.map(jnp.subtract, state.params, new.params), metrics


def assert_same(a, b, tolerance=1e-5):
  difference = optax.tree.norm(
    jax.tree.map(lambda x, y: np.asarray(x) - y, a, b)
  )
  assert difference <= tolerance * optax.tree.norm(b)


def test_alpha_1_is_on_policy_gkd_to_the_bit():
  model, student, teacher = rl(1.0, n=1, divergence="jsd", beta=0.9)
  plain, _, _ = toy_models.gkd(divergence="jsd", beta=0.9)
  ends = []
  for m in (model, plain):
    assert m.source_of_step(0, 0) == "student"
    step, optimizer = toy_models.sgd_step(m, "student")
    state, run = toy_models.state(student, optimizer), jax.jit(step)
    for _ in range(3):
      state, metrics = run(state, teacher, toy_models.batch())
    ends.append((state, metrics))
  assert jax.tree.structure(ends[0]) == jax.tree.structure(ends[1])
  for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
    np.testing.assert_array_equal(a, b)
  moved = jax.tree.map(jnp.subtract, student, ends[0][0].params)
  assert optax.tree.norm(moved) > 1e-3


# test_alpha_1_is_on_policy_gkd_to_the_bit draws the same outputs too.
@pytest.mark.nightly
def test_the_same_outputs_are_drawn_as_in_the_step_of_gkd():
  model, student, teacher = rl(0.5, n=1, baseline="none")
  batch = judged(model, student)
  plain, _, _ = toy_models.gkd()
  got, metrics = gradient(plain, student, teacher, batch)
  # The batch's own outputs, taken as data, and those that the step samples.
  step, optimizer = toy_models.sgd_step(plain, "data")
  new, as_data = jax.jit(step)(
    toy_models.state(student, optimizer), teacher, batch
  )
  np.testing.assert_allclose(metrics["loss"], as_data["loss"], rtol=1e-6)
  assert_same(got, jax.tree.map(jnp.subtract, student, new.params))


def test_prompts_are_encoded_once_and_outputs_are_independent():
  model, student, _ = rl(0.5, n=3)
  jaxpr = str(jax.make_jaxpr(model.roll_out)(student, toy_models.batch(), KEY))
  # Attention weights of the encoder, [B, H, S, S].
  assert jaxpr.count("f32[8,2,6,6] = dot_general") == 1
  assert jaxpr.count("f32[24,2,6,6] = dot_general") == 0
  out = jax.jit(model.roll_out)(student, toy_models.batch(), KEY)
  inputs = np.repeat(toy_models.batch()["encoder_input_tokens"], 3, axis=0)
  np.testing.assert_array_equal(out["encoder_input_tokens"], inputs)
  tokens = np.asarray(out["decoder_target_tokens"])
  assert len({row.tobytes() for row in tokens}) > 12
  alone, _ = jax.jit(
    lambda params, key: model.student.sample(
      params,
      model.student.encode(params, out),
      out,
      key,
      suppress_ids=(0,),
    )
  )(student, jax.random.split(KEY, 3)[1])
  np.testing.assert_array_equal(tokens, alone)
  np.testing.assert_array_equal(
    out["decoder_loss_weights"], sampling.sequence_weights(alone)
  )


def by_hand(model, params, teacher, batch, alpha):
  """(loss, gradient) by float64: the losses' derivative, then the network's."""
  logits = jax.jit(model.student.logits)
  z, pull = jax.vjp(lambda p: logits(p, batch), params)
  w = batch["decoder_loss_weights"].astype(np.float64)
  y = batch["decoder_target_tokens"]

  def distribution(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)

  z = np.asarray(z, np.float64)
  scaled = z / model.sampling["temperature"]
  scaled[..., 0] = -np.inf  # PAD is never drawn
  q = distribution(scaled)
  one = np.eye(toy_models.VOCAB)[y]
  with np.errstate(divide="ignore"):
    log_q = np.where(w > 0, np.log(np.sum(q * one, -1)), 0.0)
  a = batch["advantages"].astype(np.float64)
  rl_loss = -np.sum(w * a * log_q)
  rl_slope = -(w * a)[..., None] * (one - q) / model.sampling["temperature"]
  # JSD(0.9), and the closed form of its derivative, (1-β) q (log q/m - KL(q ‖ m)).
  b = 0.9
  p = distribution(
    np.asarray(jax.jit(model.teacher.logits)(teacher, batch), np.float64)
  )
  q = distribution(z)
  m = b * p + (1 - b) * q
  kl = lambda x: np.sum(x * np.log(x / m), -1, keepdims=True)
  each = (b * kl(p) + (1 - b) * kl(q))[..., 0]
  share = w / np.maximum(w.sum(1, keepdims=True), 1)
  slope = share[..., None] * (1 - b) * q * (np.log(q / m) - kl(q))
  total = (1 - alpha) * rl_loss + alpha * np.sum(share * each)
  cotangent = ((1 - alpha) * rl_slope + alpha * slope) / len(w)
  cotangent = np.where(w[..., None] > 0, cotangent, 0.0)
  return total / len(w), pull(jnp.asarray(cotangent, jnp.float32))[0]


@pytest.mark.parametrize(
  ("alpha", "temperature"),
  [pytest.param(0.0, 1.0, marks=pytest.mark.nightly), (0.3, 0.7)],
)
def test_loss_and_gradient_equal_the_formula_in_float64(alpha, temperature):
  model, student, teacher = rl(
    alpha, divergence="jsd", beta=0.9, sampling_temperature=temperature
  )
  batch = judged(model, student)
  lengths = batch["decoder_loss_weights"].sum(1)
  assert lengths.min() < 4 < lengths.max()
  got, metrics = gradient(model, student, teacher, batch)
  loss, expected = by_hand(model, student, teacher, batch, alpha)
  np.testing.assert_allclose(np.divide(*metrics["loss"]), loss, rtol=1e-5)
  assert_same(got, expected)
  assert metrics["loss"][1] == 16
  np.testing.assert_allclose(
    np.divide(*metrics["reward"]), batch["rewards"].mean(), rtol=1e-5
  )
  np.testing.assert_allclose(
    np.divide(*metrics["sampled_length"]), lengths.mean(), rtol=1e-6
  )


@pytest.mark.parametrize(
  "filters", nightly.of([{"top_k": 2}, {"top_p": 0.2}], [{"top_k": 2}])
)
def test_outputs_that_the_step_rounds_out_of_the_filters_are_trained_on(
  filters,
):
  """Outputs of another sampler stand for those that rounding rules out."""
  settings = {f"sampling_{name}": value for name, value in filters.items()}
  model, student, teacher = rl(0.3, **settings)
  batch = judged(rl(0.3)[0], student)  # drawn without filters
  got, metrics = gradient(model, student, teacher, batch)
  assert metrics["skipped_updates"][0] == 0
  assert np.isfinite(optax.tree.norm(got))
  # By hand: the support is what the filters keep, and the output's token.
  logits = jax.jit(model.student.logits)(student, batch)
  logits = np.asarray(logits, np.float64)
  logits[..., 0] = -np.inf
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  order = np.argsort(-p, axis=-1)
  ranked = np.take_along_axis(p, order, axis=-1)
  if "top_k" in filters:
    chosen = np.arange(p.shape[-1]) < filters["top_k"]
  else:
    chosen = np.cumsum(ranked, axis=-1) - ranked < filters["top_p"]
  support = np.zeros(p.shape, bool)
  np.put_along_axis(support, order, chosen & np.ones(p.shape, bool), axis=-1)
  y, w = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
  of_output = np.take_along_axis(support, y[..., None], -1)[..., 0]
  assert np.any((w > 0) & ~of_output)
  np.put_along_axis(support, y[..., None], True, axis=-1)
  picked = np.take_along_axis(p, y[..., None], -1)[..., 0]
  log_q = np.log(np.where(w > 0, picked / np.sum(p * support, axis=-1), 1.0))
  np.testing.assert_allclose(
    np.divide(*metrics["sampled_log_prob"]),
    np.sum(log_q) / np.sum(w),
    rtol=1e-5,
  )


@functools.cache
def reference():
  model, student, teacher = rl(0.3, divergence="jsd", beta=0.9)
  batch = judged(model, student)
  return (
    model,
    student,
    teacher,
    batch,
    gradient(model, student, teacher, batch),
  )


# test_trainer splits batches.
@pytest.mark.nightly
@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_change_nothing(microbatches):
  model, student, teacher, batch, (expected, expected_metrics) = reference()
  got, metrics = gradient(
    model, student, teacher, batch, microbatches=microbatches
  )
  assert_same(got, expected)
  for name, pair in expected_metrics.items():
    np.testing.assert_allclose(
      metrics[name], pair, rtol=1e-4, atol=1e-5, err_msg=name
    )


def test_the_step_samples_nothing():
  model, student, teacher, batch, _ = reference()
  step, optimizer = toy_models.sgd_step(model, "student")
  state = toy_models.state(student, optimizer)
  assert " while[" not in str(jax.make_jaxpr(step)(state, teacher, batch))


# test_trainer has meshes.
@pytest.mark.nightly
def test_a_mesh_changes_nothing():
  model, student, teacher, batch, (expected, _) = reference()
  mesh = partitioning.make_mesh(2)
  axes = partitioning.logical_axes(
    jax.eval_shape(
      lambda: model.get_initial_variables(jax.random.key(0), toy_models.SHAPES)
    )["params_axes"]
  )
  shardings = partitioning.param_shardings(student, axes, mesh)
  student = jax.tree.map(jax.device_put, student, shardings)
  # The outputs, drawn by a sharded student with rows over four devices.
  drawn = jax.jit(
    model.roll_out, out_shardings=partitioning.batch_sharding(mesh)
  )(student, partitioning.put_batch(toy_models.batch(), mesh), KEY)
  np.testing.assert_array_equal(
    drawn["decoder_target_tokens"], batch["decoder_target_tokens"]
  )
  step, optimizer = toy_models.sgd_step(model, "student")
  state = toy_models.state(student, optimizer)
  state_shardings = partitioning.state_shardings(state, shardings, mesh)
  state = jax.tree.map(jax.device_put, state, state_shardings)
  before = jax.tree.map(np.asarray, student)
  run = training.jit_step(step, mesh, state_shardings)
  new, _ = run(
    state, teacher, partitioning.put_batch(batch, mesh), source="student"
  )
  got = jax.tree.map(lambda a, b: a - np.asarray(b), before, new.params)
  assert_same(got, expected)


def test_an_output_without_a_reward_is_not_reinforced_and_is_counted():
  model, student, teacher, batch, _ = reference()
  changed = {k: batch[k].copy() for k in ("rewards", "advantages")}
  changed["rewards"][3], changed["advantages"][3] = np.nan, 0.0
  _, metrics = gradient(model, student, teacher, batch | changed)
  assert metrics["skipped_updates"][0] == 0
  assert metrics["missing_rewards"] == (1, 16)
  np.testing.assert_allclose(
    np.divide(*metrics["reward"]),
    np.delete(batch["rewards"].astype(np.float64), 3).mean(),
    rtol=1e-5,
  )


def test_outputs_that_were_cut_can_be_left_out():
  """Loss and gradient are those of the outputs that ended; metrics are of all."""
  _, student, teacher, batch, (_, all_metrics) = reference()
  y, w = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
  ended = ((y == 1) & (w > 0)).any(axis=1)
  assert 0 < ended.sum() < 16
  model = rl(0.3, divergence="jsd", beta=0.9, cut_outputs="leave_out")[0]
  got, metrics = gradient(model, student, teacher, batch)
  assert metrics["loss"][1] == ended.sum()
  only = batch | {"decoder_loss_weights": w * ended[:, None]}
  loss, expected = by_hand(model, student, teacher, only, 0.3)
  loss, expected = jax.tree.map(
    lambda x: x * (len(w) / ended.sum()), (loss, expected)
  )
  np.testing.assert_allclose(np.divide(*metrics["loss"]), loss, rtol=1e-5)
  assert_same(got, expected)
  for name in ("sampled_eos", "sampled_length", "reward"):
    np.testing.assert_allclose(metrics[name], all_metrics[name], err_msg=name)


def test_advantages_that_are_no_numbers_skip_the_update():
  model, student, teacher, batch, _ = reference()
  bad = batch["advantages"].copy()
  bad[0] = np.nan
  moved, metrics = gradient(
    model, student, teacher, batch | {"advantages": bad}
  )
  assert metrics["skipped_updates"][0] == 1
  assert optax.tree.norm(moved) == 0


def test_the_students_start_as_the_teacher():
  """RLEF*: at the start the divergence is 0, and so is its gradient."""
  student = toy_models.model(8)
  params = toy_models.params(student, 1)
  settings = {"reward": judge, "divergence": "reverse_kl"}
  both = []
  for alpha in (0.5, 0.0):
    model = models.RLGKDModel(
      student,
      toy_models.model(8),
      alpha=alpha,
      samples_per_prompt=2,
      **settings,
    )
    both.append(gradient(model, params, params, judged(model, params)))
  (half, metrics), (full, _) = both
  assert abs(metrics["divergence"][0]) < 1e-5
  assert_same(half, jax.tree.map(lambda g: 0.5 * g, full), 1e-4)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"alpha": 1.1}, "set ALPHA"),
    ({"n": 1}, "set SAMPLES_PER_PROMPT or BASELINE"),
    ({"baseline": "mean"}, "set BASELINE"),
    ({"student_data_fraction": 0.5}, "set STUDENT_DATA_FRACTION = 1.0"),
    ({"sampling_temperature": 0.0}, "set SAMPLING_TEMPERATURE"),
    ({"baseline_decay": 1.0}, "set BASELINE_DECAY"),
    ({"max_missing_rewards": 1.5}, "set MAX_MISSING_REWARDS"),
    ({"cut_outputs": "leave"}, "'leave_out' or 'keep', .*set CUT_OUTPUTS"),
    ({"cut_penalty": -1.0}, "set CUT_PENALTY"),
    ({"loss_chunk_size": 16}, "whole logits, got 16; set LOSS_CHUNK_SIZE"),
    (
      {"sampling_temperature": schedules.linear(1.0, 0.0, 9)},
      "above 0, got 0.0, which the schedule reaches; set SAMPLING_TEMPERATURE",
    ),
  ],
)
def test_wrong_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    rl(**({"alpha": 0.1} | settings))


def test_a_missing_reward_and_a_batch_that_was_not_judged():
  student, teacher = toy_models.model(8), toy_models.model(12)
  with pytest.raises(ValueError, match="set REWARD"):
    models.RLGKDModel(student, teacher)
  model, params, teacher_params = rl(0.5)
  with pytest.raises(ValueError, match="without advantages"):
    gradient(model, params, teacher_params, toy_models.batch())
  assert isinstance(model, models.GKDModel)
