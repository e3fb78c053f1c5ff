"""Hard labels: the cross-entropy on rows from the data, and on no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_models
import toy_steps
from loss_batches import log_softmax64


# tests/losses/test_losses_cross_entropy.py has the losses by hand.
@pytest.mark.nightly
@pytest.mark.parametrize("chunk", [0, 5])
def test_weight_1_is_the_cross_entropy_on_the_data(chunk):
  model, student, teacher = toy_models.gkd(
    student_data_fraction=0.0,
    length_normalization="token",
    hard_label_weight=1.0,
    loss_chunk_size=chunk,
  )
  batch = toy_models.batch()

  @jax.jit
  def both(student):
    loss = lambda params: model.train_loss(
      params, teacher, batch, toy_models.inputs("data")
    )
    sft = lambda params: model.student.loss_fn(params, batch, None)[0]
    gradient = jax.grad(sft)(student)
    return jax.value_and_grad(loss, has_aux=True)(student), gradient

  ((loss, metrics), gradient), expected = both(student)
  q = log_softmax64(jax.jit(model.student.logits)(student, batch))
  targets, weights = (
    batch[f"decoder_{name}"] for name in ("target_tokens", "loss_weights")
  )
  picked = np.take_along_axis(q, targets[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(loss, -np.sum(weights * picked), rtol=1e-5)
  assert metrics["loss"][1] == weights.sum()
  np.testing.assert_allclose(
    metrics["hard_label_cross_entropy"], metrics["loss"], rtol=1e-6
  )
  toy_steps.assert_same(gradient, expected)


def test_rows_from_the_data_have_the_mix_and_samples_the_divergence():
  model, student, teacher = toy_models.gkd(
    student_data_fraction=0.5,
    student_temperature=0.8,
    length_normalization="token",
    hard_label_weight=lambda step: step / 4,
  )
  batch, key = toy_models.batch(), jax.random.key(1)

  @functools.partial(jax.jit, static_argnums=1)
  def losses_of(step, source):
    inputs = toy_models.inputs(source, key=key)._replace(step=step)
    encoded = model.student.encode(student, batch)
    trained, _ = model.with_samples(student, encoded, batch, inputs)
    logits = (
      a_model.logits(params, trained)
      for a_model, params in (
        (model.teacher, teacher),
        (model.student, student),
      )
    )
    loss, metrics = model.train_loss(student, teacher, batch, inputs)
    return loss, metrics, trained, *logits

  loss, metrics, trained, teacher_logits, logits = losses_of(
    jnp.int32(1), "mixed"
  )
  p, q = log_softmax64(teacher_logits), log_softmax64(logits / 0.8)
  targets = np.asarray(trained["decoder_target_tokens"])[..., None]
  picked = np.take_along_axis(log_softmax64(logits), targets, axis=-1)[..., 0]
  coins = [
    jax.random.uniform(jax.random.fold_in(jax.random.split(key, 3)[2], i))
    for i in range(8)
  ]
  alpha = 0.25 * (np.array(coins) >= 0.5)[:, None]  # 0 in rows of samples
  assert 0 < np.count_nonzero(alpha) < 8
  kl = np.sum(np.exp(p) * (p - q), axis=-1)
  expected = trained["decoder_loss_weights"] * (
    (1 - alpha) * kl - alpha * picked
  )
  np.testing.assert_allclose(loss, np.sum(expected), rtol=1e-5)
  counted = trained["decoder_loss_weights"] * (alpha > 0)
  np.testing.assert_allclose(
    metrics["hard_label_cross_entropy"],
    (-np.sum(counted * picked), np.sum(counted)),
    rtol=1e-5,
  )
  # A whole batch of samples: no weight changes a bit.
  without, most = (losses_of(jnp.int32(n), "student")[0] for n in (0, 4))
  assert without == most > 0
