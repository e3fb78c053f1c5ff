"""Output buckets: the results of the whole length, from a part of it."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import nightly
import numpy as np
import optax
import pytest
import toy_decoder_only
import toy_models

from gkd_jax import models, partitioning, training
from gkd_jax.models import length_buckets

KEY = jax.random.fold_in(jax.random.key(0), 0)  # of the first step of seed 0
SHORT = 4  # the longest output of a batch of T = 7; a bucket of those below
BUCKETS = (SHORT, 50)


def cut(batch, length):
  """The features of outputs, cut by hand."""
  return {
    name: x if name.startswith("encoder") or x.ndim == 1 else x[:, :length]
    for name, x in batch.items()
  }


def short_targets():
  """Toy rows with targets of 1 to 4 tokens, 7 positions wide."""
  batch = toy_models.batch()
  long = (np.arange(8) % 7 >= SHORT)[:, None]
  return {
    name: np.where(long & name.startswith("decoder"), 0, x)
    for name, x in batch.items()
  }


def gkd(**settings):
  """`toy_models.gkd`, but of samples that end early."""
  model, _, teacher = toy_models.gkd(**settings)
  student = toy_models.params(model.student, 9)
  model.sampling["suppress_ids"] = (0, *range(2, 11))
  return model, student, teacher


@functools.cache
def with_short_samples():
  """A toy batch of the inputs whose samples are short, and those samples."""
  model, student, _ = gkd()
  batch = toy_models.batch()
  key = jax.random.split(KEY, 3)[1]  # as `train_loss` has it
  tokens = np.asarray(jax.jit(model.sample_batch)(student, batch, key))
  lengths = np.count_nonzero(tokens, axis=1)
  kept = (lengths <= SHORT)[:, None]
  assert kept.sum() >= 3 and max(lengths) > max(lengths * kept[:, 0]) == SHORT
  inputs = batch["encoder_input_tokens"] * kept
  return batch | {"encoder_input_tokens": inputs}, tokens * kept


def results(model, params, teacher, batch, source="data", *, gradient=True):
  """Value and metrics of a loss, and its gradient; jitted."""

  def loss(params, batch):
    rows = len(batch["decoder_target_tokens"])
    return model.train_loss(
      params, teacher, batch, toy_models.inputs(source, rows, KEY)
    )

  run = jax.value_and_grad(loss, has_aux=True) if gradient else loss
  return jax.jit(run)(params, batch)


def assert_close(got, expected, tolerance=2e-6):
  got, expected = (
    jax.tree_util.tree_leaves_with_path(tree) for tree in (got, expected)
  )
  for (path, x), (_, y) in zip(got, expected, strict=True):
    scale = np.max(np.abs(y)) + 1e-30
    np.testing.assert_allclose(
      np.asarray(x) / scale,
      np.asarray(y) / scale,
      rtol=0,
      atol=tolerance,
      err_msg=jax.tree_util.keystr(path),
    )


@pytest.mark.parametrize("used", [0, 1, 2, 3, 4, 5])
def test_the_shortest_length_that_suffices_is_computed(used):
  x = np.arange(1.0, 6.0, dtype=np.float32)

  def of_length(length, trained, fixed):
    return length * jnp.sum((trained * fixed)[:length] ** 2), length * fixed[0]

  def loss(trained, used):
    value, aux = length_buckets.shortest_loss(
      of_length, (2, 3, 5), used, trained, 2 * x
    )
    return 10 * value, aux

  found = {0: 2, 1: 2, 2: 2, 3: 3, 4: 5, 5: 5}[used]
  expected = 40.0 * found * np.sum((x * x)[:found] ** 2)
  # 10 length Σ (t f)², of t = x and f = 2 x; its gradient is 20 length t f².
  slope = np.where(np.arange(5) < found, 80.0 * found * x**3, 0)
  (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(x, used)
  np.testing.assert_allclose((value, aux), (expected, 2 * found), rtol=1e-6)
  np.testing.assert_allclose(gradient, slope, rtol=1e-6)
  np.testing.assert_allclose(loss(x, used), (value, aux))


def test_the_used_length_is_that_of_the_longest_row():
  weights = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 1.0, 0.0]])
  assert length_buckets.used_length(weights) == 3
  assert length_buckets.used_length(weights * 0) == 0
  assert length_buckets.used_length(weights[:, :3]) == 3


def both(make, **settings):
  """The model with buckets and the one without."""
  return make(**settings, output_buckets=BUCKETS), make(**settings)


def test_a_decoder_only_row_is_cut_with_its_prompt():
  gkd = functools.partial(toy_decoder_only.gkd, prefix_lm=True)
  model, student, teacher = gkd(output_buckets=(5, 9))
  batch = toy_decoder_only.batch()
  short = np.count_nonzero(batch["decoder_target_tokens"], axis=1) <= 9
  batch = {k: x * short[:, None] for k, x in batch.items()}
  assert 5 < length_buckets.used_length(batch["decoder_loss_weights"]) <= 9
  got, expected = (
    results(m, student, teacher, batch, gradient=False)
    for m in (model, gkd()[0])
  )
  assert_close(got, expected)


def rl_case():
  make = functools.partial(
    models.RLGKDModel,
    toy_models.model(8),
    toy_models.model(12),
    reward=len,
    alpha=0.5,
  )
  rng = np.random.default_rng(0)
  weights = short_targets()["decoder_loss_weights"]
  return make, {
    "rewards": rng.normal(size=8).astype(np.float32),
    "advantages": rng.normal(size=(8, 7)).astype(np.float32) * weights,
  }


def minillm_case():
  pair = toy_models.model(8), toy_models.model(12)
  return functools.partial(models.MiniLLMModel, *pair), {}


def stored_case():
  make = functools.partial(models.StoredTeacherModel, toy_models.model(8))
  distribution = np.random.default_rng(0).dirichlet(np.ones(4), (8, 7))
  return make, {
    "top_k_ids": np.tile(np.int32([3, 5, 9]), (8, 7, 1)),
    "top_k_log_probs": np.log(distribution).astype(np.float32),
  }


@pytest.mark.parametrize(
  "case", nightly.of([rl_case, minillm_case, stored_case], [rl_case])
)
def test_the_other_models_losses_are_as_without_buckets(case):
  make, more = case()
  _, student, teacher = toy_models.gkd()
  batch = short_targets() | more
  got, expected = (
    results(model, student, teacher, batch, gradient=False)
    for model in both(make)
  )
  assert_close(got, expected)


def test_a_short_batch_is_computed_short():
  # Dropout's masks tell: those of self-attention have the length computed.
  (model, student, teacher), (plain, *_) = both(gkd, dropout_rate=0.3)
  batch, tokens = with_short_samples()
  weights = (tokens > 0).astype(np.float32)
  as_data = batch | model.student.output_features(batch, tokens, weights)
  of = functools.partial(results, gradient=False)
  got, metrics = of(model, student, teacher, batch, "student")
  short, of_short = of(plain, student, teacher, cut(as_data, SHORT))
  assert_close((got, {k: metrics[k] for k in of_short}), (short, of_short))
  whole, _ = of(plain, student, teacher, as_data)
  assert abs(got / whole - 1) > 1e-3


def step_result(source, batch, microbatches=1, **settings):
  model, student, teacher = gkd(**settings)
  step, optimizer = toy_models.sgd_step(
    model, source, num_microbatches=microbatches
  )
  state = toy_models.state(student, optimizer)
  new, metrics = jax.jit(step)(state, teacher, batch)
  return jax.tree.map(jnp.subtract, state.params, new.params), metrics


# Microbatches without buckets: tests/training/test_trainer.py.
@pytest.mark.nightly
def test_microbatches_choose_their_own_lengths():
  # Of the two parts, rows 0, 2, 4, 6 and 1, 3, 5, 7, one alone is short.
  batch = toy_models.batch()
  even = (np.arange(8) % 2 == 0)[:, None]
  short = {
    name: np.where(even & name.startswith("decoder"), short_targets()[name], x)
    for name, x in batch.items()
  }
  parts = [short["decoder_loss_weights"][i::2] for i in (0, 1)]
  assert [int(length_buckets.used_length(p)) for p in parts] == [3, 6]
  expected = step_result("data", short)
  got = step_result("data", short, 2, output_buckets=BUCKETS)
  assert_close(got, expected, 5e-6)


# As test_a_short_batch_is_computed_short, and test_trainer's meshes.
@pytest.mark.nightly
def test_a_mesh_changes_nothing():
  model, student, teacher = gkd(loss_chunk_size=4, output_buckets=BUCKETS)
  batch, _ = with_short_samples()
  expected = step_result("student", batch, loss_chunk_size=4)
  mesh = partitioning.make_mesh(2)
  assert dict(mesh.shape) == {"data": 4, "model": 2}

  def place(a_model, tree):
    variables = jax.eval_shape(
      lambda: a_model.get_initial_variables(
        jax.random.key(0), toy_models.SHAPES
      )
    )
    axes = partitioning.logical_axes(variables["params_axes"])
    rules = partitioning.FULLY_SHARDED_RULES
    shardings = partitioning.param_shardings(tree, axes, mesh, rules)
    return jax.tree.map(jax.device_put, tree, shardings), shardings

  before = jax.tree.map(np.asarray, student)
  student, shardings = place(model.student, student)
  teacher, _ = place(model.teacher, teacher)
  step, optimizer = toy_models.sgd_step(model, "student")
  state = toy_models.state(student, optimizer)
  shardings = partitioning.state_shardings(state, shardings, mesh)
  state = jax.tree.map(jax.device_put, state, shardings)
  run = training.jit_step(step, mesh, shardings)
  new, metrics = run(
    state, teacher, partitioning.put_batch(batch, mesh), source="student"
  )
  gradient = jax.tree.map(lambda a, b: a - np.asarray(b), before, new.params)
  assert optax.tree.norm(gradient) > 0.1
  assert_close((gradient, metrics), expected, 1e-5)


@pytest.mark.parametrize(("dropout_rate", "encodings"), [(0.0, 1), (0.1, 2)])
def test_branches_hold_no_encoder(dropout_rate, encodings):
  model, student, teacher = toy_models.gkd(
    dropout_rate, output_buckets=(2, SHORT)
  )
  step, optimizer = toy_models.sgd_step(model, "student")
  closed = jax.make_jaxpr(step)(
    toy_models.state(student, optimizer), teacher, toy_models.batch()
  )
  # As without buckets, see test_trainer: the student's forward passes, the
  # teacher's one, and the student's one backward pass.
  products = str(closed).count("f32[8,2,6,6] = dot_general")
  assert products == encodings + 1 + 1
  (switch,) = (
    e
    for e in jaxprs.equations(closed.jaxpr, "cond")
    if len(e.params["branches"]) == 3
  )
  # The loss, six metrics with weights (the loss's own among them), and gradients
  # of what a decoder reads, the encoded inputs among it.
  read = jax.tree.leaves(model.student.decoder_params(student))
  assert len(read) < len(jax.tree.leaves(student))
  assert len(switch.outvars) == 1 + 2 * 6 + len(read) + 1


def test_wrong_lengths():
  for wrong in ((0, 4), (4, 4), (8, 4)):
    with pytest.raises(ValueError, match=r"ascending .*; set OUTPUT_BUCKETS"):
      toy_models.gkd(output_buckets=wrong)
