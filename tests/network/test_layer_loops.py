"""Scanned networks against T5X's numbers, and against their unrolled selves."""

import dataclasses

import golden_t5x
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import t5x_checkpoints
import toy_models
from flax import linen as nn
from flax import traverse_util

import gin
from gkd_jax import (
  checkpoints,
  models,
  network,
  partitioning,
  training,
)
from gkd_jax.command_line import gin_settings
from gkd_jax.network import layer_loops
from gkd_jax.planning import costs

each = pytest.mark.parametrize("name", golden_t5x.NAMES)


def scanned(model, **fields):
  """The model with its network scanned, and other fields of its sizes."""
  config = dataclasses.replace(model.config, **fields)
  new = type(model)(type(model.module)(config, scan_layers=True))
  for name in ("inputs_bidirectional_attention", "z_loss", "num_real_tokens"):
    if hasattr(model, name):
      setattr(new, name, getattr(model, name))
  return new


def distance(got, expected):
  """Norm of the difference of whole trees, over that of the second."""
  difference = jax.tree.map(lambda a, b: np.asarray(a) - b, got, expected)
  return optax.tree.norm(difference) / optax.tree.norm(expected)


def gkd(scan, depth=2, **settings):
  """`GKDModel`, both networks scanned or not."""
  parts = toy_models.deep(8, depth), toy_models.deep(12, depth)
  if scan:
    parts = map(scanned, parts)
  return models.GKDModel(*parts, **settings)


def gkd_params(scan):
  """The student's and the teacher's."""
  params = (
    toy_models.normal_params(toy_models.deep(8), 1),
    toy_models.normal_params(toy_models.deep(12), 2),
  )
  return tuple(map(toy_models.stack_layers, params)) if scan else params


# --- Values ---------------------------------------------------------------------


def compiled(model, method, *arguments):
  return jax.jit(getattr(model, method))(*arguments)


@each
def test_logits_hidden_states_and_tokens_equal_t5x(name):
  numbers, _ = golden_t5x.load(name)
  plain, params, batch = golden_t5x.model(name)
  model, stacks = scanned(plain), toy_models.stack_layers(params)
  encoded = compiled(plain, "encode", params, batch)
  hidden, expected = (
    compiled(a_model, "decoder_hidden", of, encoded, batch)
    for a_model, of in ((model, stacks), (plain, params))
  )
  assert distance(hidden, expected) <= 1e-6
  logits = compiled(model, "logits", stacks, batch)
  assert distance(logits, numbers["logits"]) <= 1e-6
  tokens = compiled(model, "predict_batch", stacks, batch)
  np.testing.assert_array_equal(tokens, numbers["greedy"])


@pytest.mark.parametrize("policy", ["minimal", "full"])
def test_gradients_of_recomputed_layers_equal_t5x(policy):
  numbers, _ = golden_t5x.load("t5_1_1_tiny")
  plain, params, batch = golden_t5x.model("t5_1_1_tiny", z_loss=1e-4)
  model = scanned(plain, remat_policy=policy)
  loss = lambda p: model.loss_fn(p, batch, None)[0]
  grads = jax.jit(jax.grad(loss))(toy_models.stack_layers(params))
  expected = toy_models.stack_layers(golden_t5x.params(numbers, "grads"))
  assert distance(grads, expected) <= 1e-5


@pytest.mark.parametrize("prefix_lm", [False, True])
def test_decoder_only_equals_t5x(prefix_lm):
  plain, params, batch, expected = golden_t5x.decoder_only(prefix_lm)
  model, stacks = scanned(plain), toy_models.stack_layers(params)
  logits = compiled(model, "logits", stacks, batch)
  assert distance(logits, expected["logits"]) <= 1e-6
  tokens = compiled(model, "predict_batch", stacks, batch)
  np.testing.assert_array_equal(tokens, expected["greedy"])


def test_names_and_axes_are_one_layer_s_behind_the_layers():
  plain, params, batch = golden_t5x.model("t5_1_1_tiny")
  shapes = {k: v.shape for k, v in batch.items()}
  of = lambda m: jax.eval_shape(
    lambda: m.get_initial_variables(jax.random.key(0), shapes)
  )
  got, expected = of(scanned(plain)), of(plain)
  assert jax.tree.map(jnp.shape, got["params"]) == jax.tree.map(
    jnp.shape, toy_models.stack_layers(params)
  )
  axes = partitioning.logical_axes(got["params_axes"])
  for path, names in partitioning.logical_axes(expected["params_axes"]).items():
    stacked = path.replace("/layers_0/", "/layers/")
    if stacked != path:
      assert axes.pop(stacked) == ("layers", *names)
    elif "/layers_" not in path:
      assert axes.pop(path) == names
  assert not axes


