"""What is measured token by token, against float64 numpy and cases by hand."""

import jax
import jax.numpy as jnp
import loss_batches
import numpy as np
import pytest

from gkd_jax import losses
from gkd_jax.evaluation import measurements


def test_log_probs_have_no_mass_on_padding_of_the_vocabulary():
  logits = loss_batches.random_batch()[0]
  got = jax.jit(lambda x: losses.log_probs(x, 0.7, 5))(
    logits.astype(jnp.bfloat16)
  )
  rounded = np.asarray(logits.astype(jnp.bfloat16), np.float64)
  expected = loss_batches.log_softmax64(rounded[:, :, :5] / 0.7)
  np.testing.assert_allclose(got[:, :, :5], expected, atol=1e-5)
  assert got.dtype == jnp.float32 and (got[:, :, 5:] < -1e8).all()


def test_acceptance_is_the_expected_min_of_1_and_the_ratio():
  teacher, student, _, _ = loss_batches.random_batch()
  p, q = map(np.exp, map(loss_batches.log_softmax64, (teacher, student)))
  expected = (q * np.minimum(1, p / q)).sum(-1)
  compared = jax.jit(measurements.token_divergences)(np.log(p), np.log(q))
  np.testing.assert_allclose(compared["acceptance"], expected, rtol=1e-5)
  assert expected.min() > 0.01 and expected.max() < 0.95
  for name, probs in (("teacher_entropy", p), ("student_entropy", q)):
    entropy = -(probs * np.log(probs)).sum(-1)
    np.testing.assert_allclose(compared[name], entropy, rtol=1e-4)
  forward = (p * np.log(p / q)).sum(-1)
  np.testing.assert_allclose(compared["forward_kl"], forward, rtol=1e-4)
  reverse = (q * np.log(q / p)).sum(-1)
  np.testing.assert_allclose(compared["reverse_kl"], reverse, rtol=1e-4)


def test_agreement_is_of_the_likeliest_tokens():
  p = np.log(np.array([[0.5, 0.3, 0.2]] * 2, np.float32))
  q = np.log(np.array([[0.6, 0.1, 0.3], [0.4, 0.5, 0.1]], np.float32))
  got = jax.jit(measurements.token_divergences)(p, q)["top1_agreement"]
  assert got.tolist() == [True, False]


def test_positions_are_counted_within_outputs():
  rng = np.random.default_rng(0)
  values = rng.normal(size=(4, 6)).astype(np.float32)
  starts, ends = np.array([[0, 2, 5, 3], [6, 4, 6, 3]])  # the last row: none
  place = np.arange(6)[None]
  weights = (place >= starts[:, None]) & (place < ends[:, None])
  expected = np.zeros(6)
  for row, start, end in zip(values, starts, ends, strict=True):
    expected[: end - start] += row[start:end]
  values[~weights] = np.nan
  got = jax.jit(measurements.sum_by_position)(
    values, weights.astype(np.float32)
  )
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_calibration_by_hand():
  # (probability of the likeliest token, whether it is the target), in bins of
  # (0.6, 0.8] and (0.8, 1]; 1 belongs to the last one, and 0.5 to (0.4, 0.6].
  cases = [(0.7, True), (0.75, False), (0.9, True), (1.0, True), (0.5, False)]
  probs = np.array([[c, 0.6 * (1 - c), 0.4 * (1 - c)] for c, _ in cases])
  probs = np.pad(probs, ((0, 1), (0, 0)), constant_values=np.nan)[None]
  targets = np.array([[0 if right else 1 for _, right in cases] + [0]])
  weights = np.array([[1.0] * 5 + [0.0]])
  with np.errstate(divide="ignore"):
    log_probs = np.log(probs).astype(np.float32)
  sums = jax.jit(
    lambda *args: measurements.calibration_sums(*args, num_bins=5)
  )(log_probs, targets, weights)
  np.testing.assert_allclose(sums["count"], [0, 0, 1, 2, 2])
  np.testing.assert_allclose(sums["correct"], [0, 0, 0, 1, 2])
  np.testing.assert_allclose(
    sums["confidence"], [0, 0, 0.5, 1.45, 1.9], rtol=1e-6
  )
  expected = 100 * (0.5 + abs(1 - 1.45) + abs(2 - 1.9)) / 5
  got = measurements.expected_calibration_error(sums)
  assert got == pytest.approx(expected)


def test_calibration_of_a_calibrated_distribution():
  rng = np.random.default_rng(0)
  logits = 2 * rng.normal(size=(40, 100, 5))
  probs = np.exp(loss_batches.log_softmax64(logits))
  draws = (rng.random((40, 100, 1)) > probs.cumsum(-1)[..., :-1]).sum(-1)
  ones = np.ones((40, 100))
  ece = lambda log_probs: measurements.expected_calibration_error(
    measurements.calibration_sums(jnp.asarray(log_probs), draws, ones)
  )
  # 4,000 tokens in 15 bins: about 15 Monte Carlo errors of 0.5 / sqrt(4000 / 15)
  # are averaged.
  assert ece(np.log(probs)) < 3
  sharper = loss_batches.log_softmax64(3 * logits)
  assert ece(sharper) > 10


def test_calibration_needs_tokens_and_one_entry_per_position():
  zeros = {"count": np.zeros(3), "correct": np.zeros(3), "confidence": 0}
  with pytest.raises(ValueError, match="set EVAL_SPLIT"):
    measurements.expected_calibration_error(zeros)
  with pytest.raises(ValueError, match="one entry per position"):
    measurements.calibration_sums(
      jnp.zeros((2, 3, 4)), np.zeros((2, 2)), np.zeros((2, 3))
    )
