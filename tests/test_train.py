"""The training script: what is saved, when it stops, how it goes on."""

import dataclasses
import functools
import json
import os
import signal

import command_line
import fork_server
import jax
import numpy as np
import optax
import pytest
import seqio
import tensorflow as tf
import toy_models

from gkd_jax import checkpoints, optimizers, schedules, train, training

LENGTHS = {"inputs": 6, "targets": 7}
TASK = "train_numbers"
FEATURE = seqio.Feature(seqio.PassThroughVocabulary(toy_models.VOCAB, 1))


def rows(split, shuffle_files, seed=None):
  """Numbers 2 to 15, several times; each is its own input and target."""
  return tf.data.Dataset.range(42).map(
    lambda i: {
      name: tf.cast(2 + i % 14, tf.int32)[None]
      for name in ("inputs", "targets")
    }
  )


class Metric:
  """A metric whose values are given; an exception among them is raised."""

  def __init__(self):
    self.values = []

  def __call__(self, targets, predictions):
    if len(targets) == 2:
      return {"error": 1.0}  # tried before the first step
    value = self.values.pop(0) if self.values else 1.0
    if isinstance(value, Exception):
      raise value
    return {"error": value}


METRIC = Metric()


@pytest.fixture(autouse=True)
def _task():
  METRIC.values = []
  add(rows)
  yield
  seqio.TaskRegistry.remove(TASK)


def add(source):
  seqio.TaskRegistry.add(
    TASK,
    source=seqio.FunctionDataSource(source, splits=["train", "validation"]),
    preprocessors=[seqio.preprocessors.append_eos],
    output_features={"inputs": FEATURE, "targets": FEATURE},
    metric_fns=[lambda targets, predictions: METRIC(targets, predictions)],
  )


class Interrupted(type(toy_models.model(8))):
  """Ctrl-C during a step."""

  at = -1

  def source_of_step(self, seed, step):
    if step == self.at:
      signal.raise_signal(signal.SIGINT)
    return super().source_of_step(seed, step)


@functools.cache
def model(at=-1):
  made = Interrupted(toy_models.model(8).module)
  made.at = at
  return made


def run(
  folder,
  steps=4,
  *,
  rate=0.01,
  a_model=None,
  evaluation=None,
  keep=3,
  period=2,
  best_metric=None,
  save_position=True,
  **kwargs,
):
  return train.train(
    a_model or model(),
    optimizers.Optimizer(
      schedules.as_schedule(rate), optax.sgd(1.0, momentum=0.9)
    ),
    model_dir=os.fspath(folder),
    train_steps=steps,
    dataset=training.DatasetConfig(
      TASK, LENGTHS, 8, save_position=save_position
    ),
    evaluation=training.EvalConfig(
      **{"period": 2, "batch_size": 8, "num_examples": 8} | (evaluation or {})
    ),
    checkpoints=training.CheckpointConfig(period, keep, best_metric),
    logging=training.LogConfig(period=1),
    **kwargs,
  )


def saved(folder):
  return sorted(int(p.name.split("_")[1]) for p in folder.glob("checkpoint_*"))


def logged(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_same(a, b):
  jax.tree.map(
    np.testing.assert_array_equal,
    checkpoints.load_params(a),
    checkpoints.load_params(b),
  )


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory):
  """An uninterrupted run."""
  folder = tmp_path_factory.mktemp("whole")
  METRIC.values = []
  add(rows)
  run(folder)
  seqio.TaskRegistry.remove(TASK)
  return folder


def test_an_evaluation_that_fails_costs_no_step(tmp_path, whole, capsys):
  METRIC.values = [0.5, KeyError("no such\nkey"), 0.25]
  assert run(tmp_path, evaluation={"period": 1}, steps=3) == {"error": 0.25}
  said = [x for x in capsys.readouterr().out.splitlines() if "failed:" in x]
  (said,) = said
  assert "step 2 evaluation failed: KeyError: 'no such\\nkey'" in said
  assert "test_train.py" in said and "EVAL_ERRORS_STOP = True" in said
  rows = logged(tmp_path)
  scores = {r["step"]: r["eval/error"] for r in rows if "eval/error" in r}
  assert scores == {1: 0.5, 3: 0.25}
  assert [r["step"] for r in rows if r.get("failed_evaluations") == 1] == [2]
  assert saved(tmp_path) == [2, 3]


