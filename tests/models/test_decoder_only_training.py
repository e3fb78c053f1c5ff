"""GKD of decoder-only models: gradients, microbatches, meshes, λ, data, gin."""

import functools

import jax
import jax.numpy as jnp
import nightly
import numpy as np
import optax
import pytest
import toy_decoder_only as toy
import toy_models

import gin
from gkd_jax import data, evaluation, models, partitioning, training
from gkd_jax.checkpoints import parameters
from gkd_jax.command_line import gin_settings
from gkd_jax.training import logs


def assert_same(a, b, tolerance=1e-5):
  difference = optax.tree.norm(
    jax.tree.map(lambda x, y: np.asarray(x) - y, a, b)
  )
  assert difference <= tolerance * optax.tree.norm(b)


def wrapped(**kwargs):
  settings = {"student_data_fraction": 0.5, "divergence": "jsd", "beta": 0.5}
  return toy.gkd(prefix_lm=True, **settings | kwargs)


@functools.cache
def gradient(source, microbatches=1):
  """Gradient (the parameters' change under SGD), metrics."""
  model, student, teacher = wrapped()
  step, optimizer = toy_models.sgd_step(
    model, source, num_microbatches=microbatches
  )
  state = toy_models.state(student, optimizer)
  new, metrics = jax.jit(step)(state, teacher, toy.batch())
  return jax.tree.map(jnp.subtract, state.params, new.params), metrics


# tests/models/test_rotary_training.py has microbatches and a mesh of a decoder.
@pytest.mark.nightly
@pytest.mark.parametrize("source", ["data", "student", "mixed"])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_change_nothing(source, microbatches):
  expected, metrics = gradient(source)
  got, got_metrics = gradient(source, microbatches)
  assert_same(got, expected)
  for name, pair in metrics.items():
    np.testing.assert_allclose(
      got_metrics[name], pair, rtol=1e-4, atol=1e-6, err_msg=name
    )


@pytest.mark.nightly
@pytest.mark.parametrize("source", ["data", "student"])
@pytest.mark.parametrize("partitions", [1, 2])
def test_meshes_change_nothing(source, partitions):
  mesh = partitioning.make_mesh(partitions)
  model, student, teacher = wrapped()

  def place(a_model, tree):
    axes = partitioning.logical_axes(
      jax.eval_shape(
        lambda: a_model.get_initial_variables(jax.random.key(0), toy.SHAPES)
      )["params_axes"]
    )
    shardings = partitioning.param_shardings(tree, axes, mesh)
    return jax.tree.map(jax.device_put, tree, shardings), shardings

  before = jax.tree.map(np.asarray, student)
  student, shardings = place(model.student, student)
  teacher, _ = place(model.teacher, teacher)
  step, optimizer = toy_models.sgd_step(model, source)
  state = toy_models.state(student, optimizer)
  state_shardings = partitioning.state_shardings(state, shardings, mesh)
  state = jax.tree.map(jax.device_put, state, state_shardings)
  run = training.jit_step(step, mesh, state_shardings)
  new, _ = run(
    state, teacher, partitioning.put_batch(toy.batch(), mesh), source=source
  )
  kernel = new.params["decoder"]["logits_dense"]["kernel"]
  assert kernel.addressable_shards[0].data.shape[1] == toy.VOCAB // partitions
  got = jax.tree.map(lambda a, b: a - np.asarray(b), before, new.params)
  assert_same(got, gradient(source)[0])


@pytest.mark.parametrize("prefix_lm", nightly.of([False, True], [True]))
def test_on_policy_gradient_is_the_supervised_one_on_the_same_tokens(prefix_lm):
  model, student, teacher = toy.gkd(prefix_lm)
  pairs, batch = toy.pairs(), toy.batch()
  key = jax.random.key(5)
  loss = lambda p, b, source: model.train_loss(
    p, teacher, b, toy_models.inputs(source, key=key)
  )[0]
  gradient = jax.jit(jax.grad(loss), static_argnums=2)
  on_policy = gradient(student, batch, "student")
  tokens, _ = model.student.sample(
    student,
    (),
    batch,
    jax.random.split(key, 3)[1],
    suppress_ids=(0,),
  )
  outputs = [row[row > 0].tolist() for row in np.asarray(tokens)]
  lengths = [len(output) for output in outputs]
  assert min(lengths) < 4 < max(lengths)
  as_data = toy.rows(
    [(prompt, o) for (prompt, _), o in zip(pairs, outputs, strict=True)]
  )
  assert_same(on_policy, gradient(student, as_data, "data"))