class Noise(nn.Module):
  """A layer that adds a parameter and dropout's mask."""

  config: network.T5Config

  @nn.compact
  def __call__(self, x):
    weight = self.param("w", nn.initializers.normal(), x.shape)
    mask = nn.Dropout(0.5, deterministic=False)(jnp.ones_like(x))
    return x + weight + mask


def test_layers_are_drawn_apart_and_drop_apart():
  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      fields = (network.T5Config(vocab_size=2),)
      return layer_loops.apply(Noise, fields, 8, True, x)

  keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  x, variables = Stack().init_with_output(keys, jnp.zeros(100))
  weights = variables["params"]["layers"]["w"]
  assert len(np.unique(weights)) == 800
  # Each mask adds 0 or 2. One mask for all layers would give 0 and 16 alone.
  dropped = np.rint(x - jnp.sum(weights, axis=0))
  assert len(np.unique(dropped)) > 3


def test_decoding_with_a_scanned_network_itself_is_a_sentence():
  plain, params, batch = golden_t5x.model("t5_1_1_tiny")
  with pytest.raises(ValueError, match="or set scan_layers = False"):
    scanned(plain).module.apply(
      {"params": toy_models.stack_layers(params)},
      *(batch[f"{k}_tokens"] for k in ("encoder_input", "decoder_input")),
      batch["decoder_target_tokens"],
      decode=True,
      enable_dropout=False,
      mutable=["cache"],
    )


# --- Training -------------------------------------------------------------------


def placed(a_model, mesh, split):
  """Shapes that know their shardings, of a network's parameters."""
  of = partitioning.abstract_params(
    a_model, toy_models.SHAPES, mesh, partitioning.parameter_rules(split)
  )
  return partitioning.with_shardings(*of)


def train(scan, split):
  """Loss of an on-policy step, and its gradient with layers stacked.

  With `split`, on eight devices with a model axis of two, parameters split over
  data as well.
  """
  model = gkd(scan, divergence="jsd", beta=0.5)
  student, teacher = gkd_params(scan)
  run, optimizer = toy_models.sgd_step(model, "student")
  state = toy_models.state(student, optimizer)
  if split:
    mesh = partitioning.make_mesh(2)
    abstract, shardings = training.abstract_state(
      model.student,
      optimizer,
      toy_models.SHAPES,
      mesh,
      partitioning.parameter_rules(True),
    )
    execute = training.jit_step(run, mesh, shardings)
    place = lambda x, like: jax.device_put(jnp.array(x), like.sharding)
    like = partitioning.with_shardings(abstract, shardings)
    new, metrics = execute(
      jax.tree.map(place, state, like),
      jax.tree.map(place, teacher, placed(model.teacher, mesh, True)),
      partitioning.put_batch(toy_models.batch(), mesh),
      source="student",
    )
  else:
    new, metrics = jax.jit(run)(state, teacher, toy_models.batch())
  change = lambda a, b: np.asarray(a) - np.asarray(b)
  gradient = jax.tree.map(change, dict(student), new.params)
  return metrics["loss"], gradient if scan else toy_models.stack_layers(
    gradient
  )


# test_trainer splits a step, and the tests above scan layers.
@pytest.mark.nightly
def test_an_on_policy_step_split_over_devices_is_the_unrolled_one():
  loss, gradient = train(scan=False, split=False)
  got_loss, got = train(scan=True, split=True)
  assert distance(got_loss, loss) <= 1e-6
  assert distance(got, gradient) <= 1e-5


def test_weights_are_gathered_layer_by_layer_and_counted():
  mesh = partitioning.make_mesh(2)
  batch = {
    name: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=partitioning.batch_sharding(mesh)
    )
    for name, x in toy_models.batch().items()
  }

  def segments(model):
    program = partitioning.jit(model.logits, mesh)
    compiled = program.lower(placed(model, mesh, True), batch).compile()
    return costs.count(compiled.as_text(), loop_length=1000)

  plain = toy_models.deep(12)
  unrolled, found = segments(plain), segments(scanned(plain))
  total = lambda segments: costs.total(segments, lambda s: s.flops)
  assert total(found) == total(unrolled) > 0
  operands = lambda s: s.collectives["all-gather"].operand_bytes
  whole = lambda segments: sum(s.runs * operands(s) for s in segments)
  loops = found[1:]
  assert [loop.runs for loop in loops] == [2, 2]
  assert whole(found) == whole(unrolled)
  # A layer of the encoder has four matrices of attention and three of the MLP,
  # 12 x 8 each, an eighth of each here, and two norms of 12, a quarter of each;
  # one of the decoder eleven matrices and three norms.
  assert sorted(map(operands, loops)) == [
    4 * (n * 12 + norms * 3) for n, norms in ((7, 2), (11, 3))
  ]


