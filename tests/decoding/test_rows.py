"""The decode functions behind the model, and a vocabulary with padding."""

import functools

import beam_oracle
import divergence_oracle
import jax
import jax.numpy as jnp
import loss_batches
import nightly
import numpy as np
import pytest
import toy_models

from gkd_jax import decoding, divergences, losses
from gkd_jax.decoding import sampling

REAL = 9  # of the toy models' 16 ids


@functools.cache
def decode(options, all_decodes=True, real=None, beam=False):
  """(tokens, scores) of the toy model; `options` as sorted pairs."""
  model = toy_models.model(
    8,
    decode_fn=decoding.beam_search if beam else decoding.sample,
    num_real_tokens=real,
    default_decoder_params=dict(options),
  )
  params = toy_models.params(model, 2)
  predict = functools.partial(
    model.predict_batch_with_aux, return_all_decodes=all_decodes
  )
  tokens, aux = jax.jit(predict)(params, toy_models.batch(), jax.random.key(0))
  return np.asarray(tokens), np.asarray(aux["scores"])


def scored(tokens, real=None):
  """Float64 log-prob of `[B, T]` outputs under the first `real` ids."""
  model = toy_models.model(8)
  batch = toy_models.batch() | {
    "decoder_input_tokens": sampling.shift_right(tokens),
    "decoder_target_tokens": tokens,
  }
  logits = jax.jit(model.logits)(toy_models.params(model, 2), batch)
  log_probs = loss_batches.log_softmax64(logits[:, :, :real])
  picked = np.take_along_axis(log_probs, tokens[:, :, None], axis=2)[:, :, 0]
  return (picked * sampling.sequence_weights(tokens)).sum(axis=1)


def without_pad(tokens):
  """Rows in which PAD only follows the end: to the network it is no token."""
  weights = np.asarray(sampling.sequence_weights(tokens))
  return ((tokens > 0) == (weights > 0)).all(axis=1)


def test_samples_of_a_prompt_are_ascending_and_scored():
  tokens, scores = decode((("num_decodes", 3),))
  assert tokens.shape == (8, 3, 7)
  assert (np.diff(scores, axis=1) >= 0).all() and np.ptp(scores, axis=1).all()
  for n in range(3):
    plain = without_pad(tokens[:, n])
    assert plain.sum() >= 2
    expected = scored(tokens[:, n])[plain]
    np.testing.assert_allclose(scores[plain, n], expected, rtol=1e-4)
  best = decode((("num_decodes", 3),), all_decodes=False)
  np.testing.assert_array_equal(best[0], tokens[:, -1])
  np.testing.assert_array_equal(best[1], scores[:, -1])


def test_one_beam_of_the_model_is_the_search_as_described():
  model = toy_models.model(8, decode_fn=decoding.beam_search)
  params, batch = toy_models.params(model, 2), toy_models.batch(3)
  tokens = np.asarray(jax.jit(model.predict_batch)(params, batch))

  @jax.jit
  def next_token(prefix):
    rows = dict(batch)
    rows["decoder_target_tokens"] = jnp.maximum(prefix, 1)
    rows["decoder_input_tokens"] = sampling.shift_right(prefix)
    return model.logits(params, rows)

  def distribution(row, prefix):
    padded = np.zeros((3, 7), np.int32)
    padded[:, : len(prefix)] = prefix
    logits = next_token(padded)[row, len(prefix)]
    return loss_batches.log_softmax64(logits)

  for row in range(3):
    ((expected, _),) = beam_oracle.best_outputs(
      functools.partial(distribution, row), 7, 0.6, 1
    )
    assert tuple(tokens[row, : len(expected)]) == expected
    assert not tokens[row, len(expected) :].any()


def test_options_override_defaults_and_the_default_is_greedy():
  model = toy_models.model(8)
  params, batch = toy_models.params(model, 2), toy_models.batch()
  greedy = jax.jit(model.predict_batch)(params, batch)
  cold = decode((("temperature", 0.0),), all_decodes=False)[0]
  np.testing.assert_array_equal(greedy, cold)
  hot = model.with_decode_fn(decoding.sample, temperature=0.0, num_decodes=2)
  assert jax.jit(model.predict_batch_with_aux)(params, batch)[0].shape == (8, 7)
  tokens, _ = jax.jit(
    lambda p, b, k: hot.predict_batch_with_aux(
      p, b, k, {"temperature": 1.0}, return_all_decodes=True
    )
  )(params, batch, jax.random.key(0))
  np.testing.assert_array_equal(tokens, decode((("num_decodes", 2),))[0])


def test_wrong_options_say_what_to_change():
  model = toy_models.model(8, decode_fn=decoding.beam_search)
  params, batch = toy_models.params(model, 2), toy_models.batch()
  with pytest.raises(
    ValueError, match=r"beam_search, got temperature; set DEC"
  ):
    jax.eval_shape(
      lambda: model.predict_batch_with_aux(
        params, batch, None, {"temperature": 1.0}
      )
    )
  with pytest.raises(ValueError, match="got 0; set num_decodes"):
    jax.eval_shape(
      lambda: model.predict_batch_with_aux(params, batch, num_decodes=0)
    )
  for number in (1, 17):
    with pytest.raises(ValueError, match=rf"got {number}; set NUM_REAL_TOKENS"):
      toy_models.model(8, num_real_tokens=number)


