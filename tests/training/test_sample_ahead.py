"""Outputs of one update earlier: which, in what order, and after a restart."""

import functools
import itertools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_models

from gkd_jax import data, models, partitioning, training
from gkd_jax.models import importance

ROOT = pathlib.Path(__file__).parents[2]
SEED = 7


class Numbered:
  """A saveable iterator over batches made of their number."""

  def __init__(self):
    self.position = 0

  def __next__(self):
    self.position += 1
    return of_data(self.position - 1)

  def save_state(self, path):
    if jax.process_index() == 0:
      pathlib.Path(path, "position").write_text(str(self.position))

  def restore_state(self, path):
    self.position = int(pathlib.Path(path, "position").read_text())


def of_data(number):
  """This process's rows of a batch."""
  rows = 8 // jax.process_count()
  start = rows * jax.process_index()
  batch = toy_models.batch(seed=number)
  return {name: x[start : start + rows] for name, x in batch.items()}


def make(model, mesh):
  return training.RolloutBatches(
    Numbered(), model, data.load_task("arithmetic_cot"), seed=SEED, mesh=mesh
  )


@functools.partial(jax.jit, donate_argnums=0)
def update(params, batch):
  """New parameters in place of the old ones, from what the batch holds."""
  size = 1 - 0.05 * jnp.mean(batch[importance.LOG_PROBS])
  return jax.tree.map(lambda x: size * x, params)


def train(batches, params, steps):
  """The parameters before each step, each step's batch, and the last ones."""
  before, used = [], []
  for step in steps:
    before.append(jax.tree.map(np.array, params))
    used.append(batches.next(step, params))
    params = update(params, used[-1])
  return before, used, params


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    np.testing.assert_array_equal(x, y)


def in_step(model):
  """What an on-policy step of these parameters would train on."""

  @jax.jit
  def run(params, batch, step):
    key = jax.random.fold_in(jax.random.key(SEED), step)
    encoded = model.student.encode(params, batch)
    sample_key = jax.random.split(key, 3)[1]
    rows = np.arange(8)
    return model._with_samples(params, encoded, batch, None, sample_key, rows)[
      0
    ]

  return run


def log_probs(logits, batch):
  """Of the batch's tokens, without PAD, in float64."""
  logits = np.array(logits, np.float64)[..., 1:]
  law = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  targets = batch["decoder_target_tokens"]
  ids = np.maximum(targets - 1, 0)[..., None]
  return np.take_along_axis(law, ids, axis=-1)[..., 0] * (targets > 0)


def test_outputs_are_one_update_old_and_a_resumed_run_is_the_same(tmp_path):
  mesh = partitioning.make_mesh(1, jax.devices()[:2])
  model, params, _ = toy_models.gkd(sample_ahead=True)
  params = jax.device_put(params, partitioning.replicated(mesh))
  batches = make(model, mesh)
  every, used, params = train(batches, params, range(2))
  batches.save_state(tmp_path)
  saved = jax.tree.map(np.array, params)
  later, more, params = train(batches, params, range(2, 4))
  every += later
  expected_of, logits = in_step(model), jax.jit(model.student.logits)
  for step, batch in enumerate(used + more):
    old = every[max(step - 1, 0)]
    expected = expected_of(old, of_data(step), step)
    for name, x in expected.items():
      np.testing.assert_array_equal(batch[name], x, err_msg=name)
    found = batch[importance.LOG_PROBS]
    expected = log_probs(logits(old, batch), batch)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    if step:
      fresh = log_probs(logits(every[step], batch), batch)
      assert np.abs(fresh - found).max() > 1e-2

  resumed = make(model, mesh)
  resumed.restore_state(tmp_path)
  again = jax.device_put(saved, partitioning.replicated(mesh))
  _, repeated, last = train(resumed, again, range(2, 4))
  assert_equal(repeated, more)
  assert_equal(last, params)
  other = make(model, partitioning.make_mesh(1, jax.devices()[:4]))
  other.restore_state(tmp_path)
  drawn = other._ahead._drawn
  assert_equal(jax.tree.map(np.asarray, drawn), more[0])
  assert {len(x.sharding.device_set) for x in drawn.values()} == {4}

  plain = make(toy_models.gkd()[0], mesh)
  with pytest.raises(ValueError, match="set SAMPLE_AHEAD = True as the run"):
    plain.restore_state(tmp_path)


