"""T5X's checkpoints: both layouts, scanned layers, and what T5X gets back."""

import base64
import json
import shutil

import golden_t5x
import jax
import msgpack
import numpy as np
import pytest
import t5x_checkpoints
from checkpoint_states import assert_identical, message
from flax import traverse_util

from gkd_jax import checkpoints, network, partitioning
from gkd_jax.checkpoints import export, formats, parameters, stored_arrays, t5x


@pytest.fixture(scope="module")
def expected():
  """The parameters that T5X's own process dumped, and their configuration."""
  numbers, info = golden_t5x.load("t5_1_1_tiny")
  fields = info["config"] | {
    "mlp_activations": tuple(info["config"]["mlp_activations"])
  }
  return golden_t5x.params(numbers), network.T5Config(**fields)


# ------------------------------------------------------------------- reading


@pytest.mark.parametrize(
  "path",
  [
    t5x_checkpoints.LEGACY,
    t5x_checkpoints.LEGACY / "checkpoint_7",
    t5x_checkpoints.LEGACY / "checkpoint_7" / "checkpoint",
    t5x_checkpoints.ORBAX,
    t5x_checkpoints.ORBAX / "checkpoint_7",
  ],
  ids=["legacy run", "legacy", "legacy file", "orbax run", "orbax"],
)
def test_golden_parameters(expected, path):
  params, config = expected
  assert_identical(checkpoints.load_params(path), params)
  assert checkpoints.load_config(path) is None
  flat = formats.open_params(path)
  assert parameters.infer_config(flat, setting="X", path="p") == config


@pytest.mark.parametrize(
  "options", [{"version": 0}, {"driver": "gcs"}, {"driver": "gfile"}]
)
def test_legacy_checkpoints_of_other_places_and_times(tmp_path, options):
  params = {
    "a": {"w": np.arange(12, dtype=np.float32).reshape(3, 4)},
    "b": np.asarray([1.5, -2.0], "bfloat16"),
  }
  t5x_checkpoints.write_legacy(tmp_path / "checkpoint_1", params, **options)
  assert_identical(checkpoints.load_params(tmp_path, dtype=None), params)


def test_small_arrays_within_the_msgpack_file(tmp_path):
  import flax.serialization

  params = {"scale": np.asarray([0.5, 2.0], np.float32)}
  content = {"version": 3, "optimizer": {"target": params, "state": {}}}
  (tmp_path / "checkpoint_3").mkdir()
  (tmp_path / "checkpoint_3" / "checkpoint").write_bytes(
    flax.serialization.msgpack_serialize(content)
  )
  assert_identical(checkpoints.load_params(tmp_path), params)


def test_scanned_layers_are_split(tmp_path, expected):
  params, config = expected
  scanned = t5x_checkpoints.scan(params, config)
  t5x_checkpoints.write_legacy(tmp_path / "checkpoint_1", scanned)
  flat = traverse_util.flatten_dict(params, sep="/")
  read = formats.open_params(tmp_path)
  assert parameters.infer_config(read, setting="X", path="p") == config
  for name in sorted(read, reverse=True):  # any order, not the file's
    np.testing.assert_array_equal(read[name].read(), flat[name])
  rows = read["decoder/layers_1/mlp/wo/kernel"].read((slice(3, 5), slice(None)))
  np.testing.assert_array_equal(
    rows, flat["decoder/layers_1/mlp/wo/kernel"][3:5]
  )
  assert_identical(checkpoints.load_params(tmp_path), params)


def test_biases_of_each_scanned_layer_are_no_t5_s(tmp_path, expected):
  params, config = expected
  scanned = t5x_checkpoints.scan(params, config)
  scanned["encoder"]["encoder"]["relpos_bias"]["rel_embedding"][0, 1, 0] += 1
  t5x_checkpoints.write_legacy(tmp_path / "checkpoint_1", scanned)
  with pytest.raises(ValueError) as error:
    checkpoints.load_params(tmp_path, setting="TEACHER_CHECKPOINT_PATH")
  assert "encoder/encoder/relpos_bias/rel_embedding" in message(error)
  assert "TEACHER_CHECKPOINT_PATH" in message(error)


def test_each_device_reads_its_part(expected, tmp_path):
  """Onto a 2 x 4 mesh, from every format."""
  params, config = expected
  mesh = jax.sharding.Mesh(
    np.asarray(jax.devices()).reshape(2, 4), ("data", "model")
  )

  shardings = partitioning.param_shardings(
    params,
    parameters.logical_axes(config),
    mesh,
    partitioning.FULLY_SHARDED_RULES,
  )
  like = jax.tree.map(
    lambda x, h: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h),
    params,
    shardings,
  )
  export.import_checkpoint(
    t5x_checkpoints.LEGACY, tmp_path / "gkd", dtype="bfloat16"
  )
  export.export_checkpoint(t5x_checkpoints.LEGACY, tmp_path / "hf", format="hf")
  for path in (
    t5x_checkpoints.LEGACY,
    t5x_checkpoints.ORBAX,
    tmp_path / "hf",
    tmp_path / "gkd",
  ):
    placed = checkpoints.load_params(path, like=like)
    for got, want, sharding in zip(
      *map(jax.tree.leaves, (placed, params, shardings)), strict=True
    ):
      assert got.sharding == sharding and got.dtype == np.float32
      if path.name == "gkd":
        want = want.astype("bfloat16").astype(np.float32)
      np.testing.assert_array_equal(got, want)


