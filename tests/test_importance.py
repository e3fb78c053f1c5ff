"""Outputs of an older student, weighted, have the newer one's loss in the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_decoder_only
import toy_models

from gkd_jax import importance, models, partitioning, sampling

LENGTH, REAL = 3, 4


def every_output(prefix=()):
  """All outputs of at most three tokens; 1 ends one, PAD is never drawn."""
  if len(prefix) == LENGTH or prefix[-1:] == (1,):
    return [prefix]
  return [y for token in (1, 2, 3) for y in every_output((*prefix, token))]


def features(rows=1):
  """Every output after one prompt, `rows` times."""
  prompt = toy_models.batch()["encoder_input_tokens"][5]
  outputs = every_output() * rows
  targets = np.array([[*y, *[0] * (LENGTH - len(y))] for y in outputs])
  targets = targets.astype(np.int32)
  return {
    "encoder_input_tokens": np.tile(prompt, (len(outputs), 1)),
    "decoder_target_tokens": targets,
    "decoder_input_tokens": np.asarray(sampling.shift_right(targets)),
    "decoder_loss_weights": (targets > 0).astype(np.float32),
  }


def gkd(dropout_rate=0.0, **settings):
  """A model of four tokens; parameters of a newer and an older student, a teacher."""
  real = {"num_real_tokens": REAL}
  student = toy_models.model(8, dropout_rate, **real)
  teacher = toy_models.model(12, **real)
  model = models.GKDModel(student, teacher, sample_ahead=True, **settings)
  new = toy_models.params(student, 1)
  noise = toy_models.params(student, 4)
  old = jax.tree.map(lambda a, b: a + 0.3 * b, new, noise)
  return model, new, old, toy_models.params(teacher, 2)


def log_law(model, params, batch):
  """Log-probs of all tokens in float64, as a sampler without a cache has them."""
  logits = np.array(jax.jit(model.student.logits)(params, batch), np.float64)
  logits = logits[..., 1:REAL] / model.sampling["temperature"]
  return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def log_probs(model, params, batch):
  """Log-probs `[B, T]` of the batch's tokens, float64, 0 after the end."""
  law = log_law(model, params, batch)
  targets = batch["decoder_target_tokens"]
  ids = np.maximum(targets - 1, 0)[..., None]
  return np.take_along_axis(law, ids, axis=-1)[..., 0] * (targets > 0)


def of_each(model, params, teacher, batch, gradients):
  """Losses, their weights and their gradients, of each row by itself."""
  source = "student" if importance.LOG_PROBS in batch else "data"

  def loss(params, row):
    one = {name: x[None] for name, x in row.items()}
    value, weight, _ = model.train_loss(
      params,
      teacher,
      one,
      source=source,
      step=0,
      key=jax.random.key(0),
      row_ids=jnp.arange(1),
    )
    return value, weight

  both = jax.value_and_grad(loss, has_aux=True) if gradients else loss
  rows = jax.jit(lambda p, rows: jax.lax.map(lambda row: both(p, row), rows))
  found = [
    np.asarray(x, np.float64) for x in jax.tree.leaves(rows(params, batch))
  ]
  values, weights, *gradients = found
  gradients = [x.reshape(len(values), -1) for x in gradients]
  return values, weights, *gradients


@pytest.mark.parametrize(
  ("normalization", "chunk", "temperature"),
  [("sequence", 0, 1.0), ("token", 2, 0.7)],
)
def test_the_mean_over_all_outputs_is_the_newer_students(
  normalization, chunk, temperature
):
  model, new, old, teacher = gkd(
    length_normalization=normalization,
    loss_chunk_size=chunk,
    sampling_temperature=temperature,
    max_importance_weight=np.inf,
  )
  batch = features()
  now, before = (log_probs(model, p, batch) for p in (new, old))
  q, older = (np.exp(x.sum(axis=1)) for x in (now, before))
  np.testing.assert_allclose([q.sum(), older.sum()], 1.0, rtol=1e-12)
  assert np.abs(np.log(q / older)).max() > 0.5
  gradients = normalization == "token"
  plain = of_each(model, new, teacher, batch, gradients)
  drawn = batch | {importance.LOG_PROBS: before.astype(np.float32)}
  weighted = of_each(model, new, teacher, drawn, gradients)
  differ = []
  for a, b in zip(plain, weighted, strict=True):
    expected = q @ a
    scale = np.abs(expected).max()
    np.testing.assert_allclose(older @ b, expected, atol=5e-6 * scale, rtol=0)
    differ.append(np.abs(older @ a - expected).max() > 1e-2 * scale)
  # Without weights the means differ; a sequence counts as one whatever it weighs.
  assert differ[0] and differ[1] == gradients and all(differ[2:])


def test_weights_are_cut_and_counted():
  old = np.log([[0.5, 0.2, 0.5, 0.9], [0.1, 0.5, 0.5, 0.5]])
  new = np.log([[0.25, 0.6, 0.5, 0.1], [0.3, 0.5, 0.25, 0.5]])
  used = np.array([[1, 1, 1, 0], [1, 1, 1, 0]])
  arrays = (jnp.asarray(x, jnp.float32) for x in (new, old, used))
  new, old, used = arrays
  token = importance.factors(
    new, old, used, length_normalization="token", largest=1.4
  )
  expected = [[1.0, 0.5, 1.4, 0.0], [1.0, 1.4, 1.4, 0.0]]
  np.testing.assert_allclose(token, expected, rtol=1e-6)
  sequence = importance.factors(
    new, old, used, length_normalization="sequence", largest=1.5
  )
  expected = [[1.5] * 3 + [0.0]] * 2  # 1.5 and 3 · 1 · 0.5 = 1.5
  np.testing.assert_allclose(sequence, expected, rtol=1e-6)


