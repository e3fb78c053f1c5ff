"""The GKD step: sources, gradients, microbatches, meshes, settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import loss_batches
import nightly
import numpy as np
import pytest
import toy_models
import toy_steps

from gkd_jax import (
  models,
  network,
  partitioning,
  schedules,
  training,
)
from gkd_jax import types as types_
from gkd_jax.decoding import sampling

SOURCES = ("data", "student", "mixed")


@pytest.mark.parametrize(
  ("source", "microbatches", "normalization"),
  nightly.besides(
    [
      ("mixed", 4, "sequence"),
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
  nightly.besides([("student", 2)], ["data", "student"], [1, 2]),
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
    (
      {"student_data_fraction": 0.5, "hard_label_weight": 1.5},
      r"α in \[0, 1\], got 1.5; set HARD_LABEL_WEIGHT",
    ),
    (
      {"hard_label_weight": 0.5},
      "no row is from the data .*, got 0.5; set HARD_LABEL_WEIGHT",
    ),
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


@pytest.mark.parametrize(
  ("source", "chunk"),
  [pytest.param("student", 0, marks=pytest.mark.nightly), ("data", 16)],
)
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
