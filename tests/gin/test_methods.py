"""The methods of the paper as gin files: what each computes, and that it trains.

Each loss is compared with float64 numpy, written from the paper's equations, on
the same tokens; see also the wrong constants that the comparison must refuse.
"""

import dataclasses
import functools
import json

import gin_probe
import jax
import nightly
import numpy as np
import pytest
import toy_models
from loss_batches import log_softmax64

import gin
from gin import config as gin_config
from gkd_jax import (
  architectures,
  checkpoints,
  data,
  models,
  train,
  training,
)
from gkd_jax.command_line import gin_settings
from gkd_jax.tasks import teacher_outputs

LENGTHS = {"inputs": 12, "targets": 20}
METHODS = (
  "sft",
  "seqkd",
  "supervised_kd",
  "imitkd",
  "f_distill",
  "on_policy_kd",
  "gkd",
  "self_distillation",
)
ALONE = ("sft", "seqkd")  # no teacher in memory


def kl(p, q):
  """Of distributions `[..., V]` in float64, zero probabilities excluded."""
  return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


def jsd(p, q, beta):
  m = beta * p + (1 - beta) * q
  return beta * kl(p, m) + (1 - beta) * kl(q, m)


# The paper's divergences of one token, and one with a wrong constant each.
ORACLES = {
  "supervised_kd": (kl, lambda p, q: kl(q, p)),
  "imitkd": (kl, lambda p, q: kl(q, p)),
  "f_distill": (
    lambda p, q: np.abs(p - q).sum(-1) / 2,
    lambda p, q: np.abs(p - q).sum(-1),
  ),
  "on_policy_kd": (kl, lambda p, q: kl(q, p)),
  "gkd": (lambda p, q: jsd(p, q, 0.5), lambda p, q: jsd(p, q, 0.4)),
  "self_distillation": (
    lambda p, q: jsd(p, q, 0.9),
    lambda p, q: jsd(p, q, 0.1),
  ),
}
# Whose outputs the steps use, and the share of the student's among them.
FRACTIONS = {
  "supervised_kd": 0.0,
  "imitkd": 0.5,
  "f_distill": 0.5,
  "on_policy_kd": 1.0,
  "gkd": 1.0,
  "self_distillation": 1.0,
}


def per_sequence(values, weights):
  """Equation 2 and its mean over the batch."""
  return np.mean((values * weights).sum(1) / weights.sum(1))


def macros(method, **more):
  settings = {
    "STUDENT": "%TOY_STUDENT",
    "MIXTURE_OR_TASK_NAME": "'arithmetic_cot'",
    "TASK_FEATURE_LENGTHS": LENGTHS,
    "TRAIN_STEPS": 2,
    "BATCH_SIZE": 8,
    "MODEL_DIR": "'unused'",
  }
  if method not in ALONE:
    settings["TEACHER_CHECKPOINT_PATH"] = "'unused'"
    if method != "self_distillation":
      settings["TEACHER"] = "%TOY_TEACHER"
  return settings | more


@pytest.fixture(name="toys", scope="module")
def _toys(tmp_path_factory):
  """A file that adds the toy sizes to each method's own."""
  folder = tmp_path_factory.mktemp("methods")

  def file_of(method):
    path = folder / f"{method}.gin"
    path.write_text(f"include 'models/toy.gin'\ninclude 'methods/{method}.gin'")
    return str(path)

  return file_of


def read_macros(function):
  """The macros that building a function's arguments reads."""
  reference = gin_config.ConfigurableReference
  found, seen = set(), set()

  def visit(selector, scope=None):
    if (selector, scope) in seen:
      return
    seen.add((selector, scope))
    if selector == "gin.macro":
      found.add(scope)
    for (a_scope, name), arguments in gin_config._CONFIG.items():
      if name != selector or (scope is not None and a_scope != scope):
        continue
      for value in arguments.values():
        for part in gin_config._iterate_flattened_values(value):
          if isinstance(part, reference):
            is_macro = part.configurable.selector == "gin.macro"
            macro = "/".join(part.scopes) if is_macro else None
            visit(part.configurable.selector, macro)

  visit(gin_config._inverse_lookup(function).selector)
  return found


@pytest.mark.parametrize("method", (*METHODS, "minillm", "rl_gkd", "rlef"))
def test_every_macro_that_a_method_defines_is_read(toys, method):
  gin_settings.parse([toys(method)], [], [])
  defined = {
    scope
    for scope, selector in gin_config._CONFIG
    if selector == "gin.macro" and not scope.startswith("TOY_")
  }
  # Python chooses among the networks and their models.
  chosen = [cls for pair in architectures._MODELS.values() for cls in pair]
  read = read_macros(train.train).union(*map(read_macros, chosen))
  assert defined <= read


