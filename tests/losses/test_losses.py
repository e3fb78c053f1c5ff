"""Losses over sequences: float64 numpy, hand-worked batches, invariances."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import loss_batches
import numpy as np
import pytest

from gkd_jax import divergences, losses

settings = hypothesis.settings(deadline=None, max_examples=8, derandomize=True)

# Three tokens in one row, one token and padding in the other.
RAGGED = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


def distillation(teacher, weights, **options):
  """Student logits to the loss's triple."""
  options = {"divergence": "reverse_kl"} | options
  return lambda student: losses.distillation_loss(
    teacher, student, weights, **options
  )


def cross_entropy(targets, weights, **options):
  """Logits to the loss's triple, with everything that it offers."""
  options = {"z_loss": 0.1, "label_smoothing": 0.1} | options
  return lambda logits: losses.cross_entropy_loss(
    logits, targets, weights, **options
  )


# Token weights


def test_token_weights_by_hand():
  weights, number = losses.token_weights(RAGGED, "sequence")
  third = 1 / 3
  expected = [[third, third, third], [1, 0, 0]]
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  assert number == 2
  weights, number = losses.token_weights(RAGGED, "token")
  np.testing.assert_array_equal(weights, RAGGED)
  assert number == 4


def test_token_weights_of_empty_rows_and_fractions():
  given = jnp.array([[0.0, 0.0], [0.5, 1.5]], jnp.bfloat16)
  weights, number = losses.token_weights(given, "sequence")
  assert weights.dtype == number.dtype == jnp.float32
  np.testing.assert_array_equal(weights, [[0, 0], [0.25, 0.75]])
  assert number == 1


def test_token_weights_of_packed_rows_by_hand():
  # Ids that come back in another row are other sequences; segment 2 of row 0
  # has no weight, and padding has id 0.
  segments = jnp.array([[1, 1, 2, 3, 0], [1, 1, 1, 1, 2]])
  given = jnp.array([[1.0, 1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0, 1.0]])
  weights, number = losses.token_weights(given, "sequence", segments)
  expected = [[0.5, 0.5, 0, 1, 0], [0, 0.5, 0.5, 0, 1]]
  np.testing.assert_array_equal(weights, expected)
  assert number == 4
  weights, number = losses.token_weights(given, "token", segments)
  np.testing.assert_array_equal(weights, given)
  assert number == 6


# Distillation


def test_token_and_sequence_means_by_hand():
  # A teacher sure of symbol 0 makes the KL -log q(0): 1, 2, 3 nats in the long
  # row, 6 in the short one, 50 at its padding.
  q = np.exp(-np.array([[1.0, 2.0, 3.0], [6.0, 50.0, 50.0]]))
  student = jnp.asarray(np.log(np.stack([q, 1 - q], axis=-1)), jnp.float32)
  teacher = jnp.broadcast_to(jnp.array([0.0, -jnp.inf]), student.shape)

  def mean(normalization):
    total, weight, _ = losses.distillation_loss(
      teacher,
      student,
      RAGGED,
      divergence="forward_kl",
      length_normalization=normalization,
    )
    return total / weight

  np.testing.assert_allclose(mean("sequence"), (2 + 6) / 2, rtol=1e-5)
  np.testing.assert_allclose(mean("token"), (1 + 2 + 3 + 6) / 4, rtol=1e-5)
  # What a mean over all positions gives instead, padding included.
  p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
  unmasked = jnp.mean(divergences.forward_kl(p, q))
  np.testing.assert_allclose(unmasked, 112 / 6, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.1, 1.0), (2.0, 0.7)])
def test_distillation_equals_float64(normalization, temperatures):
  teacher, student, weights, _ = loss_batches.random_batch()
  total, weight, aux = losses.distillation_loss(
    teacher,
    student,
    weights,
    divergence="reverse_kl",
    teacher_temperature=temperatures[0],
    student_temperature=temperatures[1],
    length_normalization=normalization,
  )
  log_p = loss_batches.log_softmax64(np.float64(teacher) / temperatures[0])
  log_q = loss_batches.log_softmax64(np.float64(student) / temperatures[1])
  p, q = np.exp(log_p), np.exp(log_q)
  reverse = (q * (log_q - log_p)).sum(-1)
  lengths = weights.sum(1)
  if normalization == "sequence":
    expected = ((reverse * weights).sum(1) / lengths).sum(), len(lengths)
  else:
    expected = (reverse * weights).sum(), lengths.sum()
  np.testing.assert_allclose((total, weight), expected, rtol=1e-5)
  per_token = {
    "forward_kl": (p * (log_p - log_q)).sum(-1),
    "reverse_kl": reverse,
    "teacher_entropy": -(p * log_p).sum(-1),
    "student_entropy": -(q * log_q).sum(-1),
    "top1_agreement": p.argmax(-1) == q.argmax(-1),
  }
  assert aux.keys() == per_token.keys()
  for name, (number, count) in aux.items():
    expected = (per_token[name] * weights).sum()
    np.testing.assert_allclose(number, expected, rtol=1e-5, err_msg=name)
    assert count == weights.sum()


