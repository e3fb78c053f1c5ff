"""Checks before and at the first steps that the teacher is a teacher.

A teacher that lost its signal (freshly drawn, a permuted head, zeroed, the student
itself, a temperature that is a slip of the pen) costs a whole run and raises no
error. One batch of data tells.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import losses, partitioning, types

_LOW_TEMPERATURE = 0.05  # The paper's lowest is 0.1 (tables A.1 to A.4).
_UNIFORM = 0.95  # share of a uniform model's entropy
_ROWS = 32


def measure(
  model: Any,
  student_params: Any,
  teacher_params: Any,
  batch: Mapping[str, jax.Array],
  mesh: jax.sharding.Mesh,
) -> dict[str, float]:
  """Computes how well both models predict the data's tokens, at temperature 1.

  Args:
    model: `GKDModel` or another with a teacher in memory.
    student_params: the student's, on the mesh.
    teacher_params: the teacher's, on the mesh.
    batch: features `[B, ...]` of all processes, on the mesh; its first rows are
      read.
    mesh: see `partitioning.make_mesh`.

  Returns:
    Means over target tokens: "teacher" and "student", cross-entropies in nats;
    "entropy" of the teacher in nats; "agreement" of the two likeliest tokens, a
    fraction; all NaN where the batch has no target tokens. Besides "tokens",
    their number; "uniform", the log of the number of tokens that can occur; and
    "same", 1 if both models hold the same parameters, else 0.
  """
  rows = max(_ROWS, partitioning.row_shards(mesh))
  sums = partitioning.jit(
    lambda *params: _sums(model, *params, rows),
    mesh,
    out_shardings=partitioning.replicated(mesh),
  )(student_params, teacher_params, batch)
  sums = {name: float(value) for name, value in sums.items()}
  tokens, same = sums.pop("tokens"), sums.pop("same")
  means = {name: x / tokens if tokens else math.nan for name, x in sums.items()}
  real = model.student.num_real_tokens or model.student.config.vocab_size
  return means | {
    "tokens": tokens,
    "uniform": math.log(real),
    "same": same,
  }


def _sums(model, student_params, teacher_params, batch, rows):
  """Returns sums over the target tokens of the first rows, `[]` each."""
  batch = jax.tree.map(lambda x: x[:rows], dict(batch))
  weights = model.student.loss_weights(batch)
  real = model.student.num_real_tokens
  teacher, student = (
    losses.log_probs(one.logits(params, batch), num_real_tokens=real)
    for one, params in (
      (model.teacher, teacher_params),
      (model.student, student_params),
    )
  )
  targets = batch["decoder_target_tokens"]
  cross_entropy = lambda x: (
    -jnp.sum(weights * losses.target_log_probs(x, targets, weights))
  )
  entropy = -jnp.sum(jnp.exp(teacher) * teacher, axis=-1)
  agree = jnp.argmax(teacher, axis=-1) == jnp.argmax(student, axis=-1)
  return {
    "teacher": cross_entropy(teacher),
    "student": cross_entropy(student),
    "entropy": jnp.sum(weights * entropy),
    "agreement": jnp.sum(weights * agree),
    "tokens": jnp.sum(weights),
    "same": _same(student_params, teacher_params),
  }


def _same(a, b):
  """Returns 1.0 if two trees hold the same numbers, else 0.0, `[]`."""
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  if jax.tree.structure(a) != jax.tree.structure(b) or shapes(a) != shapes(b):
    return jnp.zeros(())
  # A teacher may be held in fewer bits than the student.
  equal = jax.tree.map(lambda x, y: jnp.all(x.astype(y.dtype) == y), a, b)
  return jnp.all(jnp.stack(jax.tree.leaves(equal))).astype(jnp.float32)


_WHOSE = {
  "data": "the data",
  "student": "the student's samples",
  "mixed": "the data and the student's samples",
}


def of_step(
  model: Any, metrics: types.Metrics, source: str, step: int
) -> list[str]:
  """Returns what a step's metrics say of the teacher on the tokens it trained on.

  The step has computed these anyway; a program that samples and compares before
  the first step would take as long to compile as the checks of the data.

  Args:
    model: see `train.train`.
    metrics: name to (sum, weight), of the step.
    source: whose outputs they are of.
    step: number of steps done.

  Returns:
    A line, and a warning if the teacher is close to uniform; [] without a
    teacher, or without tokens.
  """
  names = ("teacher_entropy", "top1_agreement")
  if any(name not in metrics for name in names):
    return []
  (entropy, weight), (agreement, tokens) = (
    map(float, metrics[name]) for name in names
  )
  if not weight or not tokens:
    return []
  entropy, agreement = entropy / weight, agreement / tokens
  uniform = math.log(model.student.num_real_tokens or model.config.vocab_size)
  on = f"on {_WHOSE[source]} at step {step}"
  lines = [
    f"signal {on}: the teacher's entropy in the loss is {entropy:.3g} nats"
    f" (uniform {uniform:.3g}), both likeliest tokens are equal on"
    f" {100 * agreement:.0f} % of {tokens:,.0f} tokens"
  ]
  if entropy > _UNIFORM * uniform:
    lines.append(
      "warning: expected a teacher that prefers some tokens, got an entropy of"
      f" {entropy:.3g} nats {on}; set TEACHER_CHECKPOINT_PATH or"
      " TEACHER_TEMPERATURE"
    )
  return lines


def temperatures(model: Any) -> dict[str, float]:
  """Returns the temperatures of a model's softmaxes, by setting.

  Args:
    model: see `measure`.
  """
  return {
    "SAMPLING_TEMPERATURE": model.sampling["temperature"],
    "TEACHER_TEMPERATURE": model.teacher_temperature,
    "STUDENT_TEMPERATURE": model.student_temperature,
  }


def warnings(
  means: Mapping[str, float],
  temperatures: Mapping[str, float],
  *,
  same_asked: bool = False,
) -> list[str]:
  """Returns a sentence for each sign that the teacher is none.

  Args:
    means: from `measure`.
    temperatures: from `temperatures`; schedules are not judged.
    same_asked: the settings name one checkpoint for both models.
  """
  path = "set TEACHER_CHECKPOINT_PATH"
  same = bool(means["same"])
  said = []
  for setting, value in temperatures.items():
    if not callable(value) and 0 < value < _LOW_TEMPERATURE:
      said.append(
        f"expected a temperature of at least {_LOW_TEMPERATURE}, got {value},"
        f" which leaves one token almost all mass; set {setting}"
      )
  if same and not same_asked:
    said.append(
      "expected a teacher that differs from the student, got the same"
      f" parameters; {path}"
    )
  uniform, loss = means["uniform"], means["teacher"]
  if means["entropy"] > _UNIFORM * uniform:
    said.append(
      "expected a teacher that prefers some tokens, got an entropy of"
      f" {means['entropy']:.3g} nats per token where a uniform model has"
      f" {uniform:.3g}; {path}"
    )
  if loss > uniform:
    said.append(
      "expected a teacher that predicts the data better than a uniform model"
      f" ({uniform:.3g} nats per token), got {loss:.3g}; {path}"
    )
  elif not same and loss > means["student"]:
    said.append(
      "expected a teacher that predicts the data better than the student"
      f" ({means['student']:.3g} nats per token), got {loss:.3g}; {path}"
    )
  if not np.isfinite([loss, means["student"]]).all() and means["tokens"]:
    said.append(
      "expected finite log-probs of the data, got cross-entropies of"
      f" {loss} (teacher) and {means['student']} (student); {path} or"
      " INITIAL_CHECKPOINT_PATH"
    )
  return said