def batch_of(rows=8, seed=3):
  """Features with targets of 1 to `rows` tokens."""
  rng = np.random.default_rng(seed)
  inputs = rng.integers(3, 18, (rows, LENGTHS["inputs"])).astype(np.int32)
  inputs[:, -1] = 1
  targets = np.zeros((rows, LENGTHS["targets"]), np.int32)
  for row in range(rows):
    targets[row, :row] = rng.integers(3, 18, row)
    targets[row, row] = 1
  return {
    "encoder_input_tokens": inputs,
    "decoder_target_tokens": targets,
    "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    "decoder_loss_weights": (targets > 0).astype(np.int32),
  }


def params_of(model, seed):
  shapes = {k: v.shape for k, v in batch_of().items()}
  # Larger, so that distributions differ from token to token and samples end early.
  return toy_models.draw_params(model, seed, shapes, 1.5)


def on_own_outputs(model, params, batch, key):
  """The batch with the outputs that the training step will sample."""
  # As `GKDModel.train_loss` splits the step's key.
  tokens = np.asarray(jax.jit(model.sample_batch)(params, batch, key))
  assert (tokens != batch["decoder_target_tokens"]).any()
  ended = np.cumsum(tokens == 1, axis=1) - (tokens == 1)
  return batch | {
    "decoder_target_tokens": tokens,
    "decoder_input_tokens": np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
    "decoder_loss_weights": (ended == 0).astype(np.int32),
  }


def save(model, folder):
  """Drawn parameters, as a checkpoint."""
  checkpoints.save_safetensors(
    folder, params_of(model, 2), dataclasses.asdict(model.config)
  )


