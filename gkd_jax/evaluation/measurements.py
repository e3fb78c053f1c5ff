"""Calibration of a student and its divergence from a teacher, over a split.

The divergence is measured on the data (teacher forced), where training on fixed
outputs minimizes it, and on the student's own samples, where the student is
used. A gap between the two that grows with the position is exposure bias.

The functions of arrays are pure and return sums, which add up over batches;
`measure` divides once. p and q are the next-token distributions of teacher and
student, both normalized over the real tokens.

Sources: expected calibration error, Guo et al. (arXiv 1706.04599), equation 3;
acceptance rate of speculative decoding, Leviathan et al. (arXiv 2211.17192),
corollary 3.6.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import (
  checkpoints,
  checks,
  divergences,
  losses,
  models,
  partitioning,
  types,
)
from gkd_jax.evaluation import evaluate

# Sources of outputs, as named in results.
SAMPLES, DATA = "student_samples", "data"
_EXAMPLES = "examples"
# In `by_position.json`; the other names only have means over tokens.
BY_POSITION = ("forward_kl", "reverse_kl")
NUM_BINS = 15  # as in Guo et al.


def load_teacher(model: models.GKDModel, path: str | None, mesh: Any) -> Any:
  """Reads the teacher's parameters onto the mesh of an evaluation.

  Args:
    model: with the teacher.
    path: see `checkpoints.load_params`.
    mesh: of the evaluation.

  Raises:
    ValueError: if there is no path, no checkpoint, or one of other shapes.
  """
  shapes = partitioning.input_shapes({"inputs": 1, "targets": 1})
  return checkpoints.load_placed(
    path,
    *partitioning.abstract_params(
      model.teacher, shapes, mesh, partitioning.parameter_rules(False)
    ),
    setting="TEACHER_CHECKPOINT_PATH",
    of="teacher",
  )


def temperature(value: float) -> float:
  """Returns the temperature of the samples and of both models, for gin.

  Args:
    value: above 0.

  Raises:
    ValueError: it is no number above 0.
  """
  checks.number(value, "INSTRUMENTS_TEMPERATURE", above=0, what="a temperature")
  return value


def measure(
  evaluator: evaluate.Evaluator,
  mesh: Any,
  model: Any,
  params: Any,
  teacher_params: Any = None,
  *,
  seed: int = 0,
) -> tuple[dict[str, float], dict[str, Any]]:
  """Measures a student on all examples of an evaluator.

  Args:
    evaluator: of the split.
    mesh: the evaluator's.
    model: a `GKDModel`, whose sampling settings and temperatures are used; or a
      model without a teacher.
    params: the student's.
    teacher_params: the teacher's; not used without a teacher.
    seed: of the samples; each row has its own stream, whatever the batch size.

  Returns:
    A pair of scores and tables.

    Scores: `ece`, the expected calibration error in percent of the student's
    most likely token against the targets, teacher forced, at temperature 1, in
    `NUM_BINS` bins of equal width. With a teacher also, for each SOURCE in
    `student_samples` and `data`: `SOURCE/NAME`, the mean over tokens of each of
    `token_divergences`, and `SOURCE/length`, the mean number of tokens of an
    output, EOS included; and `student_samples/ended`, the share of samples that
    EOS ends. Where the split has prompts alone, there is no `ece` and no `data`.

    Tables, the content of `by_position.json`:
    `{SOURCE: {NAME: [...], "count": [...]}}`, the means in nats at the first,
    second, ... token of an output for the names in `BY_POSITION`, and the number
    of outputs that have this token. `calibration` has the mean confidence, the
    accuracy and the count of each bin. `examples` is besides: of each example, by
    its number, what its sample adds to the means, as `tasks.example_statistics`.

  Raises:
    ValueError: if there are no examples or no tokens.
  """
  compiled = partitioning.jit(
    functools.partial(_sums, model),
    mesh,
    out_shardings=partitioning.replicated(mesh),
  )
  key = jax.random.key(seed)
  totals: Any = None
  examples: dict[int, dict[str, list[float]]] = {}
  for start, batch in evaluator.batches():
    sums = compiled(params, teacher_params, batch, key, start)
    # Added in float64: a split has more tokens than float32 can count exactly.
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    examples |= _by_example(sums.pop(_EXAMPLES, {}), start)
    totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
  if totals is None:
    raise ValueError(
      "expected examples to measure on, got none; set EVAL_SPLIT or"
      " EVAL_NUM_EXAMPLES"
    )
  calibration = totals.pop("calibration")
  scores: dict[str, float] = {}
  tables: dict[str, Any] = {"examples": examples} if examples else {}
  if calibration["count"].sum() or not examples:
    scores["ece"] = expected_calibration_error(calibration)
    tables["calibration"] = _bins(calibration)
  else:  # prompts alone
    totals.pop(DATA)
  for source, table in totals.items():
    scores |= _means(source, table)
    tables[source] = _by_position(table)
  return scores, tables


def _sums(model, params, teacher_params, batch, key, start):
  """Returns sums over one batch by source; see `measure`."""
  student = model.student
  logits = student.logits(params, batch)
  weights = student.loss_weights(batch)
  real = student.num_real_tokens
  sums = {
    "calibration": calibration_sums(
      losses.log_probs(logits, num_real_tokens=real),
      batch["decoder_target_tokens"],
      weights,
    )
  }
  if model.teacher is None:
    return sums
  sums[DATA], _ = _compare(model, teacher_params, batch, logits)
  encoded = student.encode(params, batch)
  row_ids = start + jnp.arange(weights.shape[0])
  tokens, weights, _ = model.draw(params, encoded, batch, key, row_ids=row_ids)
  # Rows that only fill up the last batch have no input and are not counted.
  weights *= student.has_inputs(batch)[:, None]
  sampled = dict(batch) | student.output_features(batch, tokens, weights)
  logits = student.decoder_logits(params, encoded, sampled)
  sums[SAMPLES], by_row = _compare(model, teacher_params, sampled, logits)
  ended = models.has_eos(tokens, weights, student.special_tokens.eos_id)
  sums[SAMPLES]["ended"] = jnp.sum(ended)
  sums[_EXAMPLES] = by_row | {"ended": ended}
  return sums


def _compare(
  model: models.GKDModel,
  teacher_params: Any,
  batch: types.Batch,
  student_logits: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns sums of `token_divergences` and counts, by position and by row."""
  real = model.student.num_real_tokens
  teacher_logits, student_logits = losses.of_one_size(
    model.teacher.logits(teacher_params, batch), student_logits, real
  )
  p = losses.log_probs(
    teacher_logits,
    temperature=model.teacher_temperature,
    num_real_tokens=real,
  )
  q = losses.log_probs(
    student_logits,
    temperature=model.student_temperature,
    num_real_tokens=real,
  )
  weights = model.student.loss_weights(batch)
  values = token_divergences(p, q) | {"count": jnp.ones_like(weights)}
  sums = {
    name: sum_by_position(value, weights) for name, value in values.items()
  }
  by_row = {
    name: jnp.sum(jnp.where(weights > 0, value, 0.0), axis=1)
    for name, value in values.items()
  }
  return sums | {"rows": jnp.sum(jnp.any(weights > 0, axis=1))}, by_row


