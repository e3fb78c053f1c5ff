"""Losses: masks, normalisation, temperature, T5X's cross-entropy."""

import golden_t5x
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import losses

RNG = np.random.default_rng(0)
TEACHER, STUDENT = RNG.normal(size=(2, 2, 4, 5)).astype(np.float32) * 2
WEIGHTS = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], np.float32)


def log_softmax64(logits):
  z = np.asarray(logits, np.float64)
  return z - np.logaddexp.reduce(z, axis=-1, keepdims=True)


def per_token(teacher=TEACHER, student=STUDENT):
  p, q = log_softmax64(teacher), log_softmax64(student)
  return np.sum(np.exp(p) * (p - q), axis=-1)


def loss(teacher=TEACHER, student=STUDENT, weights=WEIGHTS, **kwargs):
  return losses.distillation_loss(
    jnp.asarray(teacher),
    jnp.asarray(student),
    jnp.asarray(weights),
    divergence="forward_kl",
    **kwargs,
  )


def test_sequence_and_token_means_by_hand():
  kl = per_token()
  total, weight, _ = loss(length_normalization="sequence")
  np.testing.assert_allclose(total, kl[0].mean() + kl[1, 0], rtol=1e-5)
  assert weight == 2
  total, weight, _ = loss(length_normalization="token")
  np.testing.assert_allclose(total, kl[0].sum() + kl[1, 0], rtol=1e-5)
  assert weight == 5
  # The mean over all positions, padding included, is another number.
  assert abs(float(total) / 5 - kl.mean()) > 0.05


def test_each_side_has_its_temperature():
  total, _, _ = loss(
    length_normalization="token",
    teacher_temperature=0.5,
    student_temperature=2.0,
  )
  kl = per_token(TEACHER / 0.5, STUDENT / 2.0)
  np.testing.assert_allclose(total, np.sum(kl * WEIGHTS), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_padding_changes_neither_value_nor_gradient(bad):
  spoiled = [x.copy() for x in (TEACHER, STUDENT)]
  for x in spoiled:
    x[WEIGHTS == 0] = bad
  f = lambda t, s: loss(t, s)[0]
  grad = jax.value_and_grad(f, argnums=1)
  (clean, clean_grad), (value, value_grad) = (
    grad(TEACHER, STUDENT), grad(*spoiled)
  )
  np.testing.assert_array_equal(clean, value)
  np.testing.assert_array_equal(clean_grad, value_grad)
  assert np.all(np.asarray(value_grad)[WEIGHTS == 0] == 0)


def test_doubling_every_token_keeps_the_sequence_weight():
  double = lambda x: np.repeat(x, 2, axis=1)
  once = loss()
  twice = loss(double(TEACHER), double(STUDENT), double(WEIGHTS))
  np.testing.assert_allclose(once[0], twice[0], rtol=1e-5)
  np.testing.assert_allclose(once[1], twice[1])


def test_packed_sequences_equal_separate_rows():
  kept = WEIGHTS > 0
  pack = lambda x: np.concatenate([x[0], x[1, :1]])[None]
  packed = loss(
    pack(TEACHER),
    pack(STUDENT),
    np.ones((1, 5), np.float32),
    segment_ids=jnp.array([[1, 1, 1, 1, 2]]),
  )
  assert kept.sum() == 5
  np.testing.assert_allclose(packed[0], loss()[0], rtol=1e-5)
  np.testing.assert_allclose(packed[1], 2)


def test_metrics_are_token_sums():
  _, _, aux = loss()
  p, q = log_softmax64(TEACHER), log_softmax64(STUDENT)
  entropy = lambda x: -np.sum(np.exp(x) * x, axis=-1)
  expected = {
    "forward_kl": np.sum(np.exp(p) * (p - q), axis=-1),
    "reverse_kl": np.sum(np.exp(q) * (q - p), axis=-1),
    "teacher_entropy": entropy(p),
    "student_entropy": entropy(q),
    "top1_agreement": p.argmax(-1) == q.argmax(-1),
  }
  assert set(aux) == set(expected)
  for name, values in expected.items():
    np.testing.assert_allclose(
      aux[name][0], np.sum(values * WEIGHTS), rtol=1e-4, err_msg=name
    )
    assert aux[name][1] == 5


@pytest.mark.parametrize("name", golden_t5x.NAMES)
def test_cross_entropy_with_z_loss_equals_t5x(name):
  numbers, _ = golden_t5x.load(name)
  total, weight, _ = losses.cross_entropy_loss(
    numbers["logits"],
    numbers["batch/decoder_target_tokens"],
    numbers["batch/decoder_loss_weights"],
    z_loss=1e-4,
  )
  np.testing.assert_allclose(total, numbers["loss"], rtol=1e-5)
  assert weight == numbers["batch/decoder_loss_weights"].sum()


def test_label_smoothing_by_hand():
  logits = np.log(np.array([[[0.7, 0.2, 0.1]]]))
  total, _, _ = losses.cross_entropy_loss(
    logits, np.array([[0]]), np.ones((1, 1)), label_smoothing=0.1
  )
  law = np.array([0.9, 0.05, 0.05])
  expected = np.sum(law * (np.log(law) - np.log([0.7, 0.2, 0.1])))
  np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"length_normalization": "mean"}, "set LENGTH_NORMALIZATION"),
    ({"teacher_temperature": 0.0}, "set TEACHER_TEMPERATURE"),
    ({"student": STUDENT[..., :4]}, "vocab_size"),
  ],
)
def test_wrong_settings(kwargs, message):
  with pytest.raises(ValueError, match=message):
    loss(**kwargs)