def test_loss_equals_the_formula_in_float64():
  model, student, teacher = toy.gkd(True, teacher_temperature=0.5)
  batch = toy.batch()
  total, metrics = toy_models.train_loss(model, student, teacher, batch, "data")
  weight = metrics["loss"][1]
  logs_ = []
  for m, p, t in ((model.teacher, teacher, 0.5), (model.student, student, 1.0)):
    z = toy.oracle(m.config, p, batch, prefix_lm=True) / t
    logs_.append(z - np.logaddexp.reduce(z, axis=-1, keepdims=True))
  kl = np.sum(np.exp(logs_[0]) * (logs_[0] - logs_[1]), axis=-1)
  means = []
  for row, (prompt, output) in enumerate(toy.pairs()):
    means.append(np.mean(kl[row, len(prompt) : len(prompt) + len(output)]))
  np.testing.assert_allclose(total / weight, np.mean(means), rtol=1e-5)


def test_lambda_zero_never_samples():
  model, student, teacher = wrapped(student_data_fraction=0.0)
  sources = {model.source_of_step(0, step) for step in range(200)}
  assert sources == {"data"}

  def loops(source):
    step, optimizer = toy_models.sgd_step(model, source)
    state = toy_models.state(student, optimizer)
    return str(jax.make_jaxpr(step)(state, teacher, toy.batch())).count(
      "while["
    )

  assert (loops("data"), loops("student")) == (0, 1)


# --- From a task ----------------------------------------------------------------------

LENGTHS = {"inputs": 16, "targets": 48}


def test_a_tasks_rows_hold_prompt_and_output():
  task = data.load_task("arithmetic_cot")
  iterator = data.TrainIterator(
    task, LENGTHS, 4, seed=0, converter=toy.model().FEATURE_CONVERTER_CLS
  )
  batch = next(iterator)
  vocabulary = task.output_features["targets"].vocabulary
  pairs = []
  for row in range(4):
    tokens = batch["decoder_target_tokens"][row].tolist()
    n = tokens.index(1) + 1  # the prompt's EOS
    end = n + tokens[n:].index(1) + 1
    pairs.append((tokens[:n], tokens[n:end]))
    prompt, output = (vocabulary.decode(part) for part in pairs[-1])
    assert eval(prompt.strip()) == int(output.split("#")[-1]), (prompt, output)
  expected = toy.rows(pairs, width=64)
  assert set(batch) == set(expected)
  for name, value in expected.items():
    np.testing.assert_array_equal(batch[name], value, err_msg=name)
  # Tokens of inputs, as the log counts them.
  assert logs._input_tokens(batch) == sum(len(prompt) for prompt, _ in pairs)


def test_a_causal_model_trains_on_targets_alone():
  task = data.load_task("arithmetic_cot")
  iterator = data.TrainIterator(
    task,
    {"targets": 96},
    4,
    seed=0,
    pack=True,
    converter=toy.model().FEATURE_CONVERTER_CLS,
  )
  batch = next(iterator)
  assert batch["decoder_segment_ids"].max() > 1
  model = toy.model(vocab_size=24)
  params = toy.params(model, 0)
  _, metrics = toy_models.train_loss(model, params, {}, batch, "data", rows=4)
  weight = metrics["loss"][1]
  assert weight == (batch["decoder_target_tokens"] > 0).sum()


def test_evaluation_decodes_outputs_without_their_prompts():
  task = data.load_task("arithmetic_cot")
  evaluator = evaluation.Evaluator(
    task,
    LENGTHS,
    8,
    partitioning.make_mesh(),
    num_examples=3,  # five rows of the batch are padding
    converter="DecoderFeatureConverter",
  )
  model = toy.model(vocab_size=24, inputs_bidirectional_attention=True)
  params = toy.params(model, 0)
  (result,) = evaluator.predict(model, params).values()
  vocabulary = task.output_features["targets"].vocabulary
  for text, output, score in zip(
    result.inputs, result.outputs, result.scores, strict=True
  ):
    prompt = [*vocabulary.encode(text), 1]
    batch = toy.rows([(prompt, [])], width=64)
    tokens, aux = model.predict_batch_with_aux(params, batch)
    assert output == vocabulary.decode(np.asarray(tokens)[0].tolist())
    np.testing.assert_allclose(score, aux["scores"][0], rtol=1e-4)


# --- gin ------------------------------------------------------------------------------


def test_sizes_of_t5x_example():
  gin_settings.parse(
    ["runs/gkd.gin", "models/decoder_only.gin"],
    ["STUDENT = %DECODER_ONLY_BASE", "TEACHER = %DECODER_ONLY_XXL"],
    [],
  )
  model = gin.get_configurable(models.GKDModel)()
  assert not model.student.inputs_bidirectional_attention
  for part, d, attention, mlp, layers in (
    (model.student, 768, 12 * 64, 2048, 12),
    (model.teacher, 4096, 64 * 64, 10240, 24),
  ):
    params = jax.eval_shape(
      lambda m=part: m.get_initial_variables(jax.random.key(0), toy.SHAPES)
    )["params"]
    of_layer = 4 * d * attention + 3 * d * mlp + 2 * d
    bias = 32 * attention // 64
    assert (
      parameters.count_array_elements(params)
      == 32128 * d + layers * of_layer + d + bias
    )
