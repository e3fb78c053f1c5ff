"""Calibration of a student, and its distance to a teacher, over a split.

The divergence is measured in two places: on the data, teacher forced, which is
what training on fixed outputs makes small; and on the student's own samples, where
it is used. A gap between the two that grows with the position is exposure bias.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import (
  checkpoints,
  evaluate,
  instruments,
  models,
  partitioning,
  placement,
  types,
)

# Sources of outputs, as named in results.
SAMPLES, DATA = "student_samples", "data"
# What `by_position.json` holds; the rest is given as means over tokens alone.
BY_POSITION = ("forward_kl", "reverse_kl")


def load_teacher(model: models.GKDModel, path: str | None, mesh: Any) -> Any:
  """The teacher's parameters on the mesh of an evaluation.

  Args:
    model: its teacher says what shapes they have.
    path: see `checkpoints.load_params`.
    mesh: of the evaluation.

  Raises:
    ValueError: no path, nothing there, or other shapes.
  """
  shapes = placement.input_shapes({"inputs": 1, "targets": 1})
  return checkpoints.load_placed(
    path,
    *placement.params(model.teacher, shapes, mesh, placement.rules(False)),
    setting="TEACHER_CHECKPOINT_PATH",
    of="teacher",
  )


def measure(
  evaluator: evaluate.Evaluator,
  mesh: Any,
  model: Any,
  params: Any,
  teacher_params: Any = None,
  *,
  seed: int = 0,
) -> tuple[dict[str, float], dict[str, Any]]:
  """Goes over the evaluator's examples, all tasks together.

  Args:
    evaluator: holds the split.
    mesh: the evaluator's.
    model: a `GKDModel`, whose sampling settings and temperatures hold for the
      samples and for both laws; or a model without a teacher.
    params: the student's.
    teacher_params: the teacher's; not read without a teacher.
    seed: of the samples; each row has its own stream, whatever the batch size.

  Returns:
    Scores: `ece`, the expected calibration error in percent of the student's
    likeliest token against the targets, teacher forced, at temperature 1, in
    `instruments.NUM_BINS` bins of equal width. With a teacher also, of each
    source SOURCE in `student_samples` and `data`: `SOURCE/NAME`, the mean over
    tokens of each of `instruments.compare_laws`, and `SOURCE/length`, tokens of
    an output, EOS included.

    What `by_position.json` holds: `{SOURCE: {NAME: [...], "count": [...]}}`, the
    means at an output's first token, second, and so on, for the names in
    `BY_POSITION` in nats, and how many outputs have a token there. `calibration`
    holds mean confidence, accuracy and count of each bin.
  """
  compiled = partitioning.jit(
    functools.partial(_sums, model),
    mesh,
    out_shardings=partitioning.replicated(mesh),
  )
  key = jax.random.key(seed)
  totals: Any = None
  for start, batch in evaluator.batches():
    sums = compiled(params, teacher_params, batch, key, start)
    # float32 sums of a batch, added in float64: no digit is lost over a split.
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
  if totals is None:
    raise ValueError(
      "expected examples to measure on, got none; set EVAL_SPLIT or"
      " EVAL_NUM_EXAMPLES"
    )
  calibration = totals.pop("calibration")
  scores = {"ece": instruments.expected_calibration_error(calibration)}
  tables: dict[str, Any] = {}
  for source, table in totals.items():
    scores |= _means(source, table)
    tables[source] = _by_position(table)
  tables["calibration"] = _bins(calibration)
  return scores, tables


def _sums(model, params, teacher_params, batch, key, start):
  """Sums over one batch, by source; see `measure`."""
  student = model.student
  logits = student.logits(params, batch)
  weights = student.loss_weights(batch)
  real = student.num_real_tokens
  sums = {
    "calibration": instruments.calibration_sums(
      instruments.log_law(logits, num_real_tokens=real),
      batch["decoder_target_tokens"],
      weights,
    )
  }
  if model.teacher is None:
    return sums
  sums[DATA] = _compare(model, teacher_params, batch, logits)
  encoded = student.encode(params, batch)
  tokens, weights, _ = student.sample_outputs(
    params,
    encoded,
    batch,
    key,
    row_ids=start + jnp.arange(weights.shape[0]),
    **model.sampling,
  )
  # Rows that fill up the last batch have no input, and count for nothing.
  weights *= student.has_inputs(batch)[:, None]
  sampled = dict(batch) | student.output_features(batch, tokens, weights)
  logits = student.decoder_logits(params, encoded, sampled)
  sums[SAMPLES] = _compare(model, teacher_params, sampled, logits)
  return sums


def _compare(
  model: models.GKDModel,
  teacher_params: Any,
  batch: types.Batch,
  student_logits: jax.Array,
) -> dict[str, jax.Array]:
  """Sums by position `[T]` of what is compared, `count`, and rows `[]`."""
  real = model.student.num_real_tokens
  p = instruments.log_law(
    model.teacher.logits(teacher_params, batch),
    temperature=model.teacher_temperature,
    num_real_tokens=real,
  )
  q = instruments.log_law(
    student_logits,
    temperature=model.student_temperature,
    num_real_tokens=real,
  )
  weights = model.student.loss_weights(batch)
  values = instruments.compare_laws(p, q) | {"count": jnp.ones_like(weights)}
  sums = {
    name: instruments.sum_by_position(value, weights)
    for name, value in values.items()
  }
  return sums | {"rows": jnp.sum(jnp.any(weights > 0, axis=1))}


def _means(source: str, table: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Means over tokens, and the mean length."""
  tokens, rows = table["count"].sum(), table["rows"]
  if not tokens:
    raise ValueError(
      f"expected tokens of {source} to measure on, got none; set EVAL_SPLIT"
    )
  names = [name for name in table if name not in ("count", "rows")]
  return {
    f"{source}/{name}": float(table[name].sum() / tokens) for name in names
  } | {f"{source}/length": float(tokens / rows)}


def _by_position(table: Mapping[str, np.ndarray]) -> dict[str, list]:
  """Means by position, up to the longest output."""
  counts = table["count"]
  # An output has no gaps: counts do not grow, and end at the longest.
  longest = int(np.sum(counts > 0))
  return {
    name: (table[name][:longest] / counts[:longest]).tolist()
    for name in BY_POSITION
  } | {"count": counts[:longest].astype(int).tolist()}


def _bins(sums: Mapping[str, np.ndarray]) -> dict[str, list]:
  """Mean confidence and accuracy of each bin; None where it is empty."""
  counts = sums["count"]
  mean = lambda name: [
    float(x / n) if n else None for x, n in zip(sums[name], counts, strict=True)
  ]
  return {
    "confidence": mean("confidence"),
    "accuracy": mean("correct"),
    "count": counts.astype(int).tolist(),
  }
