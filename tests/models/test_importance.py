"""Outputs of an older student, weighted, have the newer one's loss in the mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_decoder_only
import toy_models

from gkd_jax import losses, models, partitioning
from gkd_jax.models import importance

LENGTH, REAL = 3, 4


def every_output(prefix=()):
  """All outputs of at most three tokens; 1 ends one, PAD is never drawn."""
  if len(prefix) == LENGTH or prefix[-1:] == (1,):
    return [prefix]
  return [y for token in (1, 2, 3) for y in every_output((*prefix, token))]


def padded():
  """`every_output`, `[15, 3]`."""
  rows = [[*y, *[0] * (LENGTH - len(y))] for y in every_output()]
  return np.array(rows, np.int32)


def gkd(**settings):
  """A model of four tokens; parameters of a newer and an older student, a teacher."""
  student, teacher = (
    toy_decoder_only.model(width, num_real_tokens=REAL) for width in (8, 12)
  )
  model = models.GKDModel(student, teacher, sample_ahead=True, **settings)
  new, noise = (toy_decoder_only.params(student, seed) for seed in (3, 4))
  old = jax.tree.map(lambda a, b: a + 0.3 * b, new, noise)
  return model, new, old, toy_decoder_only.params(teacher, 2)


def log_probs(model, logits, batch):
  """Log-probs `[B, T]` of a batch's outputs in float64, 0 elsewhere."""
  real = model.student.num_real_tokens
  logits = np.array(logits, np.float64)[..., 1:real]  # PAD is not drawn
  logits = logits / model.sampling["temperature"]
  law = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  used = np.asarray(batch["decoder_loss_weights"]) > 0
  ids = np.where(used, np.asarray(batch["decoder_target_tokens"]) - 1, 0)
  return np.take_along_axis(law, ids[..., None], axis=-1)[..., 0] * used


def of_each(model, teacher):
  """A function to losses, their weights and gradients, of each row by itself."""

  def loss(params, row):
    one = {name: x[None] for name, x in row.items()}
    value, weight, _ = model.train_loss(
      params,
      teacher,
      one,
      source="student",
      step=0,
      key=jax.random.key(0),
      row_ids=jnp.arange(1),
    )
    return value, weight

  both = jax.value_and_grad(loss, has_aux=True)
  rows = jax.jit(lambda p, rows: jax.lax.map(lambda row: both(p, row), rows))

  def run(params, batch, old_scores):
    scores = {importance.LOG_PROBS: old_scores.astype(np.float32)}
    found = jax.tree.leaves(rows(params, batch | scores))
    return [np.asarray(x, np.float64).reshape(len(x), -1) for x in found]

  return run