# test_an_evaluation_that_fails_costs_no_step has the step saved before it, too.
@pytest.mark.nightly
def test_an_evaluation_may_end_the_run_after_its_step_is_saved(tmp_path):
  METRIC.values = [TypeError("of the metric")]
  with pytest.raises(TypeError, match="of the metric"):
    run(tmp_path, evaluation={"errors_stop": True})
  assert saved(tmp_path) == [2]
  # It goes on after that step.
  assert run(tmp_path) == {"error": 1.0}
  assert saved(tmp_path) == [2, 4]


@pytest.mark.parametrize(
  ("values", "kept"),
  [
    ([0.1, 0.5, 0.3], [3, 8]),
    pytest.param([0.4, 0.2, 0.3], [6, 8], marks=pytest.mark.nightly),
  ],
)
def test_the_best_evaluation_is_kept_off_the_steps_of_saving(
  tmp_path, values, kept
):
  METRIC.values = [*values]
  run(
    tmp_path,
    8,
    evaluation={"period": 3},
    period=4,
    keep=1,
    best_metric="error",
  )
  assert saved(tmp_path) == kept
  scores = {s: checkpoints.saved_metrics(tmp_path, s) for s in kept}
  assert scores == {kept[0]: {"error": min(values)}, 8: {"error": 0.3}}


def test_a_finished_run_makes_up_its_evaluation_and_then_does_nothing(
  tmp_path, capsys
):
  METRIC.values = [ValueError("once")]
  assert run(tmp_path, 2) == {}
  said = capsys.readouterr().out
  assert "done: 1 evaluations failed; " in said
  assert f"checkpoint {tmp_path}/checkpoint_2" in said
  # Without a final evaluation there is nothing to report.
  assert f"next: gkd export --checkpoint_path={tmp_path} --out" in said
  assert "8 devices as" in said and "teacher" not in said
  lines = len(logged(tmp_path))
  assert run(tmp_path, 2) == {"error": 1.0}
  assert logged(tmp_path)[lines:] == [{"step": 2, "eval/error": 1.0}]
  capsys.readouterr()
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  for steps in (2, 1):
    assert run(tmp_path, steps) == {"error": 1.0}
    said = capsys.readouterr().out
    assert said == f"already at step 2 of {steps}: nothing to do\n"
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


# tests/training/test_preflight.py and test_teacher_check.py have what is said.
@pytest.mark.nightly
def test_a_teacher_is_looked_at_again_when_a_run_goes_on(tmp_path, capsys):
  a_model, _, params = toy_models.gkd(student_data_fraction=0.0)
  fields = dataclasses.asdict(a_model.teacher.config)
  for steps, teacher in ((1, params), (2, jax.tree.map(np.zeros_like, params))):
    checkpoints.save_safetensors(tmp_path / "teacher", teacher, fields)
    capsys.readouterr()
    run(
      tmp_path / "run",
      steps,
      a_model=a_model,
      evaluation={"split": None},
      teacher_checkpoint_path=str(tmp_path / "teacher"),
    )
  said = capsys.readouterr().out
  _, signal, warning = said.partition("resumed")[2].splitlines()[:3]
  # Of 16 tokens, ln 16 = 2.77.
  assert signal.startswith("signal  on 16 of the data's tokens: cross-entropy")
  assert "cross-entropy 2.77 nats" in signal and "entropy 2.77" in signal
  assert "tokens, got an entropy of 2.77 nats per token" in warning
  assert warning.endswith("set TEACHER_CHECKPOINT_PATH")


