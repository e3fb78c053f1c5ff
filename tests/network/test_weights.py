"""A teacher's matrices in bfloat16 and int8, against numpy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_decoder_only
import toy_models
from flax import traverse_util

import gin
from gkd_jax import (
  checkpoints,
  infer,
  losses,
  models,
  optimizers,
  partitioning,
  schedules,
  training,
  types,
)
from gkd_jax.checkpoints import parameters, stored_arrays, t5x
from gkd_jax.command_line import gin_settings
from gkd_jax.network import layer_loops, projections

SETTING = {"setting": "TEACHER_CHECKPOINT_PATH", "of": "teacher"}


def kept(model, weights, scan=False, **fields):
  """The model with its matrices kept in another type."""
  config = dataclasses.replace(model.config, **fields)
  module = model.module.clone(config=config, scan_layers=scan, weights=weights)
  return type(model)(module)


def teacher(kind="t5", tied=False, depth=1):
  """A model of float32 weights, and random parameters on the host."""
  if kind == "t5":
    plain = toy_models.deep(12, depth)
  else:
    plain = toy_decoder_only.model(12, config={"num_layers": depth})
  plain = kept(plain, "float32", logits_via_embedding=tied)
  params = toy_models.normal_params(plain, 3)
  layer = params["decoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
  layer[:, 3] = 0.0  # its scale is 0
  return plain, params


def is_matrix(path):
  return path.endswith(("kernel", "embedding")) and "rel_" not in path


def steps(x, path):
  """Half of what int8 can say of each column, or row of an embedding."""
  over = 1 if path.endswith("embedding") else 0
  return np.abs(np.asarray(x, np.float64)).max(over, keepdims=True) / 127


def flat(tree):
  return traverse_util.flatten_dict(jax.device_get(tree), sep="/")


def dequantized(params):
  """float32 parameters as int8 says them, by numpy."""
  result = flat(params)
  for path, x in result.items():
    if is_matrix(path):
      step = steps(x, path)
      values = np.rint(x / np.where(step > 0, step, 1))
      result[path] = np.float32(values * step)
  return traverse_util.unflatten_dict(result, sep="/")


def place(model, path, split=True):
  """The parameters at a path on eight devices, a model axis of two."""
  mesh = partitioning.make_mesh(2)
  like = partitioning.abstract_params(
    model,
    toy_models.SHAPES,
    mesh,
    partitioning.parameter_rules(split),
  )
  return mesh, checkpoints.load_placed(path, *like, **SETTING)


def save(params, folder):
  checkpoints.save_safetensors(folder, params, {"vocab_size": 16})
  return folder


def batch_of(kind):
  """Eight rows of either kind of model."""
  if kind == "t5":
    return toy_models.batch()
  return toy_decoder_only.rows([([3, 4, 5], [6, 7, 1]), ([9, 2], [8, 1])] * 4)


# --- The same numbers -----------------------------------------------------------


@pytest.mark.parametrize(
  ("kind", "tied", "scan"), [("t5", False, False), ("decoder", True, True)]
)
def test_auto_is_bit_for_bit_what_float32_gives(kind, tied, scan, tmp_path):
  plain, params = teacher(kind, tied, 1 + scan)
  save(params, tmp_path)
  logits, types = [], []
  for weights in ("float32", "auto"):
    model = kept(plain, weights, scan, dtype="bfloat16")
    mesh, placed = place(model, tmp_path)
    of = partitioning.jit(model.logits, mesh)(placed, batch_of(kind))
    logits.append(np.asarray(of))
    types.append({k: v.dtype.name for k, v in flat(placed).items()})
  np.testing.assert_array_equal(*logits)
  assert set(types[0].values()) == {"float32"}
  # What is used in float32 is kept in it.
  wide = "token_embedder/embedding" if tied else "logits_dense/kernel"
  assert types[1] == {
    path: "bfloat16"
    if is_matrix(path) and not path.endswith(wide)
    else "float32"
    for path in types[0]
  }


# --- int8 -----------------------------------------------------------------------


def read(arrays, like):
  """Numpy arrays in the types of `like`."""
  stored = {k: stored_arrays.from_array(x) for k, x in arrays.items()}
  return stored_arrays.read_tree(stored_arrays.converted(stored, like))


KERNEL = {
  "kernel": jax.ShapeDtypeStruct((40, 24), jnp.int8),
  "kernel_scale": jax.ShapeDtypeStruct((24,), jnp.float32),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_is_off_by_half_a_step(dtype):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 40)).astype(np.float32)
  kernel = rng.standard_t(3, (40, 24)).astype(np.float32)
  params = read({"kernel": kernel}, KERNEL)
  assert params["kernel"].dtype == np.int8
  head = projections.head(params, tied=False)
  assert isinstance(head, types.Int8Matrix)
  assert head.values is params["kernel"] and head.scales.shape == (24,)
  dense = projections.Dense(24, ("embed", "mlp"), dtype, weights="int8")
  got = dense.apply({"params": params}, x)
  assert got.dtype == dtype
  error = np.abs(np.asarray(got, np.float64) - x.astype(np.float64) @ kernel)
  bound = np.abs(x).sum(-1, keepdims=True) * steps(kernel, "kernel") / 2
  # Rounding of the inputs and of the result.
  ulp = jnp.finfo(dtype).eps
  assert np.all(error <= bound + ulp * (np.abs(x) @ np.abs(kernel)))
  assert error.max() > 0.05 * bound.max()


def test_numbers_are_rounded_as_heads_are():
  kernel = np.random.default_rng(1).normal(size=(40, 24)).astype(np.float32)
  got = read({"kernel": kernel}, KERNEL)
  head = projections.quantize(jnp.array(kernel))
  np.testing.assert_array_equal(got["kernel"], head.values)
  np.testing.assert_allclose(got["kernel_scale"], head.scales, rtol=2e-7)


def test_a_whole_matrix_is_read_once_and_a_split_one_twice():
  kernel = np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32)
  numbers = []

  def fetch(index):
    numbers.append(kernel[index].size)
    return kernel[index]

  mesh = partitioning.make_mesh(2)
  like = {
    "kernel": jax.ShapeDtypeStruct((16, 8), jnp.int8),
    "kernel_scale": jax.ShapeDtypeStruct((8,), jnp.float32),
  }
  for axes, times in (((None, None), 1), ((None, "model"), 1), (("data",), 2)):
    numbers.clear()
    array = stored_arrays.StoredArray((16, 8), np.dtype(np.float32), fetch)
    spec = jax.sharding.PartitionSpec
    placed = stored_arrays.place_tree(
      stored_arrays.converted({"kernel": array}, like),
      {
        "kernel": jax.sharding.NamedSharding(mesh, spec(*axes)),
        "kernel_scale": jax.sharding.NamedSharding(mesh, spec(*axes[1:])),
      },
    )
    expected = dequantized({"kernel": kernel})["kernel"]
    got = np.asarray(placed["kernel"]) * np.asarray(placed["kernel_scale"])
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert sum(numbers) == times * kernel.size


@pytest.mark.parametrize(
  ("format_", "scan"),
  [("safetensors", False), ("safetensors", True), ("orbax", True)],
)
def test_any_checkpoint_is_rounded_as_it_is_read(format_, scan, tmp_path):
  plain, params = teacher(depth=2)
  if format_ == "safetensors":
    save(params, tmp_path)
  else:
    t5x.save_orbax(
      tmp_path, stored_arrays.flatten(params), plain.config, step=1
    )
  model = kept(plain, "int8", scan)
  _, placed = place(model, tmp_path)
  got, expected = placed, toy_models.stack_layers(params) if scan else params
  if not scan:
    on_host = checkpoints.load_params(
      tmp_path, like=partitioning.host_params(model)
    )
    jax.tree.map(np.testing.assert_array_equal, on_host, placed)
  assert parameters.count_array_elements(
    got
  ) == parameters.count_array_elements(expected)
  got, expected = flat(got), flat(expected)
  if scan:
    assert got["encoder/layers/mlp/wo/kernel_scale"].shape == (2, 12)
  for path, x in expected.items():
    if not is_matrix(path):
      assert got[path].dtype == np.float32
      np.testing.assert_array_equal(got[path], x)
      continue
    values, scales = got.pop(path), got.pop(path + "_scale")
    # Layer by layer: [layers, in, out] and [layers, out].
    stacks = values, scales, x
    if x.ndim == 2:
      stacks = tuple(a[None] for a in stacks)
    for value, scale, of_layer in zip(*stacks, strict=True):
      over = 1 if path.endswith("embedding") else 0
      step = steps(of_layer, path)
      assert value.dtype == np.int8 and scale.dtype == np.float32
      scale = np.expand_dims(scale, over)
      np.testing.assert_allclose(scale, step, rtol=1e-6)
      wide = value * scale.astype(np.float64)
      assert np.all(np.abs(wide - of_layer) <= step / 2 * 1.00001)


@pytest.mark.parametrize(
  ("kind", "tied", "scan"),
  [("t5", True, False), ("decoder", False, True)],
)
def test_int8_on_eight_devices_is_float32_of_its_numbers_on_one(
  kind, tied, scan, tmp_path
):
  plain, params = teacher(kind, tied, 1 + scan)
  model = kept(plain, "int8", scan)
  mesh, placed = place(model, save(params, tmp_path))
  batch = batch_of(kind)
  logits = partitioning.jit(model.logits, mesh)(placed, batch)
  of_one = jax.jit(plain.logits)
  expected = of_one(dequantized(params), batch)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=2e-5)
  # Rounding is more than what the two differ by.
  assert np.abs(of_one(params, batch) - expected).max() > 0.005
  if scan:  # as it decodes
    unrolled = kept(plain, "int8")
    assert layer_loops.unrolled(model.module) == unrolled.module
    jax.tree.map(
      np.testing.assert_array_equal,
      layer_loops.unstacked(placed),
      checkpoints.load_params(
        tmp_path, like=partitioning.host_params(unrolled)
      ),
    )


def test_the_fused_loss_of_an_int8_teacher_is_the_dense_one_of_its_numbers(
  tmp_path,
):
  plain, params = teacher("decoder", tied=True)
  model = kept(plain, "int8")
  like = partitioning.host_params(model)
  placed = checkpoints.load_params(save(params, tmp_path), like=like)
  batch = batch_of("decoder")
  rng = np.random.default_rng(4)
  hidden, head = (
    jnp.array(rng.normal(size=shape), jnp.float32)
    for shape in ((8, toy_decoder_only.WIDTH, 8), (8, 16))
  )

  def fused(params):
    return losses.fused_distillation_loss(
      hidden,
      head,
      model.decoder_hidden(params, (), batch),
      model.output_head(params),
      batch["decoder_loss_weights"],
      divergence="forward_kl",
      chunk_size=8,
    )[0]

  def dense(params):
    return losses.distillation_loss(
      jax.jit(plain.logits)(params, batch),
      hidden @ head,
      batch["decoder_loss_weights"],
      divergence="forward_kl",
    )[0]

  expected = jax.jit(dense)(dequantized(params))
  np.testing.assert_allclose(jax.jit(fused)(placed), expected, rtol=1e-5)


def test_drawn_parameters_and_axes():
  model = kept(teacher(depth=2)[0], "int8", True)
  axes = partitioning.logical_axes(
    jax.eval_shape(
      lambda: model.get_initial_variables(jax.random.key(0), toy_models.SHAPES)
    )["params_axes"]
  )
  name = "encoder/layers/mlp/wi_0/kernel"
  assert axes[name] == ("layers", "embed", "mlp")
  assert axes[name + "_scale"] == ("layers", "mlp")
  assert axes["token_embedder/embedding_scale"] == ("vocab",)
  # Each column, or row of an embedding, has a 127, and the initialiser's scale.
  for module, x, name, over in (
    (
      projections.Embed(40, 30, weights="int8"),
      jnp.int32([[1]]),
      "embedding",
      1,
    ),
    (
      projections.Dense(40, ("embed", "mlp"), weights="int8"),
      jnp.ones((1, 30)),
      "kernel",
      0,
    ),
  ):
    drawn = module.init(jax.random.key(0), x)["params"]
    assert np.all(np.abs(drawn[name]).max(over) == 127)
    wide = drawn[name] * np.expand_dims(drawn[name + "_scale"], over)
    width = {"embedding": 1, "kernel": 30**-0.5}[name]
    assert 0.9 < wide.std() / width < 1.1


def test_a_device_holds_the_teacher_in_the_type_of_its_weights():
  plain, params = teacher()
  sizes = {path: x.size for path, x in flat(params).items() if is_matrix(path)}
  scales = sum(
    x.shape[0 if path.endswith("embedding") else 1]
    for path, x in flat(params).items()
    if is_matrix(path)
  )

  def held(weights):
    run = training.build(
      models.GKDModel(toy_models.model(8), kept(plain, weights)),
      optimizers.adafactor(1e-3),
      **toy_models.settings(8),
    )
    return partitioning.bytes_per_device(run.teacher)

  whole = held("float32")
  assert whole - held("auto") == 0  # float32 is what it computes in
  assert whole - held("bfloat16") == 2 * sum(sizes.values())
  assert whole - held("int8") == 3 * sum(sizes.values()) - 4 * scales


# --- Settings -------------------------------------------------------------------


def test_wrong_settings(tmp_path):
  plain, params = teacher()
  with pytest.raises(ValueError, match="set TEACHER_WEIGHTS"):
    place(kept(plain, "int4"), tmp_path)
  params["decoder"]["decoder_norm"]["scale"][0] = np.inf  # no matrix
  params["decoder"]["layers_0"]["mlp"]["wo"]["kernel"][1, 2] = np.nan
  save(params, tmp_path)
  with pytest.raises(ValueError, match=r"finite numbers.*layers_0/mlp/wo/ker"):
    place(kept(plain, "int8"), tmp_path)
  other = toy_models.deep(12, 2)
  with pytest.raises(ValueError, match="missing: decoder/layers_1"):
    place(kept(other, "int8"), tmp_path)


def test_a_student_stays_in_float32():
  optimizer = optimizers.Optimizer(schedules.constant(1.0), optax.sgd(1.0))
  of = (
    toy_models.SHAPES,
    partitioning.make_mesh(1),
    partitioning.parameter_rules(False),
  )
  for weights, said in (("int8", "float32, int8"), ("bfloat16", "bfloat16")):
    student = kept(toy_models.model(8), weights)
    with pytest.raises(ValueError, match=f"got .*{said}.* 'float32'"):
      training.abstract_state(student, optimizer, *of)


FILES = (
  ["experiments/smoke.gin"],
  ["experiments/smoke_decoder_only.gin"],
  ["models/toy.gin", "runs/instruments.gin"],
)


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("weights", [None, "int8"])
def test_gin_sets_the_teacher_s_weights_alone(files, weights):
  bindings = ["STUDENT = %TOY_STUDENT", "TEACHER = %TOY_TEACHER"]
  bindings = bindings if "runs/instruments.gin" in files else []
  if weights:
    bindings.append(f"TEACHER_WEIGHTS = {weights!r}")
  gin_settings.parse(files, bindings, [])
  model = gin.get_configurable(models.GKDModel)()
  assert model.teacher.module.weights == (weights or "auto")
  assert model.student.module.weights == "float32"


@pytest.mark.parametrize("kind", ["t5", "decoder"])
def test_gin_sets_those_of_what_is_decoded(kind):
  files, bindings = ["models/toy.gin", "runs/eval.gin"], ["WEIGHTS = 'int8'"]
  if kind == "decoder":
    files = ["models/decoder_only_toy.gin", "runs/eval.gin"]
    bindings.append("STUDENT = %DECODER_ONLY_TOY_TEACHER")
  else:
    bindings.append("STUDENT = %TOY_STUDENT")
  gin_settings.parse(files, bindings, [])
  assert gin.get_configurable(infer.evaluate_checkpoint) is not None
  assert (
    gin.query_parameter("%STUDENT_MODEL")
    .scoped_configurable_fn()
    .module.weights
    == "int8"
  )