def test_chunks_have_the_log_probs_of_whole_logits():
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(4, 7, 5)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
  targets = jnp.asarray(rng.integers(1, 12, (4, 7)), jnp.int32)
  weights = np.ones((4, 7), np.float32)
  weights[:, 4:] = 0  # a chunk of padding is not computed
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64) / 0.7
  law = np.exp(logits[..., 1:12])
  picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)
  expected = picked[..., 0] - np.log(law.sum(-1))
  settings = {"num_real_tokens": 12, "temperature": 0.7, "suppress_ids": (0,)}
  mesh = partitioning.make_mesh(2, jax.devices()[:4])
  plain = lambda f: jax.jit(f)
  for chunk, jit in ((8, plain), (100, plain), (6, None)):
    call = lambda *x, chunk=chunk: importance.chunked_target_log_probs(
      *x, chunk_size=chunk, **settings
    )
    run = plain(call) if jit else partitioning.jit(call, mesh)
    got = np.asarray(run(hidden, head, targets, jnp.asarray(weights)))
    np.testing.assert_allclose(got[:, :4], expected[:, :4], rtol=2e-6)
  got = importance.target_log_probs(hidden @ head, targets, **settings)
  np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_weights_are_of_the_network_without_dropout():
  model, new, old, teacher = gkd(0.5, length_normalization="token")
  batch = features()
  now, before = (log_probs(model, p, batch) for p in (new, old))
  used = batch["decoder_loss_weights"]
  ratios = np.cumsum(now - before, axis=1) - (now - before)
  expected = np.sum(np.minimum(np.exp(ratios), 2.0) * used)
  loss = jax.jit(
    lambda *args: model.train_loss(
      *args,
      source="student",
      step=0,
      key=jax.random.key(3),
      row_ids=jnp.arange(len(used)),
    )
  )
  drawn = batch | {importance.LOG_PROBS: before.astype(np.float32)}
  _, weight, metrics = loss(new, teacher, drawn)
  np.testing.assert_allclose(weight, expected, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["importance_weight"], (expected, used.sum()), rtol=1e-5
  )
  assert metrics["on_policy_share"] == (15, 15)
  assert metrics["sampled_length"] == (used.sum(), 15)
  # Eight have three tokens, and no EOS.
  assert metrics["sampled_eos"] == (7, 15)


def test_outputs_of_decoder_only_rows_are_weighted_where_they_stand():
  model, new, _ = toy_decoder_only.gkd(sample_ahead=True)
  old = jax.tree.map(lambda x: 1.2 * x, new)
  key = jax.random.key(3)
  batch = jax.jit(lambda *args: importance.draw(model, *args))(
    old, toy_decoder_only.batch(), key
  )
  used = np.asarray(batch["decoder_loss_weights"]) > 0
  assert not used.all() and not used[:, 0].all()

  run = jax.jit(model.student.logits)

  def picked(params):
    logits = np.array(run(params, batch), np.float64)
    logits[..., 0] = -np.inf  # PAD is not drawn
    law = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.asarray(batch["decoder_target_tokens"])[..., None]
    return np.where(used, np.take_along_axis(law, ids, -1)[..., 0], 0.0)

  before, now = picked(old), picked(new)
  got = np.asarray(batch[importance.LOG_PROBS])
  np.testing.assert_allclose(got[used], before[used], atol=2e-5)
  ratio = np.exp((now - before).sum(axis=1))
  _, metrics = importance.weighted(model, new, batch, run(new, batch), 0)
  expected = np.sum(np.minimum(ratio, 2.0)[:, None] * used)
  np.testing.assert_allclose(
    metrics["importance_weight"], (expected, used.sum()), rtol=1e-5
  )
  cut = np.sum((ratio > 2.0)[:, None] * used)
  assert 0 < cut < used.sum()
  np.testing.assert_allclose(metrics["importance_cut"], (cut, used.sum()))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"sampling_temperature": 0.0}, "temperature of 0; set SAMPLING_TEMP"),
    (
      {"sampling_top_k": 5},
      r"top_k and top_p of \(5, 1.0\); set models.GKDModel",
    ),
    ({"sampling_top_p": 0.9}, "the older student's filter removed"),
    (
      {"student_data_granularity": "example"},
      "got 'example'; set STUDENT_DATA_GRANULARITY = 'step'",
    ),
    ({"max_importance_weight": 0.5}, "got 0.5; set MAX_IMPORTANCE_WEIGHT"),
  ],
)
def test_settings_that_outputs_cannot_be_drawn_ahead_with(settings, message):
  toy_models.gkd(**settings)  # without it they are settings as any other
  with pytest.raises(ValueError, match=message):
    toy_models.gkd(sample_ahead=True, **settings)


def test_packed_rows_are_refused():
  model, params, _ = toy_models.gkd(sample_ahead=True)
  batch = toy_models.batch()
  batch["decoder_segment_ids"] = np.ones_like(batch["decoder_target_tokens"])
  with pytest.raises(ValueError, match="set PACK = False"):
    importance.draw(model, params, batch, jax.random.key(0))