def test_a_part_is_read_without_the_rest(expected):
  flat = formats.open_params(t5x_checkpoints.ORBAX)
  asked = []

  def fetch(index):
    asked.append(index)
    return flat["token_embedder/embedding"].fetch(index)

  spied = stored_arrays.StoredArray((64, 16), np.dtype(np.float32), fetch)
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("model",))
  spec = jax.sharding.PartitionSpec("model", None)
  stored_arrays.place_tree(
    {"w": spied}, {"w": jax.sharding.NamedSharding(mesh, spec)}
  )
  assert [(i[0].start, i[0].stop) for i in asked] == [
    (8 * k, 8 * k + 8) for k in range(8)
  ]


# ------------------------------------------------------------------- writing


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp("t5x") / "run"
  export.export_checkpoint(t5x_checkpoints.LEGACY, folder, format="t5x")
  return folder


def test_what_is_written_has_t5x_s_tree_and_metadata(written, expected):
  ours, theirs = (
    written / "checkpoint_7",
    t5x_checkpoints.ORBAX / "checkpoint_7",
  )
  assert_identical(checkpoints.load_params(written), expected[0])

  def read(folder, name):
    return json.loads((folder / name).read_text())

  assert read(ours, "state/_METADATA") == read(theirs, "state/_METADATA")
  name = "state/array_metadatas/process_0"
  a, b = (
    sorted(read(folder, name)["array_metadatas"], key=str)
    for folder in (ours, theirs)
  )
  assert a == b
  name = "_CHECKPOINT_METADATA"
  a, b = (read(folder, name)["item_handlers"] for folder in (ours, theirs))
  assert a["state"] == b["state"]
  a, b = (
    {
      base64.b64decode(key).decode(): value
      for key, value in read(folder, "state/_sharding").items()
    }
    for folder in (ours, theirs)
  )
  assert a.keys() == b.keys()
  # T5X's file is of parameters that were replaced by unplaced ones.
  for key in a:
    if not key.startswith("target."):
      same = key
    else:
      same = f"state.param_states.{key.removeprefix('target.')}.v"
    assert a[key] == b[same], key


def test_the_optimizer_state_is_adafactor_s_before_its_first_step(tmp_path):
  config = network.T5Config(
    vocab_size=130,
    emb_dim=128,
    num_heads=1,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=4,
    mlp_dim=200,
  )
  shapes = parameters.shapes(config)
  flat = {
    name: stored_arrays.from_array(np.full(shape, 2, np.float32))
    for name, shape in shapes.items()
  }
  t5x.save_orbax(tmp_path, flat, config, step=0)
  from gkd_jax.checkpoints import orbax_arrays

  tree = orbax_arrays.saved_tree(tmp_path / "checkpoint_0", "x")["state"]
  slots = tree["param_states"]
  for path, sizes in {
    # Rows, columns, whole: T5X reduces over the larger axis for the rows.
    ("token_embedder", "embedding"): ((128,), (130,), (1,)),
    ("decoder", "logits_dense", "kernel"): ((128,), (130,), (1,)),
    ("encoder", "layers_0", "mlp", "wo", "kernel"): ((128,), (200,), (1,)),
    ("encoder", "layers_0", "attention", "out", "kernel"): (
      (1,),
      (1,),
      (4, 128),
    ),
    ("encoder", "encoder_norm", "scale"): ((1,), (1,), (128,)),
  }.items():
    found = slots
    for key in path:
      found = found[key]
    got = tuple(tuple(found[key].shape) for key in ("v_row", "v_col", "v"))
    assert got == sizes, path
    assert tuple(found["m"].shape) == (1,)
  arrays = orbax_arrays.orbax_arrays(tmp_path / "checkpoint_0", slots, "x")
  assert all(not np.any(x.read()) for x in arrays.values())


def test_a_checkpoint_of_the_step_is_not_written_over(written):
  before = sorted(p.name for p in written.iterdir())
  with pytest.raises(ValueError) as error:
    export.export_checkpoint(t5x_checkpoints.LEGACY, written, format="t5x")
  assert "checkpoint_7" in message(error) and "--output_path" in message(error)
  assert sorted(p.name for p in written.iterdir()) == before