def test_rows_of_a_cache_are_found_by_its_shapes():
  cache = lambda n: [jnp.zeros((3, 2 * n, 4)), jnp.zeros(2), jnp.zeros(2 * n)]
  axes = decoding.row_axes(cache)
  assert axes == [1, -1, 0]
  wide = decoding.repeat_rows(
    [jnp.ones((3, 2, 4)), jnp.ones(2), jnp.arange(2)], 3, axes
  )
  assert [x.shape for x in wide] == [(3, 6, 4), (2,), (6,)]
  np.testing.assert_array_equal(wide[2], [0, 0, 0, 1, 1, 1])


# --- A vocabulary with padding -------------------------------------------------


@pytest.mark.parametrize(
  ("options", "beam"),
  [
    ((("temperature", 0.0),), False),
    ((("num_decodes", 8), ("temperature", 1e12)), False),
    ((("alpha", 0.0), ("num_decodes", 4)), True),
  ],
)
def test_padding_of_the_vocabulary_is_never_decoded(options, beam):
  free, _ = decode(options, beam=beam)
  assert (free >= REAL).any()
  tokens, scores = decode(options, real=REAL, beam=beam)
  assert tokens.max() == REAL - 1
  if options[-1][0] == "temperature" and options[-1][1]:
    # Even among the real ones.
    counts = np.bincount(tokens[:, :, 0].ravel(), minlength=REAL)
    assert (counts > 0).sum() >= REAL - 1
    return
  for n in range(tokens.shape[1]):
    plain = without_pad(tokens[:, n])
    expected = scored(tokens[:, n], REAL)[plain]
    np.testing.assert_allclose(scores[plain, n], expected, rtol=1e-4)


def test_on_policy_samples_hold_no_padding():
  model = toy_models.model(8, num_real_tokens=REAL)
  params, batch = toy_models.params(model, 2), toy_models.batch()
  result = jax.jit(
    lambda p, b: model.sample(
      p,
      model.encode(p, b),
      b,
      jax.random.key(0),
      temperature=100.0,
    )
  )(params, batch)
  assert result.tokens.max() == REAL - 1


@pytest.mark.parametrize(
  "beyond", nightly.of([0.0, 1e4, -1e9, np.inf], [1e4, np.inf])
)
def test_divergence_is_that_of_the_real_tokens(beyond):
  teacher, student, weights, _ = loss_batches.random_batch(shape=(3, 5, 12))
  teacher[:, :, REAL:] += beyond
  student[:, :, REAL:] -= 2 * min(beyond, 1e30)
  log_p, log_q = teacher[:, :, :REAL] / 0.5, student[:, :, :REAL]

  @jax.jit
  def every_loss(student):
    def loss(student, name):
      hyper = {"beta": 0.5} if "jsd" in name else {}
      total, _, aux = losses.distillation_loss(
        teacher,
        student,
        weights,
        divergence=divergences.get(name, **hyper),
        teacher_temperature=0.5,
        length_normalization="token",
        num_real_tokens=REAL,
      )
      return total, aux

    return {
      name: jax.value_and_grad(loss, has_aux=True)(student, name)
      for name in divergences.names()
    }

  for name, ((total, aux), gradient) in every_loss(student).items():
    expected = divergence_oracle.divergence(name, log_p, log_q) * weights
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5, err_msg=name)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, :, REAL:], 0.0)
    assert np.abs(gradient[:, :, :REAL]).max() > 1e-3
    for metric, logits in (
      ("teacher_entropy", log_p),
      ("student_entropy", log_q),
    ):
      distribution = loss_batches.log_softmax64(logits)
      entropy = -(np.exp(distribution) * distribution).sum(-1) * weights
      np.testing.assert_allclose(aux[metric][0], entropy.sum(), rtol=1e-5)


def test_models_leave_padding_out_of_gkd_and_not_of_cross_entropy():
  batch = toy_models.batch()
  batch = {k: np.where(v >= REAL, 2, v) for k, v in batch.items()}
  plain, padded = (
    toy_models.model(8, num_real_tokens=real) for real in (None, REAL)
  )
  params = toy_models.params(plain, 1)
  np.testing.assert_array_equal(
    jax.jit(padded.loss_fn)(params, batch, None)[0],
    jax.jit(plain.loss_fn)(params, batch, None)[0],
  )
  with pytest.raises(
    ValueError, match=r"got None \(teacher\) and 9 .* NUM_REAL"
  ):
    toy_models.models.GKDModel(padded, plain)
  gkd = toy_models.models.GKDModel(padded, padded)
  teacher_params = toy_models.params(plain, 2)
  loss, metrics = toy_models.train_loss(
    gkd, params, teacher_params, batch, "data"
  )
  weight = metrics["loss"][1]
  logits = [
    jax.jit(plain.logits)(p, batch)[:, :, :REAL]
    for p in (teacher_params, params)
  ]
  kl = divergence_oracle.divergence("forward_kl", *logits)
  weights = batch["decoder_loss_weights"]
  expected = ((kl * weights).sum(1) / weights.sum(1)).mean()
  np.testing.assert_allclose(loss / weight, expected, rtol=1e-5)
