"""Checkpoints: what is saved comes back bit for bit, or one clear sentence."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from concurrent import futures
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gkd_jax import checkpoints

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIG = {"vocab_size": 32, "mlp_activations": ["gelu", "linear"]}


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  opt_state: Any
  extra: Any = None


class CountingIterator:
  """Position and nothing else, in one file."""

  def __init__(self, position=0):
    self.position = position

  def save_state(self, path):
    pathlib.Path(path, "position").write_text(str(self.position))

  def restore_state(self, path):
    self.position = int(pathlib.Path(path, "position").read_text())


class BrokenIterator(CountingIterator):
  def save_state(self, path):
    pathlib.Path(path, "position").write_text("half")
    raise RuntimeError("the disk is full")


@contextlib.contextmanager
def opened(folder, **kwargs):
  checkpointer = checkpoints.Checkpointer(folder, **kwargs)
  yield checkpointer
  checkpointer.close()


def make_state(step=1, seed=0, optimizer=None):
  rng = np.random.default_rng(seed)
  params = {
    "encoder": {
      "kernel": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
      "scale": jnp.asarray(rng.normal(size=16), jnp.bfloat16),
    },
    "decoder": {"kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)},
  }
  optimizer = optimizer or optax.adamw(1e-3)
  opt_state = optimizer.init(params)
  # A fresh optimizer is full of zeros, which come back from a wrong read, too.
  _, opt_state = jax.jit(optimizer.update)(params, opt_state, params)
  return State(jnp.int32(step), params, opt_state)


def assert_identical(got, expected):
  """Same structure, types, dtypes and bits."""
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


def message(error):
  """The message, which has to be one sentence on one line."""
  text = str(error.value)
  assert "\n" not in text and len(text) < 900
  assert text.startswith("expected ") and "got " in text and "set " in text
  return text


def folders(path):
  return sorted(p.name for p in pathlib.Path(path).iterdir())


def zeros_like(state):
  return jax.tree.map(lambda x: x * 0, state)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize(
  "optimizer, async_save",
  [
    (optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)), False),
    (
      optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adafactor(1e-2, min_dim_size_to_factor=4, momentum=0.9),
      ),
      True,
    ),
  ],
  ids=["adamw", "adafactor"],
)
def test_state_comes_back_bit_for_bit(tmp_path, optimizer, async_save):
  state = make_state(7, optimizer=optimizer).replace(
    extra={
      "numpy": np.arange(5, dtype=np.int64),
      "int": 3,
      "float": 0.1,
      "key": jnp.asarray([1, 2**32 - 1], jnp.uint32),
      "special": jnp.asarray([jnp.nan, -jnp.inf, -0.0, 1e-45], jnp.float32),
    }
  )
  with opened(tmp_path / "run", async_save=async_save) as checkpointer:
    assert checkpointer.latest_step() is None
    assert checkpointer.save(7, state)
  with opened(tmp_path / "run") as checkpointer:
    restored = checkpointer.restore(7, zeros_like(state))
  assert_identical(restored, state)
  assert type(restored.extra["int"]) is int
  assert type(restored.extra["float"]) is float


def test_sharded_state_is_restored_onto_another_mesh(tmp_path):
  devices = np.asarray(jax.devices())
  first = jax.sharding.Mesh(devices.reshape(4, 2), ("data", "model"))
  second = jax.sharding.Mesh(devices[:4].reshape(1, 4), ("data", "model"))
  value = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
  state = {
    "a": jax.device_put(value, NamedSharding(first, P("data", "model"))),
    "b": jax.device_put(value, NamedSharding(first, P(None, "model"))),
    "c": jax.device_put(value[0], NamedSharding(first, P())),
  }
  wanted = {"a": P(None, "model"), "b": P("model"), "c": P("data")}
  abstract = {
    name: jax.ShapeDtypeStruct(
      state[name].shape, jnp.float32, sharding=NamedSharding(second, spec)
    )
    for name, spec in wanted.items()
  }
  with opened(tmp_path) as checkpointer:
    checkpointer.save(1, state)
    restored = checkpointer.restore(1, abstract)
    unplaced = checkpointer.restore(1, jax.eval_shape(lambda: state))
    cast = checkpointer.restore(
      1, jax.eval_shape(lambda: jax.tree.map(jnp.bfloat16, state))
    )
  for name in state:
    assert restored[name].sharding == abstract[name].sharding
    np.testing.assert_array_equal(restored[name], state[name])
    np.testing.assert_array_equal(unplaced[name], state[name])
    assert len(unplaced[name].sharding.device_set) == 1
    np.testing.assert_array_equal(cast[name], state[name].astype(jnp.bfloat16))


@pytest.mark.parametrize("spec", [P(), P("data")])
def test_what_is_saved_is_the_state_before_it_was_donated(tmp_path, spec):
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
  sharding = NamedSharding(mesh, spec)
  # Large enough for the write to go on after `save` has returned.
  old = np.arange(2**22, dtype=np.float32).reshape(64, -1)
  bump = jax.jit(lambda x: x + 1, donate_argnums=0)
  bump(jax.device_put(old, sharding)).block_until_ready()
  host = np.zeros(5)
  array = jax.device_put(old, sharding)
  with opened(tmp_path) as checkpointer:
    checkpointer.save(1, {"w": array, "host": host})
    host += 7
    new = bump(bump(array)).block_until_ready()
    restored = checkpointer.restore(1, {"w": new, "host": host})
  np.testing.assert_array_equal(restored["w"], old)
  np.testing.assert_array_equal(restored["host"], np.zeros(5))


# ------------------------------------------------------- which ones are kept


def save_all(folder, metrics, **kwargs):
  with opened(folder, **kwargs) as checkpointer:
    for step, value in enumerate(metrics, start=1):
      checkpointer.save(
        step,
        {"x": jnp.int32(step)},
        metrics=None if value is None else {"wer": value, "loss": 9 - step},
      )


@pytest.mark.parametrize("async_save", [True, False])
def test_the_newest_are_kept(tmp_path, async_save):
  save_all(tmp_path, [None] * 5, keep=2, async_save=async_save)
  assert folders(tmp_path) == ["checkpoint_4", "checkpoint_5"]
  with opened(tmp_path, keep=2) as checkpointer:
    assert checkpointer.latest_step() == 5
    assert checkpointer.best_step() is None
    assert checkpointer.restore(4, {"x": jnp.int32(0)})["x"] == 4


def test_none_keeps_all(tmp_path):
  save_all(tmp_path, [None] * 5, keep=None)
  assert len(folders(tmp_path)) == 5


@pytest.mark.parametrize(
  "mode, values, kept, best",
  [
    ("min", [0.5, 0.2, 0.4, 0.9, 0.8], [2, 5], 2),
    ("max", [0.5, 0.2, 0.4, 0.9, 0.8], [4, 5], 4),
    ("max", [0.9, 0.2, 0.4, 0.9, 0.8], [4, 5], 4),
    ("min", [0.2, 0.2, 0.4, 0.9, 0.8], [2, 5], 2),
    ("max", [0.7, float("nan"), 0.1, None, 0.2], [1, 5], 1),
    ("min", [0.1, float("nan"), 0.7, None, None], [1, 5], 1),
    ("min", [None, None, float("nan"), None, None], [3, 5], None),
  ],
)
def test_the_best_is_kept_and_known_after_a_reopen(
  tmp_path, mode, values, kept, best
):
  options = dict(keep=1, best_metric="wer", best_mode=mode)
  save_all(tmp_path, values, **options)
  steps = {int(name.removeprefix("checkpoint_")) for name in folders(tmp_path)}
  if best is not None:
    assert steps == set(kept)
  with opened(tmp_path, **options) as checkpointer:
    assert (checkpointer.latest_step(), checkpointer.best_step()) == (5, best)
    # Worse ones to come do not push it out.
    checkpointer.save(6, {"x": jnp.int32(6)}, metrics={"wer": 0.45})
    if best is not None:
      assert checkpointer.best_step() == best
      assert folders(tmp_path) == [f"checkpoint_{best}", "checkpoint_6"]


def test_a_later_process_may_choose_by_another_metric(tmp_path):
  save_all(tmp_path, [0.1, 0.2, 0.3])
  with opened(tmp_path, best_metric="loss", best_mode="max") as checkpointer:
    assert checkpointer.best_step() == 1


def test_the_second_best_is_kept_too(tmp_path):
  values = [0.3, 0.1, 0.2, 0.9, 0.8]
  save_all(
    tmp_path,
    values,
    keep=1,
    best_metric="wer",
    best_mode="min",
    keep_best=2,
  )
  assert folders(tmp_path) == ["checkpoint_2", "checkpoint_3", "checkpoint_5"]


def test_an_old_checkpoint_is_renamed_whole_before_it_is_deleted(tmp_path):
  with opened(tmp_path, keep=1) as checkpointer:
    checkpointer.save(1, {"x": jnp.int32(1)})
    checkpointer.wait()
    content = folders(tmp_path / "checkpoint_1")
    checkpointer.save(2, {"x": jnp.int32(2)})
    removed = tmp_path / ".deleted" / "checkpoint_1"
    deadline = time.monotonic() + 20
    while not removed.exists() and time.monotonic() < deadline:
      time.sleep(0.01)
    assert folders(removed) == content
    checkpointer.wait()
    assert folders(tmp_path) == ["checkpoint_2"]
  # A process that was killed while it deleted leaves the rest to the next.
  (tmp_path / ".deleted" / "checkpoint_1" / "state").mkdir(parents=True)
  with opened(tmp_path) as checkpointer:
    assert checkpointer.latest_step() == 2
  assert folders(tmp_path) == ["checkpoint_2"]


def test_a_step_is_saved_once_and_never_before_the_newest(tmp_path):
  with opened(tmp_path) as checkpointer:
    assert checkpointer.save(5, {"x": jnp.int32(1)})
    assert not checkpointer.save(5, {"x": jnp.int32(2)})
    assert checkpointer.restore(5, {"x": jnp.int32(0)})["x"] == 1
    with pytest.raises(ValueError) as error:
      checkpointer.save(4, {"x": jnp.int32(2)})
    assert "above 5" in message(error) and "MODEL_DIR" in message(error)


# ------------------------------------------------------------- data iterators


def test_the_iterator_is_saved_at_the_position_of_its_step(tmp_path):
  iterator = CountingIterator()
  with opened(tmp_path) as checkpointer:
    for step in (1, 2):
      iterator.position = 10 * step
      checkpointer.save(step, {"x": jnp.int32(step)}, dataset_iterator=iterator)
      iterator.position += 1
    for step in (1, 2):
      checkpointer.restore(step, {"x": jnp.int32(0)}, iterator)
      assert iterator.position == 10 * step
  assert (
    tmp_path / "checkpoint_1" / "dataset" / "position"
  ).read_text() == "10"


def test_a_tf_data_pipeline_goes_on_where_it_was(tmp_path):
  import tensorflow as tf

  class TfIterator:
    def __init__(self):
      dataset = tf.data.Dataset.range(40).shuffle(16, seed=3).repeat().batch(8)
      self._iterator = iter(dataset)
      self._saver = tf.train.Checkpoint(iterator=self._iterator)

    def __next__(self):
      return next(self._iterator).numpy().tolist()

    def save_state(self, path):
      self._saver.write(os.path.join(path, "iterator"))

    def restore_state(self, path):
      self._saver.read(os.path.join(path, "iterator")).assert_consumed()

  iterator = TfIterator()
  before = [next(iterator) for _ in range(7)]
  with opened(tmp_path) as checkpointer:
    checkpointer.save(7, {"x": jnp.int32(7)}, dataset_iterator=iterator)
    expected = [next(iterator) for _ in range(9)]
  other = TfIterator()
  with opened(tmp_path) as checkpointer:
    checkpointer.restore(7, {"x": jnp.int32(0)}, other)
  assert [next(other) for _ in range(9)] == expected
  assert before[:2] != expected[:2]


def test_a_failing_iterator_leaves_no_checkpoint(tmp_path):
  with opened(tmp_path) as checkpointer:
    checkpointer.save(1, {"x": jnp.int32(1)})
    with pytest.raises(RuntimeError, match="disk is full"):
      checkpointer.save(
        2, {"x": jnp.int32(2)}, dataset_iterator=BrokenIterator()
      )
    assert checkpointer.latest_step() == 1
    checkpointer.save(3, {"x": jnp.int32(3)})
  with opened(tmp_path) as checkpointer:
    assert checkpointer.latest_step() == 3
    checkpointer.save(4, {"x": jnp.int32(4)})
  assert folders(tmp_path) == ["checkpoint_1", "checkpoint_3", "checkpoint_4"]


def test_an_error_of_the_background_write_is_raised(tmp_path):
  big = jnp.asarray(np.random.default_rng(0).normal(size=2**23), jnp.float32)
  checkpointer = checkpoints.Checkpointer(tmp_path)
  checkpointer.save(1, {"x": big})
  # What it is to be renamed to is taken.
  (tmp_path / "checkpoint_1" / "mine").mkdir(parents=True)
  with pytest.raises(Exception, match="checkpoint_1"):
    checkpointer.wait()
  assert checkpointer.latest_step() is None
  assert folders(tmp_path / "checkpoint_1") == ["mine"]
  # The run may go on, and try again.
  shutil.rmtree(tmp_path / "checkpoint_1")
  checkpointer.save(1, {"x": big})
  checkpointer.close()
  assert folders(tmp_path) == ["checkpoint_1"]


# ------------------------------------------------------------------- kill -9

_CHILD = """
import sys
import jax.numpy as jnp, numpy as np
from gkd_jax import checkpoints
def state(step):
  x = np.random.default_rng(step).normal(size=2**24).astype(np.float32)
  return {"step": jnp.int32(step), "x": jnp.asarray(x)}