@pytest.fixture
def foreground():
  """Ctrl-C has an effect, although pytest may run in the background."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, old)


def test_ctrl_c_saves_the_step_and_the_same_command_goes_on(
  tmp_path, whole, capsys, foreground
):
  with pytest.raises(training.Stopped) as stopped:
    run(tmp_path, a_model=model(2), config="A = 1\n")
  assert stopped.value.code == 130
  said = capsys.readouterr()
  assert "Ctrl-C again ends at once" in said.err
  assert (
    f"interrupted at step 3; last checkpoint {tmp_path}/checkpoint_3; the same"
    " command goes on"
  ) in said.out
  assert not (tmp_path / "run.lock").exists()
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  run(tmp_path, config="A = 2\n")
  said = capsys.readouterr().out
  assert f"resumed {tmp_path} at step 3\n" in said
  assert "changed since it was saved: A = 2 (was 1)\n" in said
  assert (tmp_path / "config.gin").read_text() == "A = 2\n"
  assert_same(tmp_path, whole)


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
  code = (
    "import signal\n"
    "from gkd_jax import training\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "with training.StopSignal() as stop:\n"
    "  signal.raise_signal(signal.SIGINT)\n"
    "  print('asked', stop.asked(1), flush=True)\n"
    "  signal.raise_signal(signal.SIGINT)\n"
    "  print('not reached', flush=True)\n"
  )
  process = fork_server.Process(["-c", code], tmp_path, command_line.ENV)
  printed, errors = process.communicate()
  assert process.returncode == -signal.SIGINT, errors
  assert printed == "asked True\n"


def test_parameters_that_are_not_finite_are_refused(tmp_path):
  model = toy_models.model(8)
  params = toy_models.params(model, 1)
  name = "INITIAL_CHECKPOINT_PATH"
  kernel = params["decoder"]["logits_dense"]["kernel"]
  params["decoder"]["logits_dense"]["kernel"] = kernel.at[0, 0].set(np.nan)
  fields = dataclasses.asdict(model.config)
  checkpoints.save_safetensors(tmp_path / "bad", params, fields)
  with pytest.raises(ValueError, match=f"logits_dense/kernel.*set {name}"):
    run(tmp_path / "run", initial_checkpoint_path=str(tmp_path / "bad"))
  assert not (tmp_path / "run").exists()


def test_a_rate_that_is_not_finite_stops_the_run_with_its_name(tmp_path):
  rate = lambda step: jax.numpy.where(step < 2, 0.01, jax.numpy.inf)
  with pytest.raises(FloatingPointError) as error:
    run(
      tmp_path,
      9,
      rate=rate,
      max_skipped_in_row=3,
      evaluation={"split": None},
    )
  text = str(error.value)
  assert (
    "got 3 non-finite ones in a row up to step 5 (learning_rate inf)" in text
  )
  # Steps 3 and 4 were skipped: their parameters are those of step 2.
  assert f"{tmp_path}/checkpoint_4 is finite; set LEARNING_RATE" in text
  assert [r["skipped_updates"] for r in logged(tmp_path) if "loss" in r] == [
    *(0, 0, 1, 2, 3)
  ]
  assert_same(tmp_path / "checkpoint_2", tmp_path / "checkpoint_4")


def test_a_second_run_in_the_folder_is_refused(tmp_path):
  with (
    training.RunLock(tmp_path),
    pytest.raises(ValueError, match="set another MODEL_DIR") as error,
  ):
    run(tmp_path)
  assert f"process {os.getpid()} on " in str(error.value)
  assert [p.name for p in tmp_path.iterdir()] == []


def stateful(split, shuffle_files, seed=None):
  return rows(split, shuffle_files).map(
    lambda x: {
      k: tf.ensure_shape(tf.py_function(lambda y: y, [v], v.dtype), v.shape)
      for k, v in x.items()
    }
  )


def test_data_without_a_position_are_refused(tmp_path):
  seqio.TaskRegistry.remove(TASK)
  add(stateful)
  with pytest.raises(ValueError, match="set SAVE_DATA_POSITION = False"):
    run(tmp_path / "run")
  assert not (tmp_path / "run").exists()


# tests/data/test_positions.py has iterators of such data.
@pytest.mark.nightly
def test_data_begin_anew_without_a_position(tmp_path, capsys):
  seqio.TaskRegistry.remove(TASK)
  add(stateful)
  without = {"save_position": False, "evaluation": {"split": None}}
  run(tmp_path / "run", 2, **without)
  run(tmp_path / "run", 4, **without)
  assert "resumed" in capsys.readouterr().out
  run(tmp_path / "whole", 4, **without)
  # The data began anew, in another order.
  losses = [
    [r["loss"] for r in logged(tmp_path / name) if "loss" in r]
    for name in ("run", "whole")
  ]
  assert losses[0][:2] == losses[1][:2] and losses[0][2:] != losses[1][2:]


def test_packed_rows_are_refused_before_they_are_sampled_over():
  student, *_ = toy_models.gkd(student_data_fraction=0.5)
  settings = toy_models.settings(8)
  packed = training.DatasetConfig("toy", LENGTHS, 8, pack=True)
  optimizer = optimizers.adamw(1e-3)
  with pytest.raises(ValueError, match="set PACK = False"):
    training.build(student, optimizer, packed, settings["partitioner"])
  for fixed in (toy_models.gkd(student_data_fraction=0.0)[0], model()):
    training.build(fixed, optimizer, packed, settings["partitioner"])