# --- Checkpoints ----------------------------------------------------------------


def load(model, path):
  """The parameters of a teacher, split over eight devices."""
  like = placed(model, partitioning.make_mesh(2), True)
  shardings = jax.tree.map(lambda x: x.sharding, like)
  return checkpoints.load_placed(
    path, like, shardings, setting="TEACHER_CHECKPOINT_PATH", of="teacher"
  )


def assert_equal(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("place", ["legacy", "orbax", "scanned t5x", "export"])
def test_any_checkpoint_loads_into_a_scanned_network(place, tmp_path):
  plain, params, _ = golden_t5x.model("t5_1_1_tiny")
  path = {"legacy": t5x_checkpoints.LEGACY, "orbax": t5x_checkpoints.ORBAX}.get(
    place, tmp_path / "checkpoint_1"
  )
  if place == "scanned t5x":
    t5x_checkpoints.write_legacy(
      path, t5x_checkpoints.scan(params, plain.config)
    )
  if place == "export":
    config = dataclasses.asdict(plain.config)
    checkpoints.save_safetensors(path, params, config)
  loaded = load(scanned(plain), path)
  assert_equal(loaded, toy_models.stack_layers(params))
  kernel = loaded["encoder"]["layers"]["mlp"]["wo"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 16, 4)


def test_a_scanned_student_s_checkpoint_has_the_names_of_an_unrolled_one(
  tmp_path,
):
  model, (params, _) = gkd(True), gkd_params(True)
  optimizer = toy_models.sgd_step(model, "data")[1]
  state = toy_models.state(params, optimizer)
  checkpointer = checkpoints.Checkpointer(tmp_path, async_save=False)
  checkpointer.save(1, state, config=dataclasses.asdict(model.config))
  assert_equal(checkpointer.restore(1, state).params, params)
  plain, (expected, _) = gkd(False), gkd_params(False)
  with pytest.raises(ValueError, match="or configure the model that wrote it"):
    checkpointer.restore(1, toy_models.state(expected, optimizer))
  checkpointer.close()
  assert_equal(checkpoints.load_params(tmp_path), expected)
  assert_equal(load(plain.student, tmp_path), expected)
  assert_equal(load(model.student, tmp_path), params)
  config, read = checkpoints.load_model(tmp_path)
  assert network.Transformer(config) == plain.student.module
  assert_equal(read, expected)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (
      lambda flat: flat.pop("encoder/layers_0/mlp/wo/kernel"),
      "missing: encoder/layers/mlp/wo/kernel",
    ),
    (
      lambda flat: flat.update(
        {"encoder/layers_1/mlp/wo/kernel": np.zeros((8, 9), np.float32)}
      ),
      "unexpected: encoder/layers_0/mlp/wo/kernel",
    ),
  ],
)
def test_layers_that_make_no_stack_are_named(change, said, tmp_path):
  plain = toy_models.deep(12)
  flat = traverse_util.flatten_dict(toy_models.normal_params(plain, 2), sep="/")
  change(flat)
  params = traverse_util.unflatten_dict(flat, sep="/")
  checkpoints.save_safetensors(tmp_path, params, {"vocab_size": 16})
  with pytest.raises(ValueError, match="set TEACHER_CHECKPOINT_PATH") as error:
    load(scanned(plain), tmp_path)
  assert said in str(error.value)


def test_a_network_of_another_depth_is_refused(tmp_path):
  plain = toy_models.deep(12, 2)
  params = toy_models.normal_params(plain, 2)
  checkpoints.save_safetensors(tmp_path, params, {"vocab_size": 16})
  with pytest.raises(
    ValueError, match=r"expected \(3, 8, 12\), got \(2, 8, 12"
  ):
    load(scanned(toy_models.deep(12, 3)), tmp_path)


# --- Gin ------------------------------------------------------------------------


@pytest.mark.parametrize(
  "files",
  [
    ["experiments/smoke.gin"],
    ["experiments/smoke_decoder_only.gin"],
    ["models/toy.gin", "runs/instruments.gin"],
  ],
)
@pytest.mark.parametrize("scan", [None, True])
def test_gin_scans_the_teacher(files, scan):
  bindings = ["STUDENT = %TOY_STUDENT", "TEACHER = %TOY_TEACHER"]
  bindings = bindings if "runs/instruments.gin" in files else []
  if scan:
    bindings.append("TEACHER_SCAN_LAYERS = True")
  gin_settings.parse(files, bindings, [])
  model = gin.get_configurable(models.GKDModel)()
  assert model.teacher.module.scan_layers is bool(scan)
  assert model.student.module.scan_layers is False