first, second = state(1), state(2)
checkpointer = checkpoints.Checkpointer(sys.argv[1])
checkpointer.save(1, first)
checkpointer.wait()
print("saving", flush=True)
checkpointer.save(2, second)
checkpointer.close()
print("saved", flush=True)
"""


def _bytes_below(folder):
  total = 0
  for path, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        total += os.stat(os.path.join(path, name)).st_size
  return total


def _kill_in_second_save(folder, condition):
  """Runs a child, kills it when `condition()` holds; says what it left."""
  child = subprocess.Popen(
    [sys.executable, "-c", _CHILD, str(folder)],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    cwd=GOLDEN.parent.parent,
  )
  assert child.stdout.readline() == "saving\n"
  while not condition() and child.poll() is None:
    time.sleep(0.001)
  child.send_signal(signal.SIGKILL)
  child.wait()
  child.stdout.close()
  return [name for name in folders(folder) if "tmp" in name]


def _after(seconds):
  start = []

  def condition():
    start.append(time.monotonic())
    return start[-1] - start[0] > seconds

  return condition


def test_kill_in_the_middle_of_an_async_save(tmp_path):
  partial = "checkpoint_2.orbax-checkpoint-tmp"
  moments = {
    tmp_path / "created": (tmp_path / "created" / partial).exists,
    tmp_path / "writing": lambda: (
      _bytes_below(tmp_path / "writing" / partial) > 2**20
    ),
    tmp_path / "some_time": _after(0.15),
  }
  with futures.ThreadPoolExecutor() as pool:
    left = list(pool.map(_kill_in_second_save, moments, moments.values()))
  # A slow machine may miss one moment, not all of them.
  assert [partial] in left
  abstract = {
    "step": jax.ShapeDtypeStruct((), jnp.int32),
    "x": jax.ShapeDtypeStruct((2**24,), jnp.float32),
  }
  for run, found in zip(moments, left, strict=True):
    step = 2 if not found and (run / "checkpoint_2").exists() else 1
    expected = np.random.default_rng(step).normal(size=2**24)
    with opened(run) as checkpointer:
      assert checkpointer.latest_step() == step
      restored = checkpointer.restore(step, abstract)
      assert restored["step"] == step
      np.testing.assert_array_equal(restored["x"], expected.astype(np.float32))
      checkpointer.save(step + 1, {"step": jnp.int32(step + 1)})
    assert folders(run) == [f"checkpoint_{s}" for s in range(1, step + 2)]
    shutil.rmtree(run)


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


# ------------------------------------------------------------- wrong inputs


def _truncated_safetensors(folder):
  checkpoints.save_safetensors(folder, {"w": np.zeros(100)}, CONFIG)
  weights = folder / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-40])


def _weights_without_config(folder):
  checkpoints.save_safetensors(folder, {"w": np.zeros(4)}, CONFIG)
  (folder / "config.json").unlink()


def _config_is_no_json(folder):
  checkpoints.save_safetensors(folder, {"w": np.zeros(4)}, CONFIG)
  (folder / "config.json").write_text("{")


def _orbax_without_params(folder):
  with opened(folder) as checkpointer:
    checkpointer.save(1, {"weights": jnp.zeros(3)})


def _no_metadata_text(folder):
  with opened(folder) as checkpointer:
    checkpointer.save(1, make_state())
  (folder / "checkpoint_1" / "state" / "_METADATA").write_text("{")


def big_state():
  # Small arrays lie with the names, large ones in files of their own. One only,
  # because Orbax leaves the reads after the first that fails to a closed loop.
  value = np.random.default_rng(0).normal(size=2**15)
  return {"params": {"w": jnp.asarray(value, jnp.float32)}}


def _no_arrays(folder):
  with opened(folder) as checkpointer:
    checkpointer.save(1, big_state())
  shutil.rmtree(folder / "checkpoint_1" / "state" / "ocdbt.process_0")


def _truncated_arrays(folder):
  with opened(folder) as checkpointer:
    checkpointer.save(1, big_state())
  data = folder / "checkpoint_1" / "state" / "ocdbt.process_0" / "d"
  for file in data.iterdir():
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _no_names(folder):
  with opened(folder) as checkpointer:
    checkpointer.save(1, big_state())
  shutil.rmtree(folder / "checkpoint_1" / "state" / "d")


def _unfinished(folder):
  with opened(folder / "a") as checkpointer:
    checkpointer.save(1, make_state())
  (folder / "a" / "checkpoint_1").rename(
    folder / "checkpoint_1.orbax-checkpoint-tmp"
  )


@pytest.mark.parametrize(
  "make, name, text",
  [
    (None, "nowhere", "got nothing at "),
    (None, "", "got nothing in "),
    (lambda f: (f / "a.txt").write_text(""), "a.txt", "got the file "),
    (lambda f: [(f / str(i)).mkdir() for i in range(9)], "", "0, 1, 2, 3, 4, "),
    (_truncated_safetensors, "", "a whole safetensors file"),
    (_weights_without_config, "", "got model.safetensors in"),
    (_config_is_no_json, "", "expected a JSON object"),
    (_orbax_without_params, "", "got ['weights']"),
    (_no_metadata_text, "", "a whole checkpoint"),
    (_no_arrays, "", "a whole checkpoint"),
    (_truncated_arrays, "", "a whole checkpoint"),
    (_no_names, "", "a whole checkpoint"),
    (_unfinished, "checkpoint_1.orbax-checkpoint-tmp", "still being written"),
    (_unfinished, "", "got a, checkpoint_1.orbax-checkpoint-tmp in"),
  ],
)
def test_a_path_that_holds_no_parameters(tmp_path, make, name, text):
  if make is not None:
    make(tmp_path)
  with pytest.raises(ValueError) as error:
    checkpoints.load_params(tmp_path / name, setting="TEACHER_CHECKPOINT_PATH")
  assert text in message(error)
  assert "TEACHER_CHECKPOINT_PATH" in message(error)
  assert str(tmp_path) in message(error)


@pytest.mark.parametrize(
  "break_it, state",
  [
    (_no_metadata_text, make_state),
    (_no_arrays, big_state),
    (_truncated_arrays, big_state),
    (_no_names, big_state),
  ],
)
def test_a_damaged_checkpoint_is_not_resumed(tmp_path, break_it, state):
  break_it(tmp_path)
  with opened(tmp_path) as checkpointer, pytest.raises(ValueError) as error:
    checkpointer.restore(1, state())
  assert "a whole checkpoint" in message(error)
  assert "checkpoint_1" in message(error)
  assert "delete this folder" in message(error)


def test_a_damaged_iterator_is_not_resumed(tmp_path):
  with opened(tmp_path) as checkpointer:
    checkpointer.save(
      1, {"x": jnp.int32(1)}, dataset_iterator=CountingIterator(3)
    )
    checkpointer.wait()
    dataset = tmp_path / "checkpoint_1" / "dataset"
    (dataset / "position").write_text("")
    with pytest.raises(ValueError) as error:
      checkpointer.restore(1, {"x": jnp.int32(0)}, CountingIterator())
    assert "a whole checkpoint" in message(error)
    shutil.rmtree(dataset)
    with pytest.raises(ValueError) as error:
      checkpointer.restore(1, {"x": jnp.int32(0)}, CountingIterator())
  assert "folder dataset, got " in message(error)


def test_restore_of_what_is_not_there(tmp_path):
  state = make_state()
  with opened(tmp_path) as checkpointer:
    checkpointer.save(1, state)
    with pytest.raises(ValueError) as error:
      checkpointer.restore(2, state)
    assert "[1]" in message(error)
    with pytest.raises(ValueError) as error:
      checkpointer.restore(1, state, CountingIterator())
    assert "folder dataset, got " in message(error)
    other = state.replace(
      params={**state.params, "decoder": {"kernel": jnp.zeros((16, 9))}},
      opt_state=optax.sgd(0.1).init(state.params),
    )
    with pytest.raises(ValueError) as error:
      checkpointer.restore(1, other)
  assert "params/decoder/kernel (expected (16, 9), got (16, 8))" in message(
    error
  )
  assert "unexpected: opt_state/0/count" in message(error)


def test_check_matches_lists_the_first_differences():
  expected = {f"layer_{i}": {"w": jnp.zeros((2, 3))} for i in range(9)}
  checkpoints.check_matches(expected, expected, setting="X", path="p")
  got = {
    "layer_0": {"w": jnp.zeros((3, 2))},
    "layer_1": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(1)},
  }
  with pytest.raises(ValueError) as error:
    checkpoints.check_matches(
      got, expected, setting="TEACHER_CHECKPOINT_PATH", path="/the/path"
    )
  assert message(error) == (
    "expected 9 arrays of the configured model, got 3 with other names or"
    " shapes in /the/path (7 missing: layer_2/w, layer_3/w, layer_4/w,"
    " layer_5/w, layer_6/w, ...; 1 unexpected: layer_1/b; 1 wrong shape:"
    " layer_0/w (expected (2, 3), got (3, 2))); set TEACHER_CHECKPOINT_PATH to"
    " a checkpoint of this model, or configure the model that wrote it"
  )


@pytest.mark.parametrize(
  "kwargs, text",
  [
    ({"keep": 0}, "set keep"),
    ({"keep_best": -1}, "set keep_best"),
    ({"best_mode": "most"}, "set best_mode"),
  ],
)
def test_wrong_arguments(tmp_path, kwargs, text):
  with pytest.raises(ValueError) as error:
    checkpoints.Checkpointer(tmp_path / "run", **kwargs)
  assert text in message(error)
  assert folders(tmp_path) == []


def test_a_metric_that_was_not_computed(tmp_path):
  with opened(tmp_path, best_metric="wer") as checkpointer:
    with pytest.raises(ValueError) as error:
      checkpointer.save(1, {"x": jnp.int32(1)}, metrics={"per": 0.1})
    assert "'wer'" in message(error) and "['per']" in message(error)
    assert "best_metric" in message(error)
    assert checkpointer.latest_step() is None