def test_a_coin_for_each_step_says_which_batches_are_drawn(tmp_path):
  mesh = partitioning.make_mesh(1, jax.devices()[:2])
  model, params, _ = toy_models.gkd(
    sample_ahead=True, student_data_fraction=0.5
  )
  batches = make(model, mesh)
  sources = []
  for step in range(8):
    sources.append(training.source_of_step(model, SEED, step))
    batch = batches.next(step, params)
    if sources[-1] == "data":
      assert_equal(batch, of_data(step))
    else:
      inputs = of_data(step)["encoder_input_tokens"]
      np.testing.assert_array_equal(batch["encoder_input_tokens"], inputs)
      assert np.abs(batch[importance.LOG_PROBS]).max() > 0.1
    folder = tmp_path / str(step)
    folder.mkdir()
    batches.save_state(folder)
    after = training.source_of_step(model, SEED, step + 1)
    assert (folder / "drawn_ahead.npz").exists() == (after == "student")
  assert len(set(itertools.pairwise(sources))) == 4, (
    "another seed, for every order of two steps"
  )
  # A checkpoint of a run that did not sample ahead: the first step's are fresh.
  step = next(i for i in range(8) if sources[i] == "student")
  (tmp_path / "position").write_text(str(step))
  late = make(model, mesh)
  late.restore_state(tmp_path)
  expected = in_step(model)(params, of_data(step), step)
  got = late.next(step, params)["decoder_target_tokens"]
  np.testing.assert_array_equal(got, expected["decoder_target_tokens"])


def test_methods_that_need_the_newest_outputs_refuse_to_draw_ahead():
  plain = toy_models.gkd()[0]
  pair = plain.student, plain.teacher
  with pytest.raises(
    ValueError, match=r"sample_ahead to be False.*set SAMPLE_AHEAD"
  ):
    models.MiniLLMModel(*pair, sample_ahead=True)
  with pytest.raises(ValueError, match="set SAMPLE_AHEAD = False"):
    models.RLGKDModel(*pair, reward=len, sample_ahead=True)


WORKER = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import test_sample_ahead, toy_models
from gkd_jax import partitioning
model, params, _ = toy_models.gkd(sample_ahead=True)
params = jax.tree.map(np.asarray, params)
mesh = partitioning.make_mesh()
batches = test_sample_ahead.make(model, mesh)
batches.next(0, params)
batches.save_state(sys.argv[4])
got = batches.next(1, params)
np.savez(sys.argv[3], **got)
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("saved")
again = test_sample_ahead.make(model, mesh)
again.restore_state(sys.argv[4])
test_sample_ahead.assert_equal(again.next(1, params), got)
"""


@pytest.mark.slow
def test_two_processes_draw_their_own_rows_and_one_goes_on(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  env = os.environ | {
    "PYTHONPATH": f"{ROOT}:{ROOT}/tests/helpers:{ROOT}/tests/training"
  }
  files = [tmp_path / f"{i}.npz" for i in range(2)]
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", WORKER, address, str(i), str(file), str(tmp_path)],
      env=env,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i, file in enumerate(files)
  ]
  for process in processes:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
  parts = [np.load(file) for file in files]
  model, params, _ = toy_models.gkd(sample_ahead=True)
  mesh = partitioning.make_mesh(1, jax.devices()[:2])
  alone = make(model, mesh)
  alone.next(0, params)
  expected = alone.next(1, params)
  resumed = make(model, mesh)
  resumed.restore_state(tmp_path)
  got = resumed.next(1, params)
  for name, value in expected.items():
    both = np.concatenate([part[name] for part in parts])
    np.testing.assert_allclose(both, value, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(got[name], both, err_msg=name)
