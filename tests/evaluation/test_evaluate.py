"""Outputs depend on the seed and the example, not on how they are batched."""

import jax
import pytest
import toy_models
import written_outputs

from gkd_jax import data, evaluation, partitioning

NUMBER = 12


@pytest.fixture(scope="module")
def task():
  # Bytes of these are ids from 3 to 15 of the toys' 16.
  inputs = [
    "".join(chr((i + j) % 13) for j in range(i % 4 + 1)) for i in range(NUMBER)
  ]
  name = written_outputs.add_task(
    "sampled", {"inputs": inputs, "targets": inputs}, []
  )
  return data.load_task(name)


def sample(task, batch_size, devices=1, number=0):
  """Outputs at temperature 1."""
  evaluator = evaluation.Evaluator(
    task,
    {"inputs": 6, "targets": 7},
    batch_size,
    partitioning.make_mesh(devices=jax.devices()[:devices]),
    split="test",
  )
  model = toy_models.model(8)
  (result,) = evaluator.predict(
    model,
    toy_models.params(model, 1),
    seed=3,
    sample_number=number,
    decoder_params={"temperature": 1.0},
  ).values()
  return result.outputs


def test_samples_do_not_depend_on_batches_or_devices(task):
  whole = sample(task, NUMBER)
  assert len(set(whole)) > NUMBER // 2
  assert sample(task, 5) == whole
  assert sample(task, 8, devices=8) == whole
  assert sample(task, NUMBER, number=1) != whole
