"""Checkpoints that are damaged or not there: one clear sentence each."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_states import (
  CONFIG,
  CountingIterator,
  folders,
  make_state,
  message,
  opened,
)

from gkd_jax import checkpoints
from gkd_jax.checkpoints import errors

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
  assert "move this folder out of MODEL_DIR" in message(error)


def test_an_error_about_the_position_keeps_its_words(tmp_path):
  with opened(tmp_path) as checkpointer:
    checkpointer.save(
      1, {"x": jnp.int32(1)}, dataset_iterator=CountingIterator(3)
    )
    checkpointer.wait()
    dataset = tmp_path / "checkpoint_1" / "dataset"
    (dataset / "position").write_text("")
    with pytest.raises(ValueError, match="invalid literal for int") as error:
      checkpointer.restore(1, {"x": jnp.int32(0)}, CountingIterator())
    shutil.rmtree(dataset)
    with pytest.raises(ValueError) as error:
      checkpointer.restore(1, {"x": jnp.int32(0)}, CountingIterator())
  assert "folder dataset, got " in message(error)
  assert "SAVE_DATA_POSITION = False" in message(error)


@pytest.mark.parametrize(
  "error",
  [
    PermissionError(13, "Permission denied"),
    ValueError("UNAVAILABLE: Error reading"),
    OSError(28, "No space left on device"),
  ],
)
def test_errors_that_are_not_of_the_files_keep_their_words(error):
  with pytest.raises(type(error)) as raised, errors.whole("a", "set b"):
    raise error
  assert raised.value is error


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_not_saved(tmp_path, value):
  state = make_state()
  scale = state.params["encoder"]["scale"]
  bad = state.replace(
    params=state.params
    | {"encoder": state.params["encoder"] | {"scale": scale.at[3].set(value)}}
  )
  with opened(tmp_path) as checkpointer:
    checkpointer.save(1, state)
    with pytest.raises(ValueError) as error:
      checkpointer.save(2, bad)
    assert "in 1 of 3 arrays (encoder/scale)" in message(error)
    assert checkpointer.latest_step() == 1


def test_a_checkpoint_that_is_not_finite_is_not_resumed(tmp_path):
  """An older version may have saved it."""
  state = make_state()
  bad = jax.tree.map(lambda x: x * jnp.nan, state.params)
  with opened(tmp_path) as checkpointer:
    # Of a dict the parameters are not looked at.
    checkpointer.save(1, vars(state) | {"params": bad})
    with pytest.raises(ValueError) as error:
      checkpointer.restore(1, state)
  assert "in 3 of 3 arrays" in message(error)
  assert "checkpoint_1" in message(error) and "delete" not in message(error)


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
    assert "BEST_METRIC" in message(error)
    assert checkpointer.latest_step() is None