def test_t5x_restores_what_is_written(written, expected):
  pytest.importorskip("t5x", reason="t5x is not on PyPI; see docs/from_t5x.md")
  from t5x import adafactor
  from t5x import checkpoints as t5x_checkpoints
  from t5x import partitioning as t5x_partitioning
  from t5x import train_state as t5x_train_state

  params, config = expected
  variables = jax.jit(
    lambda: network.Transformer(config).init(
      jax.random.key(1), *[np.ones((1, 3), np.int32)] * 3, enable_dropout=False
    )
  )()
  optimizer = adafactor.Adafactor(
    decay_rate=0.8,
    logical_factor_rules=adafactor.standard_logical_factor_rules(),
  )
  state = t5x_train_state.FlaxOptimTrainState.create(optimizer, variables)
  # On eight CPU devices T5X splits even two heads in eight: nothing is split.
  names = ("vocab", "embed", "mlp", "heads", "kv", "joined_kv")
  partitioner = t5x_partitioning.PjitPartitioner(
    num_partitions=1,
    logical_axis_rules=[(n, None) for n in (*names, "relpos_buckets")],
  )
  manager = t5x_checkpoints.OrbaxCheckpointManagerInterface(
    str(written), state, partitioner
  )
  assert manager.latest_step() == 7
  restored = manager.restore(step=7)
  assert int(restored.step) == 7
  for got, want in zip(
    *map(jax.tree.leaves, (dict(restored.params), params)), strict=True
  ):
    np.testing.assert_array_equal(got, want)
  for got, want in zip(
    *map(jax.tree.leaves, (restored.param_states, state.param_states)),
    strict=True,
  ):
    np.testing.assert_array_equal(got, want)
  gradients = jax.tree.map(lambda x: x + 1, restored.params)
  stepped = restored.apply_gradient(gradients, learning_rate=1e-2)
  assert int(stepped.step) == 8


# ------------------------------------------------------------- wrong inputs


def _file(folder, name):
  return folder / "checkpoint_1" / name


def _truncated_tree(folder):
  file = _file(folder, "checkpoint")
  file.write_bytes(file.read_bytes()[:-9])


def _no_target(folder):
  content = {"version": 3, "optimizer": {"state": {"step": 1}}}
  _file(folder, "checkpoint").write_bytes(msgpack.packb(content))


def _no_array(folder):
  shutil.rmtree(_file(folder, "target.a.w"))


def _no_chunk(folder):
  _file(folder, "target.a.w/1.0").unlink()


def _short_chunk(folder):
  file = _file(folder, "target.a.w/1.0")
  file.write_bytes(file.read_bytes()[:-12])


def _other_shape(folder):
  file = _file(folder, "checkpoint")
  content = msgpack.unpackb(file.read_bytes())
  content["optimizer"]["target"]["a"]["w"]["metadata"]["shape"] = [6, 2]
  file.write_bytes(msgpack.packb(content))


def _elsewhere(folder):
  file = _file(folder, "checkpoint")
  content = msgpack.unpackb(file.read_bytes())
  content["optimizer"]["target"]["a"]["w"]["kvstore"]["path"] = "../secret/"
  file.write_bytes(msgpack.packb(content))


@pytest.mark.parametrize(
  "damage, text",
  [
    (_truncated_tree, "a whole checkpoint"),
    (_no_target, "['state'] instead of 'target'"),
    (_no_array, "target.a.w"),
    (_no_chunk, "1 of 2 chunks"),
    (_short_chunk, "a whole checkpoint"),
    (_other_shape, "float32 (4, 3) instead of float32 (6, 2)"),
    (_elsewhere, "'../secret' instead of a folder beside the file"),
  ],
)
def test_a_damaged_legacy_checkpoint(tmp_path, damage, text):
  folder = tmp_path / "run"
  params = {"a": {"w": np.arange(1, 13, dtype=np.float32).reshape(4, 3)}}
  t5x_checkpoints.write_legacy(folder / "checkpoint_1", params, chunks=[2, 3])
  assert_identical(checkpoints.load_params(folder), params)
  damage(folder)
  with pytest.raises(ValueError) as error:
    checkpoints.load_params(folder, setting="TEACHER_CHECKPOINT_PATH")
  assert text in message(error), message(error)
  assert "TEACHER_CHECKPOINT_PATH" in message(error)
  with pytest.raises(ValueError):
    export.import_checkpoint(folder, tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_other_parameters_are_listed(tmp_path, expected):
  flat = traverse_util.flatten_dict(expected[0], sep="/")
  flat["decoder/layers_0/extra/kernel"] = np.zeros((2, 2), np.float32)
  flat["encoder/encoder_norm/scale"] = np.zeros(17, np.float32)
  del flat["encoder/layers_1/mlp/wo/kernel"]
  t5x_checkpoints.write_legacy(
    tmp_path / "checkpoint_1", traverse_util.unflatten_dict(flat, sep="/")
  )
  with pytest.raises(ValueError) as error:
    export.import_checkpoint(tmp_path, tmp_path / "out")
  assert (
    "1 missing: encoder/layers_1/mlp/wo/kernel; 1 unexpected:"
    " decoder/layers_0/extra/kernel; 1 wrong shape: encoder/encoder_norm/scale"
    " (expected (16,), got (17,)) in "
  ) in message(error)
