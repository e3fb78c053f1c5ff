"""The gin files of launch/pretrained.sh."""

import pytest

import gin
from gkd_jax import infer, models, train
from gkd_jax.command_line import gin_settings

FILES = "on_policy_kd", "supervised_kd"


def parse(name, *bindings):
  gin_settings.parse([f"experiments/smollm2/{name}.gin"], list(bindings), [])


@pytest.mark.parametrize("name", FILES)
def test_methods_differ_in_whose_outputs_they_train_on(name):
  parse(name, "LOSS_CHUNK_SIZE = None")
  model = gin.get_configurable(models.GKDModel)()
  student, teacher = model.student, model.teacher
  assert (student.config.num_layers, teacher.config.num_layers) == (15, 30)
  assert student.config.with_layers({"decoder": (0,)}) == (
    teacher.config.with_layers({"decoder": (0,)})
  )
  assert student.max_output_length == 40
  share = {"on_policy_kd": 1.0, "supervised_kd": 0.0}[name]
  assert (model.student_data_fraction, model.divergence) == (
    share,
    "forward_kl",
  )
  task = gin.query_parameter("%MIXTURE_OR_TASK_NAME").selector
  assert task.rpartition(".")[2] == (
    "distilled_task" if share == 0 else "task_of_files"
  )
  for macro, value in (("BATCH_SIZE", 8), ("LEARNING_RATE", 2e-4)):
    assert gin.query_parameter(f"%{macro}") == value
  assert gin.get_configurable(train.train) is not None


@pytest.mark.parametrize(
  "name, layers",
  [("teacher_outputs", 30), ("teacher_answers", 30), ("evaluate", 15)],
)
def test_what_decodes(name, layers):
  parse(name)
  model = gin.query_parameter("%STUDENT_MODEL").scoped_configurable_fn()
  assert model.config.num_layers == layers
  assert gin.get_configurable(infer.infer) is not None
