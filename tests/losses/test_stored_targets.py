"""Losses from stored top-k log-probs: a lower bound that becomes exact."""

import divergence_oracle
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import loss_batches
import numpy as np
import pytest
from jax import test_util

from gkd_jax import divergences, losses

SIZES = (1, 2, 3, 5)
VOCAB = SIZES[-1]
HYPER = {"beta": 0.5, "alpha": 0.1}
logits_pairs = hnp.arrays(
  np.float32, (2, 6, VOCAB), elements=st.floats(-30, 30, width=32)
).map(lambda x: x + 0.0)  # top_k ranks -0.0 below 0.0, an argsort does not


def divergence(name):
  for hyper in ({}, {"beta": HYPER["beta"]}, {"alpha": HYPER["alpha"]}):
    try:
      return divergences.get(name, **hyper)
    except ValueError:
      continue
  raise AssertionError(f"no settings for {name}")


def stored_loss(
  teacher, student, weights, top_k, *, dtype="float32", **options
):
  options = {"divergence": "forward_kl"} | options
  real = options.get("num_real_tokens")

  @jax.jit
  def loss(teacher, student, weights):
    ids, log_probs = losses.top_k_log_probs(
      teacher, top_k, num_real_tokens=real
    )
    return losses.stored_distillation_loss(
      ids, log_probs.astype(dtype), student, weights, **options
    )

  return loss(teacher, student, weights)


@jax.jit
def every_value(teacher, student):
  """Of each divergence and k, the value at each position `[P]`."""

  def one(p, q, top_k, function):
    p, q = p[None, None], q[None, None]
    return stored_loss(p, q, jnp.ones((1, 1)), top_k, divergence=function)[0]

  return {
    (name, k): jax.vmap(lambda p, q, n=name, k=k: one(p, q, k, divergence(n)))(
      teacher, student
    )
    for name in divergences.names()
    for k in SIZES
  }


def bucket_logs(teacher, student, top_k):
  """Both distributions over k + 1 buckets, log-probs in float64."""
  p, q = map(loss_batches.log_softmax64, (teacher, student))
  order = np.argsort(-p, axis=-1, kind="stable")
  p, q = (np.take_along_axis(x, order, axis=-1) for x in (p, q))
  if top_k == p.shape[-1]:
    return p, q
  return tuple(
    np.concatenate(
      [
        x[..., :top_k],
        np.logaddexp.reduce(x[..., top_k:], -1, keepdims=True),
      ],
      -1,
    )
    for x in (p, q)
  )


@hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
@hypothesis.given(logits_pairs)
def test_a_lower_bound_that_grows_with_k_and_is_exact_at_the_end(pair):
  teacher, student = pair
  values = every_value(teacher, student)
  for name in divergences.names():
    exact = divergence_oracle.divergence(name, teacher, student, **HYPER)
    close = 1e-4 * exact + 1e-5
    before = np.zeros_like(exact)
    for k in SIZES:
      got = np.asarray(values[name, k], np.float64)
      assert np.all(got >= 0), name
      assert np.all(got >= before - close), (name, k)
      assert np.all(got <= exact + close), (name, k)
      # The bound itself, and not only that it is one.
      buckets = bucket_logs(teacher, student, k)
      expected = divergence_oracle.divergence(name, *buckets, **HYPER)
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
      before = got
    assert np.all(np.abs(before - exact) <= close), name