def outputs_of_a_teacher(folder):
  """A task over what `gkd infer` writes."""
  path = folder / "outputs.jsonl"
  rows = [{"inputs": f"{i}+1", "prediction": f"#{i + 1}"} for i in range(9)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  name = f"arithmetic_cot_of_{folder.name}"
  base = data.load_task("arithmetic_cot").name
  teacher_outputs.register(name, str(path), base)
  return name


@pytest.mark.parametrize("method", ALONE)
def test_negative_log_likelihood(method, toys, tmp_path):
  model = gin_probe.parts_of(toys(method), tmp_path, **macros(method))["model"]
  assert model.teacher is None
  params, batch = params_of(model, 1), batch_of()
  inputs = toy_models.inputs("data")
  total, metrics = jax.jit(lambda p, b: model.train_loss(p, {}, b, inputs))(
    params, batch
  )
  weight = metrics["loss"][1]
  targets = batch["decoder_target_tokens"]
  log_q = log_softmax64(jax.jit(model.logits)(params, batch))
  nll = -np.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
  weights = batch["decoder_loss_weights"]
  assert float(total) == pytest.approx((nll * weights).sum(), rel=2e-5)
  assert float(weight) == weights.sum()
  # Log of base 2, and a mean over sequences, are other losses.
  mean = float(total / weight)
  assert mean != pytest.approx(
    (nll * weights).sum() / np.log(2) / weights.sum(), rel=1e-2
  )
  assert mean != pytest.approx(per_sequence(nll, weights), rel=1e-3)


@pytest.mark.parametrize(
  ("method", "source"),
  nightly.besides(
    [
      ("supervised_kd", "data"),
      ("f_distill", "student"),
      ("gkd", "student"),
      ("self_distillation", "student"),
    ],
    ORACLES,
    ["data", "student"],
  ),
)
def test_divergence_on_each_source(method, source, toys, tmp_path):
  model = gin_probe.parts_of(toys(method), tmp_path, **macros(method))["model"]
  if FRACTIONS[method] == (0.0 if source == "student" else 1.0):
    assert all(model.source_of_step(0, step) != source for step in range(99))
    return
  params, teacher_params = (
    params_of(model.student, 1),
    params_of(model.teacher, 2),
  )
  batch, key = batch_of(), jax.random.key(5)
  inputs = toy_models.inputs(source, key=key)
  total, metrics = jax.jit(lambda p, t, b: model.train_loss(p, t, b, inputs))(
    params, teacher_params, batch
  )
  weight = metrics["loss"][1]
  if source == "student":
    _, sample_key, _ = jax.random.split(key, 3)
    batch = on_own_outputs(model, params, batch, sample_key)
  p = np.exp(
    log_softmax64(jax.jit(model.teacher.logits)(teacher_params, batch))
  )
  q = np.exp(log_softmax64(jax.jit(model.student.logits)(params, batch)))
  weights = batch["decoder_loss_weights"]
  right, wrong = (per_sequence(f(p, q), weights) for f in ORACLES[method])
  loss = float(total / weight)
  assert float(weight) == 8
  assert loss == pytest.approx(right, rel=2e-5)
  assert loss != pytest.approx(wrong, rel=1e-3)
  # A mean over all tokens is another loss as well.
  values = ORACLES[method][0](p, q)
  tokens = (values * weights).sum() / weights.sum()
  assert loss != pytest.approx(tokens, rel=1e-4)


@pytest.mark.parametrize("method", FRACTIONS)
def test_share_of_steps_on_the_students_outputs(method, toys, tmp_path):
  model = gin_probe.parts_of(toys(method), tmp_path, **macros(method))["model"]
  sources = [model.source_of_step(0, step) for step in range(2000)]
  share = sources.count(models.STUDENT) / 2000
  # 0.5 has a standard deviation of 0.011; 0 and 1 are exact.
  if FRACTIONS[method] in (0, 1):
    assert share == FRACTIONS[method]
  else:
    assert abs(share - FRACTIONS[method]) < 0.045
  assert model.teacher_temperature == 1.0


@pytest.mark.parametrize(
  "binding",
  [
    "STUDENT_DATA_FRACTION = 0.5",
    "STUDENT_DATA_GRANULARITY = 'example'",
    "DIVERGENCE = 'jsd'",
    "LOSS_CHUNK_SIZE = 4",
  ],
)
def test_minillm_refuses_settings_that_it_does_not_read(binding):
  with pytest.raises(ValueError, match=f"got {binding.split()[0]}; "):
    gin_settings.parse(["methods/minillm.gin"], [binding], [])


def test_a_self_teacher_has_the_students_size(toys, tmp_path):
  parts = gin_probe.parts_of(
    toys("self_distillation"), tmp_path, **macros("self_distillation")
  )
  assert parts["model"].teacher.config == parts["model"].student.config


def seed_of(method):
  """The seed 2 draws one step of each kind at λ = 0.5."""
  return 2 if FRACTIONS.get(method) == 0.5 else 0


def task_of(method, folder):
  return outputs_of_a_teacher(folder) if method == "seqkd" else "arithmetic_cot"


# tests/cli/test_cli_files.py takes two steps by a shipped run file.
@pytest.mark.nightly
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_change_the_student(method, toys, tmp_path):
  parts = gin_probe.parts_of(toys(method), tmp_path, **macros(method))
  model, optimizer, seed = parts["model"], parts["optimizer"], seed_of(method)
  batches = data.TrainIterator(
    data.load_task(task_of(method, tmp_path)), LENGTHS, 8, seed=seed
  )
  first = params_of(model.student, 1)
  teacher = {} if model.teacher is None else params_of(model.teacher, 2)
  state = training.create(first, optimizer.transform)
  step_fn = jax.jit(
    functools.partial(
      training.train_step, model=model, optimizer=optimizer, seed=seed
    ),
    static_argnames="source",
  )
  sources = []
  for step in range(2):
    source = model.source_of_step(seed, step)
    sources.append(source)
    state, metrics = step_fn(state, teacher, next(batches), source=source)
    total, weight = metrics["loss"]
    assert np.isfinite(total) and weight > 0
    assert metrics["gradient_norm"][0] > 0
    assert ("forward_kl" in metrics) == (method not in ALONE)
    assert ("sampled_length" in metrics) == (source == models.STUDENT)
  assert sources.count(models.STUDENT) == 2 * FRACTIONS.get(method, 0.0)
  assert (int(state.step), int(state.skipped)) == (2, 0)
  moved = jax.tree.map(
    lambda x, y: np.abs(x - y).max(), first, dict(state.params)
  )
  assert min(jax.tree.leaves(moved)) > 0


# test_cli_files trains by the script.
@pytest.mark.nightly
@pytest.mark.parametrize("method", ["seqkd", "self_distillation"])
def test_two_steps_by_the_training_script(method, toys, tmp_path):
  settings = {"MODEL_DIR": repr(str(tmp_path / "run")), "EVAL_SPLIT": None}
  settings["MIXTURE_OR_TASK_NAME"] = repr(task_of(method, tmp_path))
  if method == "self_distillation":
    parts = gin_probe.parts_of(
      toys("sft"), tmp_path, **macros("sft", STUDENT="%TOY_STUDENT")
    )
    save(parts["model"], tmp_path / "teacher")
    settings["TEACHER_CHECKPOINT_PATH"] = repr(str(tmp_path / "teacher"))
  gin_settings.parse(
    [toys(method)],
    [f"{k} = {v}" for k, v in macros(method, **settings).items()],
    [],
  )
  gin.get_configurable(train.train)()
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if "loss" in row]
  assert [row["step"] for row in rows] == [2]
  assert ("sampled_length" in rows[0]) == (method == "self_distillation")
  assert np.isfinite(rows[0]["loss"]) and rows[0]["skipped_updates"] == 0
  assert checkpoints.has_checkpoint(tmp_path / "run")
