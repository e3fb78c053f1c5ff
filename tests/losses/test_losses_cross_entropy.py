"""Cross-entropy against T5X's numbers, float64 numpy and closed forms."""

import golden_t5x
import jax.numpy as jnp
import loss_batches
import numpy as np
import pytest

from gkd_jax import losses


def smoothed(targets, size, smoothing):
  """The distribution `[B, T, V]` that label smoothing trains towards."""
  distribution = np.full((*targets.shape, size), smoothing / (size - 1))
  np.put_along_axis(distribution, targets[:, :, None], 1 - smoothing, axis=-1)
  return distribution


@pytest.mark.parametrize("name", golden_t5x.NAMES)
def test_cross_entropy_equals_t5x(name):
  numbers, _ = golden_t5x.load(name)
  weights = numbers["batch/decoder_loss_weights"]
  total, weight, aux = losses.cross_entropy_loss(
    numbers["logits"],
    numbers["batch/decoder_target_tokens"],
    weights,
    z_loss=1e-4,
  )
  np.testing.assert_allclose(total, numbers["loss"], rtol=1e-6)
  assert weight == weights.sum()
  parts = aux["cross_entropy"][0] + aux["z_loss"][0]
  np.testing.assert_allclose(parts, total, rtol=1e-6)
  assert aux["z_loss"][0] > 0


def test_hard_labels_by_hand():
  # Row 0: both models say 1/2, 1/2, so that the divergence is 0 and the
  # cross-entropy log 2. Row 1: the teacher says 1/2, 1/2, the student 3/4, 1/4 at
  # temperature 1 (weights 9 and 1 at temperature 1/2), and the token is the second.
  teacher = jnp.zeros((3, 1, 2))
  student = jnp.log(jnp.array([[[1.0, 1.0]], [[3.0, 1.0]], [[3.0, 1.0]]]))
  targets = jnp.array([[0], [1], [1]])
  both = lambda alpha, temperature=1.0: losses.distillation_loss(
    teacher,
    student,
    jnp.ones((3, 1)),
    divergence="forward_kl",
    student_temperature=temperature,
    hard_labels=losses.HardLabels(targets, alpha),
  )
  of = lambda *settings: both(*settings)[0]
  log = np.log
  kl = log(1 / 2) - (log(3 / 4) + log(1 / 4)) / 2
  entropies = [log(2), log(4), log(4)]
  np.testing.assert_allclose(of(0.0), 2 * kl, rtol=1e-6)
  np.testing.assert_allclose(of(1.0), sum(entropies), rtol=1e-6)
  # The last row is the student's own: the divergence alone.
  mixed = 0.3 * log(2) + 0.7 * kl + 0.3 * log(4) + kl
  alphas = jnp.array([[0.3], [0.3], [0.0]])
  np.testing.assert_allclose(of(alphas), mixed, rtol=1e-6)
  cold = log(1 / 2) - (log(9 / 10) + log(1 / 10)) / 2
  mixed = 0.3 * log(2) + 0.7 * cold + 0.3 * log(4) + cold
  np.testing.assert_allclose(of(alphas, 0.5), mixed, rtol=1e-6)
  # Its own metric, of the two rows from the data.
  for temperature in (1.0, 0.5):
    found = both(alphas, temperature)[2]["hard_label_cross_entropy"]
    np.testing.assert_allclose(found, (log(2) + log(4), 2), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_equals_float64(smoothing, normalization):
  _, logits, weights, targets = loss_batches.random_batch(8)
  total, weight, aux = losses.cross_entropy_loss(
    logits,
    targets,
    weights,
    label_smoothing=smoothing,
    z_loss=0.01,
    length_normalization=normalization,
  )
  log_q = loss_batches.log_softmax64(logits)
  distribution = smoothed(targets, logits.shape[-1], smoothing)
  # The KL from the smoothed distribution: its entropy is subtracted.
  kl = (distribution * (np.log(np.maximum(distribution, 1e-300)) - log_q)).sum(
    -1
  )
  z_loss = 0.01 * np.log(np.exp(np.float64(logits)).sum(-1)) ** 2
  lengths = weights.sum(1)
  shares, number = weights, lengths.sum()
  if normalization == "sequence":
    shares, number = weights / lengths[:, None], len(lengths)
  np.testing.assert_allclose(total, (shares * (kl + z_loss)).sum(), rtol=1e-5)
  assert weight == number
  per_token = {
    "cross_entropy": kl,
    "z_loss": z_loss,
    "accuracy": logits.argmax(-1) == targets,
  }
  assert aux.keys() == per_token.keys()
  for name, (number, count) in aux.items():
    expected = (per_token[name] * weights).sum()
    np.testing.assert_allclose(number, expected, rtol=1e-5, err_msg=name)
    assert count == weights.sum()


def test_gradient_by_its_closed_form():
  _, logits, weights, targets = loss_batches.random_batch(9)
  loss = lambda x: losses.cross_entropy_loss(
    x, targets, weights, label_smoothing=0.1, z_loss=0.01
  )
  _, _, gradient = loss_batches.value_and_grad(loss, logits)
  q = np.exp(loss_batches.log_softmax64(logits))
  log_z = np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
  distribution = smoothed(targets, logits.shape[-1], 0.1)
  expected = (q - distribution + 0.02 * log_z * q) * weights[:, :, None]
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_label_smoothing_by_hand():
  logits = jnp.log(jnp.array([[[0.7, 0.2, 0.1]]]))
  total, _, _ = losses.cross_entropy_loss(
    logits, jnp.array([[0]]), jnp.ones((1, 1)), label_smoothing=0.1
  )
  # 0.9 log(0.9 / 0.7) + 0.05 log(0.05 / 0.2) + 0.05 log(0.05 / 0.1)
  np.testing.assert_allclose(total, 0.12221091, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_perfect_prediction_costs_nothing(smoothing):
  target = np.array([[2]])
  with np.errstate(divide="ignore"):
    logits = np.log(smoothed(target, 5, smoothing))
  if smoothing == 0:
    logits = np.maximum(logits, -1e9)
  # With the logits far from 0: the largest is subtracted first.
  total, _, _ = losses.cross_entropy_loss(
    jnp.asarray(logits, jnp.float32) + 64,
    target,
    jnp.ones((1, 1)),
    label_smoothing=smoothing,
  )
  np.testing.assert_allclose(total, 0.0, atol=4e-6)


def test_a_small_loss_keeps_its_digits_far_from_0():
  # log(1 + e^-10) at logits around 500.
  total, _, _ = losses.cross_entropy_loss(
    jnp.array([[[500.0, 490.0]]]), jnp.array([[0]]), jnp.ones((1, 1))
  )
  np.testing.assert_allclose(total, np.log1p(np.exp(-10.0)), rtol=1e-2)


def test_equals_forward_kl_from_one_hot_teachers():
  _, student, weights, targets = loss_batches.random_batch(10)
  one_hot = np.arange(student.shape[-1]) == targets[:, :, None]
  distilled = lambda s: losses.distillation_loss(
    np.where(one_hot, 0.0, -np.inf), s, weights, divergence="forward_kl"
  )
  trained = lambda s: losses.cross_entropy_loss(
    s, targets, weights, length_normalization="sequence"
  )
  got = loss_batches.value_and_grad(distilled, student)
  expected = loss_batches.value_and_grad(trained, student)
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
  assert got[1] == expected[1]
  np.testing.assert_allclose(got[2], expected[2], rtol=1e-5, atol=1e-7)
