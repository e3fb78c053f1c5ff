"""The GKD step: sources, gradients, microbatches, meshes, skipped updates."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import loss_batches
import nightly
import numpy as np
import optax
import pytest
import toy_models
import toy_steps
from flax import traverse_util

from gkd_jax import (
  models,
  network,
  optimizers,
  partitioning,
  schedules,
  training,
)
from gkd_jax import types as types_
from gkd_jax.decoding import sampling
from gkd_jax.models import base_model

SOURCES = ("data", "student", "mixed")


@pytest.mark.parametrize(
  ("source", "microbatches", "normalization"),
  nightly.besides(
    [
      ("data", 2, "sequence"),
      ("mixed", 4, "sequence"),
      ("student", 2, "token"),
    ],
    SOURCES,
    [2, 4],
    ["sequence", "token"],
  ),
)
def test_microbatches_change_nothing(source, microbatches, normalization):
  expected, metrics = toy_steps.reference(source, normalization)
  got, got_metrics = toy_steps.gradient(
    source, microbatches=microbatches, length_normalization=normalization
  )
  toy_steps.assert_same(got, expected)
  for name, pair in metrics.items():
    np.testing.assert_allclose(
      got_metrics[name], pair, rtol=1e-4, atol=1e-6, err_msg=name
    )


@pytest.mark.parametrize(
  ("source", "partitions", "over_data"),
  nightly.besides(
    [
      ("data", 1, True),
      ("student", 2, False),
      ("student", 4, True),
    ],
    ["data", "student"],
    [1, 2, 4],
    [False, True],
  ),
)
def test_meshes_change_nothing(source, partitions, over_data):
  mesh = partitioning.make_mesh(partitions)
  model, student, teacher = toy_models.gkd(divergence="jsd", beta=0.5)
  rules = (
    partitioning.FULLY_SHARDED_RULES
    if over_data
    else partitioning.STANDARD_RULES
  )

  def place(a_model, tree):
    axes = partitioning.logical_axes(
      jax.eval_shape(
        lambda: a_model.get_initial_variables(
          jax.random.key(0), toy_models.SHAPES
        )
      )["params_axes"]
    )
    shardings = partitioning.param_shardings(tree, axes, mesh, rules)
    return jax.tree.map(jax.device_put, tree, shardings), shardings

  student, shardings = place(model.student, student)
  teacher, _ = place(model.teacher, teacher)
  step, optimizer = toy_models.sgd_step(model, source)
  state = toy_models.state(student, optimizer)
  before = jax.tree.map(np.asarray, student)
  state_shardings = partitioning.state_shardings(state, shardings, mesh)
  state = jax.tree.map(jax.device_put, state, state_shardings)
  run = training.jit_step(step, mesh, state_shardings)
  new, _ = run(
    state,
    teacher,
    partitioning.put_batch(toy_models.batch(), mesh),
    source=source,
  )
  if partitions > 1:
    kernel = new.params["decoder"]["logits_dense"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == 16 // partitions
  got = jax.tree.map(lambda a, b: a - np.asarray(b), before, new.params)
  toy_steps.assert_same(got, toy_steps.reference(source, "sequence")[0])


@pytest.mark.parametrize(
  ("source", "microbatches"),
  nightly.besides([("student", 1), ("data", 2)], ["data", "student"], [1, 2]),
)
def test_pmap_changes_nothing(source, microbatches):
  model, student, teacher = toy_models.gkd(divergence="jsd", beta=0.5)
  step, optimizer = toy_models.sgd_step(
    model, source, axis_name="data", num_microbatches=microbatches
  )
  state = toy_models.state(student, optimizer)
  run = training.pmap_step(step, jax.devices()[:4])
  new, metrics = run(state, teacher, toy_models.batch(), source=source)
  got = jax.tree.map(jnp.subtract, state.params, new.params)
  expected, expected_metrics = toy_steps.reference(source, "sequence")
  toy_steps.assert_same(got, expected)
  np.testing.assert_allclose(
    metrics["loss"], expected_metrics["loss"], rtol=1e-5
  )


def test_on_policy_gradient_is_the_supervised_one_on_the_same_tokens():
  model, student, teacher = toy_models.gkd()
  batch = toy_models.batch()
  key = jax.random.key(5)
  loss = lambda p, b, source: model.train_loss(
    p, teacher, b, toy_models.inputs(source, key=key)
  )[0]
  on_policy = jax.jit(jax.grad(loss), static_argnums=2)(
    student, batch, "student"
  )
  tokens, _ = toy_models.sample(
    model.student,
    student,
    batch,
    jax.random.split(key, 3)[1],
    suppress_ids=(0,),
  )
  lengths = np.asarray(sampling.sequence_weights(tokens)).sum(1)
  assert lengths.min() < 4 < lengths.max()
  as_data = batch | {
    "decoder_target_tokens": tokens,
    "decoder_input_tokens": sampling.shift_right(tokens),
    "decoder_loss_weights": sampling.sequence_weights(tokens),
  }
  supervised = jax.jit(jax.grad(loss), static_argnums=2)(
    student, as_data, "data"
  )
  toy_steps.assert_same(on_policy, supervised)


def test_eos_is_trained_on_and_nothing_after_it():
  model, student, teacher = toy_models.gkd(length_normalization="token")
  batch = toy_models.batch()
  _, metrics = toy_models.train_loss(model, student, teacher, batch, "data")
  weight = metrics["loss"][1]
  ends = np.argmax(batch["decoder_target_tokens"] == 1, axis=1)
  assert weight == np.sum(ends + 1)


def test_loss_equals_the_formula_in_float64():
  model, student, teacher = toy_models.gkd(teacher_temperature=0.5)
  batch = toy_models.batch()
  total, metrics = toy_models.train_loss(model, student, teacher, batch, "data")
  weight = metrics["loss"][1]
  logs = []
  for m, p, t in ((model.teacher, teacher, 0.5), (model.student, student, 1.0)):
    z = np.asarray(jax.jit(m.logits)(p, batch), np.float64) / t
    logs.append(z - np.logaddexp.reduce(z, axis=-1, keepdims=True))
  kl = np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)
  w = batch["decoder_loss_weights"]
  expected = np.mean(np.sum(kl * w, 1) / np.sum(w, 1))
  np.testing.assert_allclose(total / weight, expected, rtol=1e-5)


def test_mixed_rows_use_their_own_source():
  model, student, _teacher = toy_models.gkd(student_data_fraction=0.5)
  batch = toy_models.batch()
  inputs = toy_models.inputs("mixed", key=jax.random.key(1))
  _, sample_key, coin_key = jax.random.split(inputs.key, 3)
  coins = [
    jax.random.uniform(jax.random.fold_in(coin_key, i)) for i in range(8)
  ]
  chosen = np.array(coins) < 0.5
  assert 0 < chosen.sum() < 8
  new, metrics = jax.jit(
    lambda params, batch: model.with_samples(
      params, model.student.encode(params, batch), batch, inputs
    )
  )(student, batch)
  targets = np.asarray(new["decoder_target_tokens"])
  np.testing.assert_array_equal(
    targets[~chosen], batch["decoder_target_tokens"][~chosen]
  )
  alone, _ = toy_models.sample(
    model.student, student, batch, sample_key, suppress_ids=(0,)
  )
  np.testing.assert_array_equal(targets[chosen], np.asarray(alone)[chosen])
  assert metrics["on_policy_share"] == (chosen.sum(), 8)


def test_teacher_is_untouched_and_not_in_the_state():
  model, student, teacher = toy_models.gkd()
  before = jax.tree.map(np.array, teacher)
  step, optimizer = toy_models.sgd_step(model, "student")
  state, _ = jax.jit(step)(
    toy_models.state(student, optimizer), teacher, toy_models.batch()
  )
  for a, b in zip(
    jax.tree.leaves(before), jax.tree.leaves(teacher), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  widths = {x.shape for x in jax.tree.leaves(state)}
  assert (16, 8) in widths and (16, 12) not in widths


@pytest.mark.parametrize(("dropout_rate", "encodings"), [(0.0, 1), (0.1, 2)])
def test_encodings_of_the_student_in_an_on_policy_step(dropout_rate, encodings):
  model, student, teacher = toy_models.gkd(dropout_rate)
  step, optimizer = toy_models.sgd_step(model, "student")
  jaxpr = jax.make_jaxpr(step)(
    toy_models.state(student, optimizer), teacher, toy_models.batch()
  )
  # Attention weights of an encoder, [B, H, S, S]: the student's forward passes,
  # the teacher's one, and the student's one backward pass.
  products = str(jaxpr).count("f32[8,2,6,6] = dot_general")
  assert products == encodings + 1 + 1


def test_schedules_of_beta_and_lambda_do_not_recompile():
  model, student, teacher = toy_models.gkd(
    divergence="jsd",
    beta=schedules.linear(0.0, 1.0, 2),
    student_data_fraction=schedules.linear(0.2, 0.8, 2),
    student_data_granularity="example",
  )
  step, optimizer = toy_models.sgd_step(model, "mixed")
  compiled = jax.jit(step)
  state = toy_models.state(student, optimizer)
  for _ in range(3):
    state, metrics = compiled(state, teacher, toy_models.batch())
    assert np.isfinite(metrics["loss"][0])
  assert compiled._cache_size() == 1


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


def test_the_coin():
  model, *_ = toy_models.gkd(student_data_fraction=0.25)
  draws = [model.source_of_step(7, s) for s in range(2000)]
  assert abs(draws.count("student") / 2000 - 0.25) < 0.04
  assert draws == [model.source_of_step(7, s) for s in range(2000)]
  for fraction, source in ((0.0, "data"), (1.0, "student")):
    model, *_ = toy_models.gkd(student_data_fraction=fraction)
    got = {model.source_of_step(7, s) for s in range(500)}
    assert got == {source}
  model, *_ = toy_models.gkd(
    student_data_fraction=0.25, student_data_granularity="example"
  )
  assert model.source_of_step(7, 0) == "mixed"


def test_fixed_data_steps_hold_no_decoding_loop():
  model, student, teacher = toy_models.gkd()
  for source, loops in (("data", False), ("student", True)):
    step, optimizer = toy_models.sgd_step(model, source)
    text = str(
      jax.make_jaxpr(step)(
        toy_models.state(student, optimizer), teacher, toy_models.batch()
      )
    )
    assert (" while[" in text) == loops


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"student_data_fraction": 1.5}, "λ in .* 1.5; set STUDENT_DATA_FRACTION"),
    ({"divergence": "jsd", "beta": -0.1}, "β in .*; set BETA"),
    ({"divergence": "jsd"}, "got none; set BETA"),
    ({"beta": 0.5}, "set DIVERGENCE"),
    ({"divergence": "jds", "beta": None}, "set DIVERGENCE"),
    ({"teacher_temperature": 0.0}, "set TEACHER_TEMPERATURE"),
    ({"sampling_temperature": -1.0}, "set SAMPLING_TEMPERATURE"),
    ({"length_normalization": "mean"}, "set LENGTH_NORMALIZATION"),
    ({"student_data_granularity": "token"}, "STUDENT_DATA_GRANULARITY"),
  ],
)
def test_wrong_settings(kwargs, message):
  with pytest.raises(ValueError, match=message):
    toy_models.gkd(**kwargs)


@pytest.mark.parametrize(
  ("setting", "name", "limit"),
  [
    ("student_data_fraction", "STUDENT_DATA_FRACTION", r"λ in \[0, 1\]"),
    ("beta", "BETA", r"β in \[0, 1\] or None"),
    ("teacher_temperature", "TEACHER_TEMPERATURE", "above 0"),
    ("student_temperature", "STUDENT_TEMPERATURE", "above 0"),
    ("sampling_temperature", "SAMPLING_TEMPERATURE", "at least 0"),
  ],
)
def test_schedules_stay_in_their_range(setting, name, limit):
  gkd = functools.partial(toy_models.gkd, divergence="normalized_jsd", beta=0.5)
  with pytest.raises(
    ValueError, match=f"{limit}, got -0.5.*reaches; set {name}"
  ):
    gkd(**{setting: schedules.cosine(0.5, -0.5, 10)})
  # Of another function the end is not known before it is there.
  model = gkd(**{setting: lambda step: 0.5 - step / 8})[0]
  assert model.source_of_step(0, 3) in model.sources
  with pytest.raises(
    ValueError, match=f"{limit}, got -0.125 at step 5; set {name}"
  ):
    model.source_of_step(0, 5)
  with pytest.raises(ValueError, match="got nan at step 0; set"):
    gkd(**{setting: lambda step: float("nan")})
  for no_schedule in (schedules.linear, schedules.constant):
    with pytest.raises(ValueError, match=rf"linear\(\).*; set {name}"):
      gkd(**{setting: no_schedule})


@pytest.mark.parametrize(("source", "chunk"), [("student", 0), ("data", 16)])
def test_temperatures_may_be_schedules(source, chunk):
  numbers = {
    "teacher_temperature": 1.25,
    "student_temperature": 0.75,
    "sampling_temperature": 0.5,
  }
  # A quarter of the way: powers of two make the line exact.
  lines = {
    k: schedules.linear(x - 0.25, x + 0.75, 8) for k, x in numbers.items()
  }
  inputs = toy_models.inputs(source)
  both = []
  for settings in (numbers, lines):
    model, student, teacher = toy_models.gkd(loss_chunk_size=chunk, **settings)
    loss = jax.jit(
      lambda params, batch, step, m=model, t=teacher: m.train_loss(
        params, t, batch, inputs._replace(step=step)
      )
    )
    both.append(loss(student, toy_models.batch(), jnp.int32(2)))
  (expected, metrics), (got, got_metrics) = both
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  for name, pair in metrics.items():
    np.testing.assert_allclose(got_metrics[name], pair, rtol=1e-5, err_msg=name)


def test_coins_of_rows_do_not_depend_on_the_other_rows():
  """Under a hardware generator too, which draws a whole batch from one key."""
  model = toy_models.gkd(student_data_fraction=0.5)[0]
  coins = jax.jit(
    lambda key, rows: model._coins(
      key, types_.StepInputs("", jnp.int32(0), key, rows)
    )
  )
  key = jax.random.key(5, impl="rbg")
  rows = jnp.arange(64)
  together = np.asarray(coins(key, rows))
  assert 16 < together.sum() < 48
  for part in (rows[:4], rows[30:34], rows[60:]):
    np.testing.assert_array_equal(coins(key, part), together[np.asarray(part)])


def test_vocabularies_padded_to_different_sizes_are_one_tokenizer():
  """Loss and gradient are those of the real tokens' logits in float64."""
  real = 14
  student = toy_models.model(8, num_real_tokens=real)
  config = dataclasses.replace(toy_models.model(12).config, vocab_size=24)
  teacher = models.EncoderDecoderModel(
    network.Transformer(config), num_real_tokens=real
  )
  params = toy_models.params(student, 1), toy_models.params(teacher, 2)
  batch = toy_models.batch()
  batch["decoder_target_tokens"] %= real
  batch["decoder_input_tokens"] %= real
  p, q = (
    loss_batches.log_softmax64(jax.jit(m.logits)(x, batch)[..., :real])
    for m, x in zip((teacher, student), params[::-1], strict=True)
  )
  w = batch["decoder_loss_weights"]
  shares = w / w.sum(axis=1, keepdims=True)
  expected = np.sum(shares * np.sum(np.exp(p) * (p - q), axis=-1))
  for chunk in (0, 16):
    model = models.GKDModel(student, teacher, loss_chunk_size=chunk)
    loss, metrics = jax.jit(
      lambda s, t, b, m=model: m.train_loss(s, t, b, toy_models.inputs("data"))
    )(*params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    agree = np.sum(w * (p.argmax(-1) == q.argmax(-1)))
    assert metrics["top1_agreement"][0] == agree
  mini = models.MiniLLMModel(student, teacher)
  tokens = jax.jit(
    lambda s, t, b: mini.draw(
      s,
      student.encode(s, b),
      b,
      jax.random.key(0),
      teacher_params=t,
    )
  )(*params, batch)[0]
  assert tokens.shape == (8, 7) and np.max(tokens) < real
  with pytest.raises(ValueError, match=r"or NUM_REAL_TOKENS where only"):
    models.GKDModel(
      toy_models.model(8),
      models.EncoderDecoderModel(network.Transformer(config)),
    )


def test_vocabularies_must_agree():
  student = toy_models.model(8)
  config = dataclasses.replace(student.config, vocab_size=24)
  teacher = models.EncoderDecoderModel(network.Transformer(config))
  with pytest.raises(ValueError, match=r"24 \(teacher\) and 16 \(student\)"):
    models.GKDModel(student, teacher)


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


_RATE = optax.linear_schedule(0.5, 0.01, 3)


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


class _DropoutModel(base_model.BaseTransformerModel):
  """SFT whose loss is the number of units that dropout takes."""

  def __init__(self):
    config = types.SimpleNamespace(vocab_size=2, dropout_rate=0.5)
    super().__init__(types.SimpleNamespace(config=config))

  def logits(self, params, batch, dropout_rng=None):
    taken = jax.random.bernoulli(
      dropout_rng, 0.5, batch["decoder_target_tokens"].shape
    )
    # log(1 + e^z) is 1 where a unit is taken, and 0 elsewhere.
    other = params["w"] + jnp.where(taken, np.log(np.e - 1), -40.0)
    return jnp.stack([jnp.zeros(taken.shape), other], axis=-1)


@pytest.mark.parametrize("executor", ["microbatches", "pmap"])
def test_equal_rows_get_dropout_masks_of_their_own(executor):
  """256 coins vary by 64 from step to step; 64 coins times 4 vary by 256."""
  step, optimizer = toy_models.sgd_step(_DropoutModel(), "data")
  run = jax.jit(functools.partial(step, num_microbatches=4))
  if executor == "pmap":
    run = functools.partial(
      training.pmap_step(step, jax.devices()[:4]), source="data"
    )
  rows = np.ones((4, 64), np.int32)
  batch = {"decoder_target_tokens": 0 * rows, "decoder_loss_weights": rows}
  state = toy_models.state({"w": jnp.float32(0.0)}, optimizer)
  taken = []
  for i in range(200):
    taken.append(run(state.replace(step=jnp.int32(i)), {}, batch)[1]["loss"][0])
  # The variance of 200 draws is within a tenth of 64, three times in four.
  assert abs(np.mean(taken) - 128) < 3
  assert 40 < np.var(taken) < 100


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
