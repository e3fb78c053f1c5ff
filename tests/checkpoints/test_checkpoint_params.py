"""Parameters from a run, from T5X and from safetensors, and exported."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from checkpoint_states import (
  CONFIG,
  GOLDEN,
  State,
  assert_identical,
  folders,
  make_state,
  message,
  opened,
)
from flax import traverse_util

from gkd_jax import checkpoints

# ------------------------------------------------- parameters from some path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of two checkpoints with another's remains beside them."""
  folder = tmp_path_factory.mktemp("model_dir")
  with opened(folder) as checkpointer:
    for step in (2, 10):
      checkpointer.save(
        step, make_state(step, seed=step), config=CONFIG, metrics={"wer": 0.5}
      )
  shutil.copytree(
    folder / "checkpoint_2", folder / "checkpoint_11.orbax-checkpoint-tmp"
  )
  (folder / "checkpoint_best").mkdir()
  (folder / "checkpoint_notes.txt").write_text("mine")
  (folder / "train").mkdir()
  return folder


@pytest.mark.parametrize("name, step", [("", 10), ("checkpoint_2", 2)])
def test_load_params_of_a_run(run, name, step):
  params = checkpoints.load_params(run / name, dtype=None)
  expected = jax.tree.map(np.asarray, make_state(seed=step).params)
  assert_identical(params, expected)
  assert checkpoints.load_config(run / name) == CONFIG


def test_params_are_read_without_the_optimizer(tmp_path):
  weights = np.random.default_rng(0).normal(size=2**16).astype(np.float32)
  moments = np.random.default_rng(1).normal(size=2**22).astype(np.float32)
  with opened(tmp_path) as checkpointer:
    checkpointer.save(
      1, State(jnp.int32(1), {"w": jnp.asarray(weights)}, jnp.asarray(moments))
    )

  def bytes_read():
    metrics = tensorstore.experimental_collect_matching_metrics(
      "/tensorstore/kvstore/file/bytes_read"
    )
    return sum(value["value"] for m in metrics for value in m["values"])

  before = bytes_read()
  params = checkpoints.load_params(tmp_path)
  np.testing.assert_array_equal(params["w"], weights)
  assert list(params) == ["w"]
  read = bytes_read() - before
  assert weights.nbytes * 0.8 < read < moments.nbytes * 0.2


def test_load_params_of_t5x_in_orbax(tmp_path):
  flat = traverse_util.flatten_dict(
    checkpoints.load_params(GOLDEN / "t5x_orbax" / "checkpoint_7"), sep="/"
  )
  digest = hashlib.sha256()
  for name in sorted(flat):
    digest.update(name.encode())
    digest.update(flat[name].tobytes())
  # Of the same parameters as T5X's own process dumped them to an npz.
  assert digest.hexdigest() == (
    "56c105cdbbc0025c43258c742a54a2ab831ee666e7820b5dd161335a3a41a224"
  )
  assert checkpoints.load_config(GOLDEN / "t5x_orbax") is None


def test_safetensors_round_trip(tmp_path):
  params = {
    "encoder": {
      "kernel": np.arange(12, dtype=np.float32).reshape(3, 4).T,
      "scale": jnp.asarray([1.5, -2.25], jnp.bfloat16),
    },
    "step": np.int32(3),
    "half": np.asarray([[0.5]], np.float16),
  }
  folder = tmp_path / "export" / "model"
  for _ in range(2):  # the second time over what is there
    checkpoints.save_safetensors(folder, params, CONFIG)
    expected = jax.tree.map(np.asarray, params)
    for path in (folder, folder / "model.safetensors"):
      assert_identical(checkpoints.load_params(path, dtype=None), expected)
      assert checkpoints.load_config(path) == CONFIG
    (folder / "README.md").write_text("mine")
  assert folders(tmp_path / "export") == ["model"]
  assert folders(folder) == ["README.md", "config.json", "model.safetensors"]
  written = json.loads((folder / "config.json").read_text())
  assert written == {"format": "gkd_jax", **CONFIG}
  alone = tmp_path / "alone.safetensors"
  shutil.copy(folder / "model.safetensors", alone)
  assert_identical(checkpoints.load_params(alone, dtype=None), expected)
  assert checkpoints.load_config(alone) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_export_is_read_back_as_float32(tmp_path, dtype):
  # 1 + 2^-8 lies halfway between two bfloat16 and rounds to the even 1; 1 +
  # 3 * 2^-8 rounds to 1 + 2^-6. float16 holds both.
  values = np.asarray([1 + 2**-8, 1 + 3 * 2**-8, -0.5], np.float32)
  rounded = {
    "bfloat16": np.asarray([1, 1 + 2**-6, -0.5], np.float32),
    "float16": values,
  }[dtype]
  params = {"w": values, "steps": np.asarray([2**24 + 1], np.int32)}
  checkpoints.save_safetensors(tmp_path / "m", params, CONFIG, dtype=dtype)
  stored = checkpoints.load_params(tmp_path / "m", dtype=None)
  assert (stored["w"].dtype, stored["steps"].dtype) == (dtype, np.int32)
  read = checkpoints.load_params(tmp_path / "m")
  assert_identical(read, {"w": rounded, "steps": params["steps"]})


def test_numbers_that_a_narrow_type_cannot_hold(tmp_path):
  params = {"a": {"w": np.asarray([1.0, 7e4, np.inf], np.float32)}}
  checkpoints.save_safetensors(tmp_path / "m", params, {}, dtype="bfloat16")
  with pytest.raises(ValueError) as error:
    checkpoints.save_safetensors(tmp_path / "n", params, {}, dtype="float16")
  assert "got 7e+04 in a/w" in message(error)
  assert folders(tmp_path) == ["m"]


def test_safetensors_layout_is_what_the_library_reads(tmp_path):
  from safetensors import numpy as library

  value = np.arange(6, dtype=np.float32).reshape(2, 3)
  checkpoints.save_safetensors(tmp_path / "m", {"a": {"b": value.T}}, {})
  read = library.load_file(tmp_path / "m" / "model.safetensors")
  assert list(read) == ["a/b"]
  np.testing.assert_array_equal(read["a/b"], value.T)


@pytest.mark.parametrize(
  "params, config, text",
  [
    ({"a/b": np.zeros(1)}, {}, "without '/'"),
    ({"a": np.zeros(1)}, {"format": "mine"}, "reserved key 'format'"),
    ({"a": np.zeros(1)}, {"dtype": jnp.float32}, "JSON-able"),
  ],
)
def test_what_cannot_be_exported(tmp_path, params, config, text):
  with pytest.raises(ValueError, match=text):
    checkpoints.save_safetensors(tmp_path / "m", params, config)
  assert folders(tmp_path) == []