def test_temperatures_may_be_traced_and_the_divergence_a_function():
  teacher, student, weights, _ = loss_batches.random_batch()

  def loss(teacher_temperature, student_temperature, divergence):
    return losses.distillation_loss(
      teacher,
      student,
      weights,
      divergence=divergence,
      teacher_temperature=teacher_temperature,
      student_temperature=student_temperature,
    )[0]

  jsd = divergences.get("jsd", beta=0.5)
  traced = jax.jit(lambda a, b: loss(a, b, jsd))(0.5, 2.0)
  np.testing.assert_allclose(traced, loss(0.5, 2.0, jsd), rtol=1e-6)
  squared = lambda p, q: jnp.sum((p - q) ** 2, axis=-1)
  p, q = map(loss_batches.log_softmax64, (teacher, student))
  expected = ((p - q) ** 2).sum(-1) * weights / weights.sum(1)[:, None]
  np.testing.assert_allclose(loss(1.0, 1.0, squared), expected.sum(), rtol=1e-5)


def test_distillation_gradient_by_its_closed_form():
  teacher, student, weights, _ = loss_batches.random_batch(1)
  loss = distillation(
    teacher, weights, divergence="forward_kl", student_temperature=2.0
  )
  _, _, gradient = loss_batches.value_and_grad(loss, student)
  p = np.exp(loss_batches.log_softmax64(teacher))
  q = np.exp(loss_batches.log_softmax64(student / 2))
  shares = weights / weights.sum(1, keepdims=True)
  expected = (q - p) / 2 * shares[:, :, None]
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


# Both losses


def test_metrics_carry_no_gradient():
  teacher, student, weights, targets = loss_batches.random_batch()

  def metrics(t, s):
    aux = distillation(t, weights)(s)[2] | cross_entropy(targets, weights)(s)[2]
    return sum(number for number, _ in aux.values())

  for gradient in jax.grad(metrics, argnums=(0, 1))(teacher, student):
    np.testing.assert_array_equal(gradient, 0.0)


def test_duplicated_tokens_leave_a_sequence_its_weight():
  batch = loss_batches.random_batch(2)
  # The first row is twice as long, the others gain padding.
  longer = [np.concatenate([x, np.zeros_like(x)], axis=1) for x in batch]
  for new, old in zip(longer, batch, strict=True):
    new[0] = np.repeat(old[0], 2, axis=0)
  for normalization, holds in (("sequence", True), ("token", False)):
    option = {"length_normalization": normalization}
    for loss in (
      lambda t, s, w, y, o=option: distillation(t, w, **o)(s),
      lambda t, s, w, y, o=option: cross_entropy(y, w, **o)(s),
    ):
      once, twice = (jax.jit(loss)(*x) for x in (batch, longer))
      assert (once[1] == twice[1]) == holds
      assert np.allclose(once[0], twice[0], rtol=1e-6) == holds