def test_the_mean_over_all_outputs_is_the_newer_students():
  model, new, old, teacher = gkd(
    length_normalization="token",
    loss_chunk_size=2,
    sampling_temperature=0.7,
    max_importance_weight=np.inf,
  )
  batch = toy_decoder_only.rows([([9, 7], y) for y in every_output()], 5)
  logits = jax.jit(model.student.logits)
  now, before = (log_probs(model, logits(p, batch), batch) for p in (new, old))
  q, older = (np.exp(x.sum(axis=1)) for x in (now, before))
  np.testing.assert_allclose([q.sum(), older.sum()], 1.0, rtol=1e-12)
  run = of_each(model, teacher)
  plain = run(new, batch, now)  # each weight is 1
  lengths = batch["decoder_loss_weights"].sum(axis=1, keepdims=True)
  np.testing.assert_allclose(plain[1], lengths, rtol=1e-5)
  weighted = run(new, batch, before)
  for a, b in zip(plain, weighted, strict=True):
    expected = q @ a
    scale = np.abs(expected).max()
    np.testing.assert_allclose(older @ b, expected, atol=5e-6 * scale, rtol=0)
    # Without weights the means differ, so that they are needed.
    assert np.abs(older @ a - expected).max() > 1e-2 * scale


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_the_mean_of_a_loss_of_tables(normalization):
  """As above, of laws that are tables: a row of logits for each prefix."""
  targets = padded()
  rng = np.random.default_rng(0)
  draw = functools.cache(lambda *_: rng.normal(size=REAL))
  table = lambda of: np.array(
    [[draw(of, *row[:t]) for t in range(LENGTH)] for row in targets.tolist()]
  )
  teacher, old, change = (table(of) for of in ("teacher", "old", "change"))
  new = old + 0.5 * change
  used = (targets > 0).astype(np.float64)

  def scores(logits):
    law = np.log(np.exp(logits[..., 1:]).sum(axis=-1))
    ids = targets[..., None]
    return (np.take_along_axis(logits, ids, axis=-1)[..., 0] - law) * used

  q, older = (np.exp(scores(x).sum(axis=1)) for x in (new, old))
  np.testing.assert_allclose([q.sum(), older.sum()], 1.0, rtol=1e-12)

  def loss(new, weighted, old_scores, teacher, targets, used):
    one = [x[None] for x in (old_scores, teacher, new, targets, used)]
    old_scores, teacher, new, targets, used = one
    found = importance.factors(
      importance.target_log_probs(
        new, targets, num_real_tokens=None, suppress_ids=(0,)
      ),
      old_scores,
      used,
      length_normalization=normalization,
      largest=np.inf,
    )
    return losses.distillation_loss(
      teacher,
      new,
      used,
      divergence="forward_kl",
      length_normalization=normalization,
      importance=found if weighted else None,
    )[:2]

  def each(weighted):
    one = jax.value_and_grad(loss, has_aux=True)
    every = jax.vmap(lambda new, *rest: one(new, weighted, *rest))
    found = jax.jit(every)(new, scores(old), teacher, targets, used)
    return [np.asarray(x, float) for x in jax.tree.leaves(found)]

  (a, a_sum, a_grad), (b, b_sum, b_grad) = each(False), each(True)
  np.testing.assert_allclose(older @ b, q @ a, rtol=1e-5)
  np.testing.assert_allclose(older @ b_sum, q @ a_sum, rtol=1e-5)
  assert abs(older @ a / (q @ a) - 1) > 0.01
  # By hand: of the whole output, or of what stands before the token.
  weights = np.exp(np.cumsum(scores(new) - scores(old), axis=1))
  if normalization == "sequence":
    weights = np.tile(weights[:, -1:], LENGTH)
  else:
    weights = np.pad(weights, ((0, 0), (1, 0)), constant_values=1.0)[:, :-1]
  expected = weights[..., None] * a_grad
  np.testing.assert_allclose(b_grad, expected, rtol=1e-4, atol=1e-6)


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


def test_weights_are_of_outputs_as_they_stand_and_are_drawn():
  """In decoder-only rows after the prompts, and without the step's dropout."""
  model, new, teacher = toy_decoder_only.gkd(
    dropout_rate=0.5, sample_ahead=True
  )
  old = jax.tree.map(lambda x: 1.2 * x, new)
  key = jax.random.key(3)
  batch = jax.jit(lambda *args: importance.draw(model, *args))(
    old, toy_decoder_only.batch(), key
  )
  used = np.asarray(batch["decoder_loss_weights"]) > 0
  assert not used.all() and not used[:, 0].all()
  logits = jax.jit(model.student.logits)
  now, before = (log_probs(model, logits(p, batch), batch) for p in (new, old))
  got = np.asarray(batch[importance.LOG_PROBS])
  np.testing.assert_allclose(got[used], before[used], atol=2e-5)
  ratio = np.exp((now - before).sum(axis=1, keepdims=True))
  loss = jax.jit(
    lambda *args: model.train_loss(
      *args, source="student", step=0, key=key, row_ids=jnp.arange(8)
    )
  )
  _, weight, metrics = loss(new, teacher, batch)
  assert weight == 8
  number = used.sum()
  for name, value, total in (
    ("importance_weight", np.sum(np.minimum(ratio, 2.0) * used), number),
    ("importance_cut", np.sum((ratio > 2.0) * used), number),
    ("on_policy_share", 8, 8),
    ("sampled_length", number, 8),
    ("sampled_eos", np.sum((batch["decoder_target_tokens"] == 1) & used), 8),
  ):
    assert value > 0
    np.testing.assert_allclose(metrics[name], (value, total), rtol=1e-5)


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
  toy_decoder_only.gkd(**settings)  # without it they are settings as any other
  with pytest.raises(ValueError, match=message):
    toy_decoder_only.gkd(sample_ahead=True, **settings)


def test_packed_rows_are_refused():
  student, teacher = toy_models.model(8), toy_models.model(12)
  model = models.GKDModel(student, teacher, sample_ahead=True)
  batch = toy_models.batch()
  batch["decoder_segment_ids"] = np.ones_like(batch["decoder_target_tokens"])
  with pytest.raises(ValueError, match="set PACK = False"):
    importance.draw(model, {}, batch, jax.random.key(0))
