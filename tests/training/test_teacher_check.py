"""A teacher that lost its signal is noticed before the first step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_models

from gkd_jax import models, partitioning
from gkd_jax.training import teacher_check

VOCAB = toy_models.VOCAB


@functools.cache
def taught():
  """A pair, and data that the teacher wrote: it predicts them well."""
  model, student, teacher = toy_models.gkd()
  # Larger logits: the teacher is as sure of its outputs as a trained one.
  teacher["decoder"]["logits_dense"]["kernel"] *= 4
  batch = toy_models.batch()
  sample = lambda params, batch: model.teacher.sample(
    params,
    model.teacher.encode(params, batch),
    batch,
    jax.random.key(0),
    temperature=0.0,
  )
  tokens, _ = jax.jit(sample)(teacher, batch)
  # Outputs of 1 to 7 tokens.
  weights = jnp.arange(7)[None] <= jnp.arange(8)[:, None] % 7
  features = model.teacher.output_features(
    batch, tokens, weights.astype(jnp.float32)
  )
  return model, student, teacher, batch | features


def measure(teacher):
  model, student, _, batch = taught()
  mesh = partitioning.make_mesh(1)
  return teacher_check.measure(model, student, teacher, batch, mesh)


def good():
  return taught()[2]


@functools.cache
def measured():
  return measure(good())


def with_head(change):
  head = change(good()["decoder"]["logits_dense"]["kernel"])
  decoder = good()["decoder"] | {"logits_dense": {"kernel": head}}
  return good() | {"decoder": decoder}


def test_measured_values_are_those_of_float64():
  model, student, teacher, batch = taught()
  got = measured()

  def log_probs(a_model, params):
    logits = np.asarray(jax.jit(a_model.logits)(params, batch), np.float64)
    return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))

  p, q = log_probs(model.teacher, teacher), log_probs(model.student, student)
  targets = np.asarray(batch["decoder_target_tokens"])
  weights = np.asarray(batch["decoder_loss_weights"], np.float64)
  mean = lambda x: np.sum(weights * x) / weights.sum()
  at = lambda x: np.take_along_axis(x, targets[..., None], -1)[..., 0]
  expected = {
    "teacher": -mean(at(p)),
    "student": -mean(at(q)),
    "entropy": -mean(np.sum(np.exp(p) * p, -1)),
    "agreement": mean(p.argmax(-1) == q.argmax(-1)),
    "tokens": weights.sum(),
    "uniform": np.log(VOCAB),
    "same": 0,
  }
  assert sorted(got) == sorted(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_a_teacher_that_knows_the_data_is_not_remarked_on():
  assert teacher_check.warnings(measured(), {"TEACHER_TEMPERATURE": 0.1}) == []


@pytest.mark.parametrize(
  ("teacher", "sentence"),
  [
    (lambda: toy_models.params(taught()[0].teacher, 7), "than a uniform model"),
    (
      lambda: with_head(lambda head: jnp.roll(head, 5, axis=1)),
      "than a uniform model",
    ),
    (
      lambda: jax.tree.map(jnp.zeros_like, good()),
      "prefers some tokens, got an entropy of 2.77 nats .* uniform .* 2.77",
    ),
    (lambda: with_head(lambda head: head * jnp.nan), "expected finite"),
  ],
  ids=["drawn", "permuted head", "zeroed", "NaN"],
)
def test_a_teacher_without_signal_is_named(teacher, sentence):
  said = teacher_check.warnings(measure(teacher()), {})
  assert any(re.search(sentence, s) for s in said), said
  assert all("TEACHER_CHECKPOINT_PATH" in s for s in said)


@pytest.mark.parametrize(
  ("source", "whose"),
  [
    ("student", "the student's samples"),
    ("mixed", "the data and the student's samples"),
  ],
)
def test_a_step_says_on_whose_tokens_the_teacher_was_compared(source, whose):
  model = taught()[0]
  # Of 16 tokens, a uniform teacher has ln 16 = 2.77 nats.
  step = lambda entropy: teacher_check.of_step(
    model,
    {"teacher_entropy": (entropy, 8), "top1_agreement": (30.0, 40)},
    source,
    3,
  )
  said = (
    f"signal on {whose} at step 3: the teacher's entropy in the loss is 1.5 nats"
    " (uniform 2.77), both likeliest tokens are equal on 75 % of 40 tokens"
  )
  assert step(12.0) == [said]
  line, warning = step(8 * 2.7)
  assert "is 2.7 nats" in line
  assert warning == (
    "warning: expected a teacher that prefers some tokens, got an entropy of 2.7"
    f" nats on {whose} at step 3; set TEACHER_CHECKPOINT_PATH or"
    " TEACHER_TEMPERATURE"
  )
  assert teacher_check.of_step(model, {"loss": (1.0, 1)}, source, 3) == []


def test_a_teacher_below_the_student_is_named():
  means = measured() | {"teacher": 1.5, "student": 1.0}
  (said,) = teacher_check.warnings(means, {})
  assert "than the student (1 nats per token), got 1.5" in said


@pytest.mark.parametrize("value", [0.01, 0.04])
def test_a_temperature_near_0_is_named(value):
  (said,) = teacher_check.warnings(measured(), {"SAMPLING_TEMPERATURE": value})
  assert f"got {value}" in said and "set SAMPLING_TEMPERATURE" in said


def test_greedy_samples_are_no_slip():
  greedy = {"SAMPLING_TEMPERATURE": 0.0, "TEACHER_TEMPERATURE": lambda _: 0.01}
  assert teacher_check.warnings(measured(), greedy) == []


def test_the_student_as_its_own_teacher_is_named_unless_asked():
  model, _, teacher, batch = taught()
  model = models.GKDModel(model.teacher, model.teacher)
  mesh = partitioning.make_mesh(1)
  held = jax.tree.map(lambda x: x.astype(jnp.bfloat16), teacher)
  means = teacher_check.measure(model, teacher, held, batch, mesh)
  (said,) = teacher_check.warnings(means, {})
  assert "got the same parameters" in said
  assert teacher_check.warnings(means, {}, same_asked=True) == []
  # Fewer bits may predict the data worse than the student does.
  rounded = means | {"teacher": means["student"] + 0.01}
  assert teacher_check.warnings(rounded, {}, same_asked=True) == []
  changed = with_head(lambda head: head.at[0, 0].add(0.1))
  assert measured()["same"] == 0
  means = teacher_check.measure(model, teacher, changed, batch, mesh)
  assert means["same"] == 0
