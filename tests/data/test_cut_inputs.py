"""Input buckets: shorter batches, the same losses, a program for each length."""

import jax
import numpy as np
import pytest
import toy_models

from gkd_jax import data, partitioning, training

FEATURES = {"encoder_input_tokens": 6, "decoder_target_tokens": 7}


class Batches:
  """Toy batches whose longest inputs have these lengths; a place to save."""

  def __init__(self, *lengths):
    self.left = [*lengths]
    self.saved = []

  def __next__(self):
    batch = self.peek()
    del self.left[0]
    return batch

  def peek(self):
    length = self.left[0]
    batch = toy_models.batch(seed=len(self.left) - 1)
    short = (np.arange(8) % 6 < length)[:, None]
    inputs = batch["encoder_input_tokens"] * short
    return batch | {"encoder_input_tokens": inputs}

  def save_state(self, path):
    self.saved.append(path)

  def restore_state(self, path):
    self.left = [self.saved.index(path)]


def test_each_batch_is_as_long_as_the_first_bucket_that_holds_it():
  lengths = [3, 1, 0, 4, 5, 6, 2]
  cut = data.CutInputs(Batches(*lengths), (2, 4, 9), FEATURES)
  whole = Batches(*lengths)
  for expected in (4, 2, 2, 4, 6, 6, 2):
    looked_at = cut.peek()["encoder_input_tokens"]
    got, of_whole = next(cut), next(whole)
    np.testing.assert_array_equal(looked_at, got["encoder_input_tokens"])
    inputs = of_whole.pop("encoder_input_tokens")
    np.testing.assert_array_equal(
      got.pop("encoder_input_tokens"), inputs[:, :expected]
    )
    assert not np.any(inputs[:, expected:])
    for name, x in of_whole.items():
      np.testing.assert_array_equal(got[name], x)


def test_the_position_is_the_iterators():
  batches = Batches()
  cut = data.CutInputs(batches, (2,), FEATURES)
  for path in ("a", "b"):
    cut.save_state(path)
  assert batches.saved == ["a", "b"]
  cut.restore_state("b")
  assert batches.left == [1]


def test_steps_are_those_of_whole_inputs_and_compile_once_per_length():
  model = toy_models.model(8)
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  step, optimizer = toy_models.sgd_step(model, "data")
  run = training.jit_step(step, mesh, partitioning.replicated(mesh))

  def metrics(*buckets):
    lengths = [3, 2, 5, 1, 6, 3]
    batches = data.CutInputs(Batches(*lengths), buckets, FEATURES)
    state = toy_models.state(toy_models.params(model, 5), optimizer)
    state = jax.device_put(state, partitioning.replicated(mesh))
    for _ in lengths:
      state, of_step = run(
        state, {}, partitioning.put_batch(next(batches), mesh), source="data"
      )
      yield [of_step[k][0] for k in ("loss", "gradient_norm")]

  cut = [*metrics(3)]
  assert run._cache_size() == 2  # of 3 and 6 positions
  whole = [*metrics(6)]
  assert run._cache_size() == 2
  # Six steps of SGD at rate 1 add up: each starts where the last one ended.
  np.testing.assert_allclose(cut, whole, rtol=1e-4)
  assert np.ptp([loss for loss, _ in cut]) > 1


@pytest.mark.parametrize(
  ("lengths", "features", "message"),
  [
    ((4, 2), FEATURES, "ascending lengths .*; set INPUT_BUCKETS"),
    ((0,), FEATURES, "at least 1, got .*; set INPUT_BUCKETS"),
    (
      (4,),
      FEATURES | {"encoder_segment_ids": 6},
      "unpacked batches .*; set PACK = False",
    ),
    (
      (4,),
      {"decoder_target_tokens": 12},
      "encoder_input_tokens, got decoder_target_tokens; set INPUT_BUCKETS = None",
    ),
  ],
)
def test_what_cannot_be_cut(lengths, features, message):
  with pytest.raises(ValueError, match=message):
    data.CutInputs(Batches(), lengths, features)