def _pack(array):
  """Two rows of five tokens one after another in a row of twelve."""
  packed = np.zeros((1, 12, *array.shape[2:]), array.dtype)
  packed[0, :5], packed[0, 5:10] = array[0], array[1]
  return packed


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_packed_segments_equal_separate_rows(normalization):
  teacher, student, weights, targets = loss_batches.random_batch(3, (2, 5, 7))
  weights[1, 3:] = 0
  segments = np.zeros((1, 12), np.int32)
  segments[0, :5], segments[0, 5:8] = 1, 2
  apart = {"length_normalization": normalization}
  together = apart | {"segment_ids": segments}
  for rows, packed in (
    (
      distillation(teacher, weights, **apart),
      distillation(_pack(teacher), _pack(weights), **together),
    ),
    (
      cross_entropy(targets, weights, **apart),
      cross_entropy(_pack(targets), _pack(weights), **together),
    ),
  ):
    total, number, gradient = loss_batches.value_and_grad(rows, student)
    got = loss_batches.value_and_grad(packed, _pack(student))
    np.testing.assert_allclose(got[0], total, rtol=1e-6)
    assert got[1] == number
    np.testing.assert_allclose(got[2], _pack(gradient), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("junk", [1e9, -np.inf, np.inf, np.nan])
def test_padding_changes_neither_value_nor_gradient(junk):
  teacher, student, weights, targets = loss_batches.random_batch(4)
  padding = weights == 0
  assert padding.any()
  other_teacher, other_student = teacher.copy(), student.copy()
  other_teacher[padding] = junk
  other_student[padding, 1:] = junk
  other_targets = np.where(padding, 0, targets)
  for loss, clean in (
    (distillation(other_teacher, weights), distillation(teacher, weights)),
    (cross_entropy(other_targets, weights), cross_entropy(targets, weights)),
  ):
    got = loss_batches.value_and_grad(loss, other_student)
    expected = loss_batches.value_and_grad(clean, student)
    assert got[:2] == expected[:2]
    np.testing.assert_array_equal(got[2], expected[2])
    np.testing.assert_array_equal(got[2][padding], 0.0)
    assert loss(other_student)[2] == clean(student)[2]


def test_nan_at_a_target_is_not_hidden():
  teacher, student, weights, targets = loss_batches.random_batch(4)
  student[0, 0, 0] = np.nan
  assert np.isnan(distillation(teacher, weights)(student)[0])
  assert np.isnan(cross_entropy(targets, weights)(student)[0])


def test_a_batch_without_targets_has_weight_0_and_a_finite_gradient():
  teacher, student, weights, targets = loss_batches.random_batch(5)
  for loss in (
    distillation(teacher, 0 * weights),
    cross_entropy(targets, 0 * weights, length_normalization="sequence"),
  ):
    total, weight, gradient = loss_batches.value_and_grad(loss, student)
    assert (total, weight) == (0.0, 0.0)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("low", [-1e9, -np.inf])
def test_finite_gradients_where_tokens_are_forbidden(low):
  teacher, student, weights, targets = loss_batches.random_batch(6)
  teacher[:, :, 0] = teacher[:, 0, 1] = low
  student[:, :, 0] = student[:, 1, 2] = low
  targets = np.full_like(targets, 3)
  for loss in (
    distillation(teacher, weights, divergence="forward_kl"),
    distillation(teacher, weights, teacher_temperature=0.1),
    cross_entropy(targets, weights, label_smoothing=0.0),
  ):
    total, _, gradient = loss_batches.value_and_grad(loss, student)
    assert np.isfinite(total) and np.all(np.isfinite(gradient))


@jax.jit
def both_losses(teacher, student, weights, targets):
  return (
    distillation(teacher, weights)(student),
    cross_entropy(targets, weights)(student),
  )


@settings
@hypothesis.given(st.integers(0, 10**6), st.sampled_from([2, 3]))
def test_sums_add_up_over_microbatches(seed, parts):
  batch = loss_batches.random_batch(seed, (6, 4, 5))
  pieces = zip(*(np.split(x, parts) for x in batch), strict=True)
  summed = jax.tree.map(
    lambda *x: sum(x), *(both_losses(*piece) for piece in pieces)
  )
  for got, expected in zip(summed, both_losses(*batch), strict=True):
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    assert got[1] == expected[1]
    for name, (number, count) in expected[2].items():
      np.testing.assert_allclose(got[2][name][0], number, rtol=1e-5, atol=1e-6)
      assert got[2][name][1] == count


def test_bfloat16_logits_are_computed_in_float32():
  teacher, student, weights, targets = loss_batches.random_batch(
    7, (1, 2, 32128)
  )
  student = teacher + np.float32(0.01) * student
  low = [jnp.asarray(x, jnp.bfloat16) for x in (teacher, student)]
  high = [x.astype(jnp.float32) for x in low]
  for got, expected in zip(
    *(both_losses(*x, weights, targets) for x in (low, high)), strict=True
  ):
    assert got[0].dtype == jnp.float32
    assert got == expected and got[0] > 0


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"student": jnp.zeros((2, 3, 5))}, "set the same vocab_size"),
    ({"weights": jnp.ones((3,))}, "expected weights of shape"),
    ({"teacher_temperature": 0}, "set TEACHER_TEMPERATURE"),
    ({"student_temperature": -1.0}, "set STUDENT_TEMPERATURE"),
    ({"length_normalization": "mean"}, "got 'mean'; set LENGTH_NORMALIZATION"),
    ({"divergence": "kl"}, "got 'kl'; set DIVERGENCE"),
    ({"divergence": "jsd"}, "set BETA"),
    ({"segment_ids": jnp.ones((2, 2), int)}, "expected segment_ids of shape"),
  ],
)
def test_wrong_settings_of_distillation(options, message):
  student = options.pop("student", jnp.zeros((2, 3, 4)))
  weights = options.pop("weights", jnp.ones((2, 3)))
  with pytest.raises(ValueError, match=message):
    distillation(jnp.zeros((2, 3, 4)), weights, **options)(student)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"label_smoothing": 1.0}, "set label_smoothing"),
    ({"length_normalization": ""}, "set LENGTH_NORMALIZATION"),
    ({"targets": jnp.zeros((2, 4), int)}, "expected targets of shape"),
    ({"weights": jnp.ones((3,))}, "expected weights of shape"),
  ],
)
def test_wrong_settings_of_cross_entropy(options, message):
  targets = options.pop("targets", jnp.zeros((2, 3), int))
  weights = options.pop("weights", jnp.ones((2, 3)))
  with pytest.raises(ValueError, match=message):
    cross_entropy(targets, weights, **options)(jnp.zeros((2, 3, 4)))