def _means(source: str, table: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns means over tokens, and the mean length."""
  tokens, rows = table["count"].sum(), table["rows"]
  if not tokens:
    raise ValueError(
      f"expected tokens of {source} to measure on, got none; set EVAL_SPLIT"
    )
  of_rows = {"length": tokens / rows}
  if "ended" in table:
    of_rows["ended"] = table["ended"] / rows
  names = [name for name in table if name not in ("count", "rows", "ended")]
  means = {name: table[name].sum() / tokens for name in names} | of_rows
  return {f"{source}/{name}": float(value) for name, value in means.items()}


def _by_example(
  sums: Mapping[str, np.ndarray], start: int
) -> dict[int, dict[str, list[float]]]:
  """Returns what each example adds to each mean: a sum and its weight.

  Args:
    sums: over the tokens of each row, `[B]`; {} without a teacher. A row that
      fills up the last batch has no token.
    start: number of the first row's example.
  """
  if not sums:
    return {}
  count = sums["count"]
  weights = {"ended": np.ones_like(count), "length": np.ones_like(count)}
  values = {k: x for k, x in sums.items() if k != "count"} | {"length": count}
  return {
    start + int(row): {
      f"{SAMPLES}/{name}": [float(x[row]), float(weights.get(name, count)[row])]
      for name, x in values.items()
    }
    for row in np.flatnonzero(count)
  }


def _by_position(table: Mapping[str, np.ndarray]) -> dict[str, list]:
  """Returns means by position, up to the longest output."""
  counts = table["count"]
  # An output has no gaps: counts do not grow, and end at the longest.
  longest = int(np.sum(counts > 0))
  return {
    name: (table[name][:longest] / counts[:longest]).tolist()
    for name in BY_POSITION
  } | {"count": counts[:longest].astype(int).tolist()}


def _bins(sums: Mapping[str, np.ndarray]) -> dict[str, list]:
  """Returns mean confidence and accuracy of each bin, None if it is empty."""
  counts = sums["count"]
  mean = lambda name: [
    float(x / n) if n else None for x, n in zip(sums[name], counts, strict=True)
  ]
  return {
    "confidence": mean("confidence"),
    "accuracy": mean("correct"),
    "count": counts.astype(int).tolist(),
  }


def acceptance_rate(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array
) -> jax.Array:
  """Computes Σ min(p, q), 1 minus the total variation.

  In speculative decoding with the student as draft model, this is the
  probability that the teacher accepts the student's next token.

  >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
  >>> round(float(acceptance_rate(p, q)), 4)
  0.75

  Args:
    teacher_log_probs: `[..., V]` log p.
    student_log_probs: `[..., V]` log q.

  Returns:
    `[...]` in [0, 1], float32.
  """
  return jnp.sum(
    jnp.exp(jnp.minimum(teacher_log_probs, student_log_probs)), axis=-1
  )


def token_divergences(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array
) -> dict[str, jax.Array]:
  """Computes the divergences, entropies and acceptance rate of each position.

  Args:
    teacher_log_probs: `[..., V]` log p.
    student_log_probs: `[..., V]` log q.

  Returns:
    `forward_kl`, `reverse_kl`, `teacher_entropy`, `student_entropy` in nats,
    `acceptance` (see `acceptance_rate`), and `top1_agreement`, whether both rank
    the same token first, each `[...]`.
  """
  p, q = teacher_log_probs, student_log_probs
  return {
    "forward_kl": divergences.forward_kl(p, q),
    "reverse_kl": divergences.reverse_kl(p, q),
    "teacher_entropy": divergences.entropy(p),
    "student_entropy": divergences.entropy(q),
    "acceptance": acceptance_rate(p, q),
    "top1_agreement": jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1),
  }


def sum_by_position(values: jax.Array, weights: jax.Array) -> jax.Array:
  """Sums values over rows at the first, second, ... token of each output.

  Position 0 is the first token of a row with a weight above 0, so that rows may
  begin with a prompt.

  >>> weights = jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
  >>> values = jnp.array([[9.0, 1.0, 2.0], [5.0, 9.0, 9.0]])
  >>> sum_by_position(values, weights).tolist()
  [6.0, 2.0, 0.0]

  Args:
    values: `[B, T]`.
    weights: `[B, T]`, 0 outside of the output, where values are ignored.

  Returns:
    `[T]` float32.
  """
  counted = weights > 0
  position = jnp.cumsum(counted, axis=1) - 1
  # Not multiplied by the weights: 0 times NaN would be NaN.
  values = jnp.where(counted, values.astype(jnp.float32), 0.0)
  position = jnp.where(counted, position, 0)
  return jax.ops.segment_sum(
    values.ravel(), position.ravel(), num_segments=values.shape[1]
  )


def calibration_sums(
  log_probs: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  num_bins: int = NUM_BINS,
) -> dict[str, jax.Array]:
  """Sums confidence and accuracy of the most likely token in bins.

  Bin m of M contains the tokens whose most likely token has a probability in
  (m/M, (m+1)/M].

  Args:
    log_probs: `[B, T, V]` the student's, teacher forced.
    targets: `[B, T]` int.
    weights: `[B, T]`, 0 outside of the output.
    num_bins: M; bins have equal width.

  Returns:
    `confidence`, `correct` and `count`: sums in each bin, `[M]` float32.

  Raises:
    ValueError: if the shapes differ.
  """
  shape = log_probs.shape[:-1]
  if targets.shape != shape or weights.shape != shape:
    raise ValueError(
      f"expected targets and weights of shape {shape}, got"
      f" {targets.shape} and {weights.shape}; one entry per position"
    )
  counted = (weights > 0).ravel()
  best = jnp.argmax(log_probs, axis=-1)
  confidence = jnp.exp(jnp.max(log_probs, axis=-1)).ravel()
  confidence = jnp.where(counted, confidence, 1.0)
  bins = jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1
  bins = jnp.clip(bins, 0, num_bins - 1)

  def in_bins(values):
    values = jnp.where(counted, values.astype(jnp.float32), 0.0)
    return jax.ops.segment_sum(values, bins, num_segments=num_bins)

  return {
    "confidence": in_bins(confidence),
    "correct": in_bins((best == targets).ravel()),
    "count": in_bins(counted),
  }


def expected_calibration_error(sums: dict[str, np.ndarray]) -> float:
  """Returns the mean over tokens of |accuracy - confidence|, in percent.

  Both are those of the token's bin.

  >>> sums = {"confidence": np.array([0.5, 2.7]), "correct": np.array([1, 2]),
  ...         "count": np.array([1, 3])}
  >>> round(expected_calibration_error(sums), 1)
  30.0

  Args:
    sums: of `calibration_sums` over all batches.

  Raises:
    ValueError: if there is no token.
  """
  total = float(np.sum(sums["count"]))
  if not total:
    raise ValueError(
      "expected target tokens to measure the calibration on, got none; set"
      " EVAL_SPLIT or MIXTURE_OR_TASK_NAME"
    )
  gaps = np.abs(np.subtract(sums["correct"], sums["confidence"]))
  return float(100.0 * np.sum(gaps) / total)
