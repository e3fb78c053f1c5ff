"""Checkpoints: what is saved comes back bit for bit, or one clear sentence."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_states import (
  GOLDEN,
  BrokenIterator,
  CountingIterator,
  assert_identical,
  folders,
  make_state,
  message,
  opened,
  zeros_like,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gkd_jax import checkpoints

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


def test_metrics_recorded_after_the_save_choose_the_best(tmp_path):
  options = dict(keep=1, best_metric="wer", best_mode="min")
  with opened(tmp_path, **options) as checkpointer:
    for step, wer in enumerate([0.5, 0.2, 0.4], start=1):
      assert checkpointer.is_best({"wer": wer}) == (step < 3)
      checkpointer.save(step, {"x": jnp.int32(step)})
      assert checkpointer.record(step, {"wer": wer, "loss": 1.0})
    assert not checkpointer.record(9, {"wer": 0.1})
    assert not checkpointer.is_best({"wer": float("nan")})
    assert not checkpointer.is_best({"per": 0.1})
  with opened(tmp_path, **options) as checkpointer:
    assert checkpointer.best_step() == 2
    assert not checkpointer.is_best({"wer": 0.2})
    checkpointer.save(4, {"x": jnp.int32(4)})
    checkpointer.wait()
    assert folders(tmp_path) == ["checkpoint_2", "checkpoint_4"]
  assert checkpoints.saved_metrics(tmp_path, 2) == {"wer": 0.2, "loss": 1.0}
  assert checkpoints.saved_metrics(tmp_path, 4) == {}
  assert checkpoints.newest_step(tmp_path) == 4


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


def test_the_number_of_data_shards_is_read_from_the_newest_checkpoint(tmp_path):
  assert checkpoints.recorded_data_shards(tmp_path) is None
  for step, name in ((5, "shard_0-of-2"), (7, "shard_1-of-4")):
    (tmp_path / f"checkpoint_{step}" / "dataset" / name).mkdir(parents=True)
  assert checkpoints.recorded_data_shards(str(tmp_path)) == 4
  (tmp_path / "checkpoint_9" / "dataset" / "process_0-of-1").mkdir(parents=True)
  with pytest.raises(
    ValueError, match=r"got process_0-of-1 in .*INITIAL_CHECK"
  ):
    checkpoints.recorded_data_shards(tmp_path)


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


def test_kill_in_the_middle_of_an_async_save(tmp_path):
  partial = "checkpoint_2.orbax-checkpoint-tmp"
  moments = {
    tmp_path / "created": (tmp_path / "created" / partial).exists,
    tmp_path / "writing": lambda: (
      _bytes_below(tmp_path / "writing" / partial) > 2**20
    ),
  }
  with futures.ThreadPoolExecutor() as pool:
    left = list(pool.map(_kill_in_second_save, moments, moments.values()))
  # A slow machine may miss one moment, not both.
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