def test_mass_outside_of_the_top_k_by_hand():
  """p = .5 .3 .2, q = .025 .015 .96: renormalised over the top 2 they agree."""
  p, q = np.log([[[0.5, 0.3, 0.2]], [[0.025, 0.015, 0.96]]]).astype(np.float32)
  loss, weight, metrics = stored_loss(p[None], q[None], np.ones((1, 1)), 2)
  expected = 0.8 * np.log(20) + 0.2 * np.log(0.2 / 0.96)
  assert float(loss) == pytest.approx(expected, rel=1e-5) and weight == 1
  values = {name: float(total) for name, (total, _) in metrics.items()}
  assert values["teacher_tail_mass"] == pytest.approx(0.2, rel=1e-5)
  assert values["student_tail_mass"] == pytest.approx(0.96, rel=1e-5)
  assert values["top1_agreement"] == 0
  # The tail is the student's likeliest bucket, but no token of the top 2 is.
  same = stored_loss(p[None], p[None], np.ones((1, 1)), 1)[2]
  assert float(same["top1_agreement"][0]) == 1


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_value_and_gradient_at_full_size_are_the_dense_loss(normalization):
  teacher, student, weights, _ = loss_batches.random_batch()
  options = {"divergence": "reverse_kl", "length_normalization": normalization}
  dense = loss_batches.value_and_grad(
    lambda x: losses.distillation_loss(teacher, x, weights, **options), student
  )
  stored = loss_batches.value_and_grad(
    lambda x: stored_loss(teacher, x, weights, 7, **options), student
  )
  for a, b in zip(stored, dense, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_hard_labels_of_the_whole_vocabulary_against_float64():
  teacher, student, weights, targets = loss_batches.random_batch()
  targets %= 6  # the seventh token is padding of the vocabulary

  @jax.jit
  def of(alpha):
    return stored_loss(
      teacher,
      student,
      weights,
      2,
      student_temperature=0.8,
      num_real_tokens=6,
      hard_labels=losses.HardLabels(targets, alpha),
    )

  real = teacher[..., :6], student[..., :6] / 0.8
  p, q = bucket_logs(*real, 2)
  kl = np.sum(np.exp(p) * (p - q), axis=-1)
  # At temperature 1.
  log_probs = loss_batches.log_softmax64(student[..., :6])
  picked = np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  shares = weights / weights.sum(axis=1, keepdims=True)
  for alpha in (0.0, 1.0, 0.3):
    loss, weight, metrics = of(alpha)
    expected = np.sum(shares * ((1 - alpha) * kl - alpha * picked))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert weight == 3
    counted = weights * (alpha > 0)
    np.testing.assert_allclose(
      metrics["hard_label_cross_entropy"],
      (-np.sum(counted * picked), np.sum(counted)),
      rtol=1e-5,
    )


def test_gradient_of_a_coarse_distribution():
  teacher, student, weights, _ = loss_batches.random_batch(shape=(2, 3, 7))
  test_util.check_grads(
    jax.jit(
      lambda x: stored_loss(teacher, x, weights, 2, student_temperature=1.5)[0]
    ),
    (student,),
    order=1,
    modes=["rev"],
    rtol=2e-2,
  )


def test_padding_adds_neither_value_nor_gradient():
  teacher, student, weights, _ = loss_batches.random_batch()
  clean = loss_batches.value_and_grad(
    lambda x: stored_loss(teacher, x, weights, 3), student
  )
  padding = weights == 0
  assert padding.any()
  student[padding] = np.nan
  ids, log_probs = map(np.array, losses.top_k_log_probs(teacher, 3))
  ids[padding], log_probs[padding] = 0, np.nan
  got = loss_batches.value_and_grad(
    lambda x: losses.stored_distillation_loss(
      ids, log_probs, x, weights, divergence="forward_kl"
    ),
    student,
  )
  for a, b in zip(got, clean, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_padding_of_the_vocabulary_has_no_mass():
  teacher, student, weights, _ = loss_batches.random_batch()
  for k in (2, 5):
    cut = stored_loss(teacher[..., :5], student[..., :5], weights, k)[0]
    masked = stored_loss(teacher, student, weights, k, num_real_tokens=5)[0]
    np.testing.assert_allclose(masked, cut, rtol=1e-6)


def test_temperatures():
  teacher, student, weights, _ = loss_batches.random_batch()

  @jax.jit
  def both(teacher, student):
    settings = {"divergence": "forward_kl", "student_temperature": 0.5}
    stored = losses.top_k_log_probs(teacher, 7, teacher_temperature=2.0)
    return (
      losses.stored_distillation_loss(*stored, student, weights, **settings)[0],
      losses.distillation_loss(
        teacher, student, weights, teacher_temperature=2.0, **settings
      )[0],
    )

  np.testing.assert_allclose(*both(teacher, student), rtol=1e-5)


def test_float16_storage():
  """Eleven bits of a log-prob; a bucket without mass stays finite."""
  teacher, student, weights, _ = loss_batches.random_batch()
  for k in (3, 7):
    exact = stored_loss(teacher, student, weights, k)[0]
    narrow = stored_loss(teacher, student, weights, k, dtype="float16")[0]
    assert narrow != exact
    np.testing.assert_allclose(narrow, exact, rtol=2e-3)
  stored = losses.top_k_log_probs(teacher, 7)[1].astype("float16")
  assert np.isfinite(stored).all() and np.all(np.exp(stored[..., -1]) == 0)


def test_what_does_not_fit_is_told():
  teacher, student, weights, _ = loss_batches.random_batch()
  with pytest.raises(ValueError, match=r"within 1\.\.7.*got 8; set TOP_K"):
    losses.top_k_log_probs(teacher, 8)
  ids, log_probs = losses.top_k_log_probs(teacher, 2)
  loss = lambda *args: losses.stored_distillation_loss(
    *args, weights, divergence="forward_kl"
  )[0]
  with pytest.raises(ValueError, match="those of the ids and of the tail"):
    loss(ids, log_probs[..., :2], student)
  with pytest.raises(ValueError, match="set TASK_FEATURE_LENGTHS"):
    loss(ids[:, 1:], log_probs[:, 1:], student)
  # Ids of another vocabulary cannot be seen in the shapes.
  assert np.isnan(loss(ids + 7, log_probs, student))
