"""What a run prints before its first step."""

import jax
import numpy as np
import optax
import pytest
import toy_models

from gkd_jax import optimizers, partitioning, schedules, training
from gkd_jax.training import preflight


class Rows:
  """A batch, whose position cannot be saved if `stateful`."""

  def __init__(self, batch, stateful=False):
    self._batch, self._stateful = batch, stateful

  def peek(self):
    return self._batch

  def save_state(self, path):
    if self._stateful:
      raise ValueError("a position that cannot be saved")


def test_the_first_batch_is_drawn_and_its_position_saved():
  batch = toy_models.batch()
  assert preflight.draw(Rows(batch)) is batch
  with pytest.raises(ValueError, match="cannot be saved"):
    preflight.draw(Rows(batch, stateful=True))


def found(model, student, teacher, batch):
  settings = toy_models.settings(8)
  optimizer = optimizers.Optimizer(schedules.constant(1.0), optax.sgd(1.0))
  run = training.build(model, optimizer, **settings)
  place = lambda tree: jax.device_put(tree, partitioning.replicated(run.mesh))
  student, teacher = place(student), place(teacher)
  rows = preflight.table(run, model, settings["dataset"], teacher, batch)
  more, warnings = preflight.check_teacher(
    model, run, student, teacher, batch, same_asked=False
  )
  return preflight.text(rows + more, warnings)


def test_a_table_of_sizes_data_and_distributions():
  model, student, teacher = toy_models.gkd(
    student_data_fraction=0.25,
    divergence="jsd",
    beta=lambda step: 0.5,
    teacher_temperature=0.7,
    sampling_top_k=4,
    length_normalization="token",
  )
  batch = toy_models.batch()
  lines = found(model, student, teacher, batch).splitlines()
  table = {line.split()[0]: line for line in lines}
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert f"{count(student):,} parameters, " in table["student"]
  assert f"{count(teacher):,} parameters, " in table["teacher"]
  assert "8 devices as {'data': 8, 'model': 1}" in table["mesh"]
  # Rows of 1 to 7 tokens and one more of 1.
  assert "8 rows of inputs 6, targets 7; 29 target tokens" in table["data"]
  assert table["data"].endswith("longest output 7")
  assert table["tokens"].endswith("EOS 1, PAD 0, decoders read 0 first")
  assert (
    "with probability 0.25 per step: temperature 1, top_k 4"
    in (table["samples"])
  )
  assert (
    "jsd (β by schedule) of softmax(teacher / 0.7) and softmax(student / 1)"
    in (table["loss"])
  )
  assert table["loss"].endswith("mean per token")
  assert table["signal"].startswith("signal   on 29 of the data's tokens")
  # Both models are drawn at random.
  assert "warning: expected a teacher that predicts the data" in lines[-1]


def test_prompts_alone_have_no_tokens_to_judge_a_teacher_by():
  model, student, teacher = toy_models.gkd()
  batch = toy_models.batch()
  batch["decoder_loss_weights"] = np.zeros_like(batch["decoder_loss_weights"])
  text = found(model, student, teacher, batch)
  assert "not measured: the first rows have no target tokens" in text
  assert "warning" not in text
