"""MiniLLM's gradient: the paper's sum by hand, and the exact one by enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_decoder_only
import toy_models

from gkd_jax import losses, models, schedules


def distribution(logits):
  """Softmax in float64."""
  logits = np.asarray(logits, np.float64)
  e = np.exp(logits - logits.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def by_hand(p, q, y, lengths, mix, *, normalize):
  """Slope of the summed loss in the student's logits, token by token.

  Args:
    p: teacher's distributions, float64 `[B, T, V]`.
    q: the student's.
    y: tokens `[B, T]`.
    lengths: of the outputs.
    mix: the teacher's share.
    normalize: mean of the later r, or their sum.
  """
  slope = np.zeros_like(q)
  for b, length in enumerate(lengths):
    r = [np.log(p[b, t, y[b, t]] / q[b, t, y[b, t]]) for t in range(length)]
    for t in range(length):
      pt, qt, token = p[b, t], q[b, t], y[b, t]
      m = mix * pt[token] + (1 - mix) * qt[token]
      w = qt[token] / m
      used = qt > 0
      ratio = np.log(qt[used] / pt[used])
      kl = np.sum(qt[used] * ratio)
      slope[b, t, used] += w * qt[used] * (ratio - kl)
      later = r[t + 1 :]
      gain = (np.mean(later) if normalize else np.sum(later)) if later else 0.0
      slope[b, t] -= w * gain * (np.eye(len(qt))[token] - qt)
  return slope


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mix", [0.0, 0.2])
def test_gradient_on_a_fixed_batch_is_the_papers(mix, normalize):
  rng = np.random.default_rng(0)
  lengths = [5, 1, 3, 2]
  teacher, student = rng.normal(0, 1.5, (2, 4, 5, 6)).astype(np.float32)
  y = rng.integers(0, 6, (4, 5))
  weights = (np.arange(5) < np.array(lengths)[:, None]).astype(np.float32)

  def loss(logits):
    return losses.minillm_loss(
      jax.nn.log_softmax(jnp.asarray(teacher)),
      jax.nn.log_softmax(logits),
      jnp.asarray(y),
      jnp.asarray(weights),
      teacher_mix=mix,
      normalize_returns=normalize,
    )[:2]

  got, number = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(student))
  expected = by_hand(
    distribution(teacher),
    distribution(student),
    y,
    lengths,
    mix,
    normalize=normalize,
  )
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  assert number == 4


# ---- all outputs of a tiny model: two tokens of three, 0 ends an output -------
OUTPUTS = [(0,), *itertools.product((1, 2), (0, 1, 2))]
STUDENT = np.array([[0.3, -0.2, 0.5], [0.1, 0.4, -0.6], [-0.3, 0.2, 0.7]])
TEACHER = np.array([[-1.0, 0.6, 0.1], [0.9, -0.8, 0.2], [0.5, 0.5, -1.2]])


def probability(distributions, y):
  return distributions[0, y[0]] * (
    distributions[y[0], y[1]] if len(y) > 1 else 1.0
  )


def exact_gradient():
  """Of Σ_y q(y) log q(y)/p(y) in the student's logits, by differences."""
  p = distribution(TEACHER)

  def kl(theta):
    q = distribution(theta)
    return sum(
      probability(q, y) * np.log(probability(q, y) / probability(p, y))
      for y in OUTPUTS
    )

  result = np.zeros((3, 3))
  for i, j in np.ndindex(3, 3):
    shift = np.zeros((3, 3))
    shift[i, j] = 1e-5
    result[i, j] = (kl(STUDENT + shift) - kl(STUDENT - shift)) / 2e-5
  return result


def expected_estimate(mix, **settings):
  """Mean of the estimate over outputs drawn from the mixture."""
  rows = jnp.asarray([[0, y[0]] for y in OUTPUTS])  # which logits at t = 0, 1
  tokens = jnp.asarray([[*y, 0][:2] for y in OUTPUTS])
  weights = jnp.asarray([[1.0, float(len(y) > 1)] for y in OUTPUTS])

  def losses_of_outputs(theta):
    student = jax.nn.log_softmax(theta)[rows]
    teacher = jax.nn.log_softmax(jnp.asarray(TEACHER, jnp.float32))[rows]
    loss = lambda *x: losses.minillm_loss(*x, teacher_mix=mix, **settings)[0]
    one = lambda *x: loss(*(v[None] for v in x))
    return jax.vmap(one)(teacher, student, tokens, weights)

  gradients = jax.jit(jax.jacobian(losses_of_outputs))(
    jnp.asarray(STUDENT, jnp.float32)
  )
  m = mix * distribution(TEACHER) + (1 - mix) * distribution(STUDENT)
  shares = np.array([probability(m, y) for y in OUTPUTS])
  np.testing.assert_allclose(shares.sum(), 1)
  return np.tensordot(shares, np.asarray(gradients, np.float64), 1)


def test_the_expectation_is_the_exact_gradient_of_the_sequence_kl():
  exact = exact_gradient()
  settings = {"normalize_returns": False}
  for mix, importance in ((0.0, "token"), (0.0, "exact"), (0.2, "exact")):
    got = expected_estimate(mix, importance=importance, **settings)
    np.testing.assert_allclose(got, exact, atol=2e-6)
  # The paper's approximation is biased, but not by much.
  got = expected_estimate(0.2, importance="token", **settings)
  bias = np.linalg.norm(got - exact) / np.linalg.norm(exact)
  assert 0.01 < bias < 0.2


# ---- the model ----------------------------------------------------------------


def mini(toys=toy_models, **settings):
  plain, student, teacher = toys.gkd()
  model = models.MiniLLMModel(plain.student, plain.teacher, **settings)
  return model, student, teacher


def features(rows, length):
  """The same prompt in all rows."""
  batch = toy_models.batch(8)
  prompt = batch["encoder_input_tokens"][5]
  return {
    "encoder_input_tokens": np.tile(prompt, (rows, 1)),
    "decoder_input_tokens": np.zeros((rows, length), np.int32),
    "decoder_target_tokens": np.zeros((rows, length), np.int32),
  }


def draw(model, params, teacher, batch, key):
  """What a step samples: (tokens, weights, log-probs)."""

  @jax.jit
  def run(params, teacher, batch):
    rows = jnp.arange(batch["decoder_target_tokens"].shape[0])
    encoded = model.student.encode(params, batch)
    return model.draw(
      params, encoded, batch, key, row_ids=rows, teacher_params=teacher
    )

  return run(params, teacher, batch)


def test_outputs_follow_the_mixture_token_by_token():
  rows, mix = 12_000, 0.4
  model, student, teacher = mini(teacher_mix=mix, teacher_temperature=0.5)
  tokens, _, _ = draw(
    model, student, teacher, features(rows, 2), jax.random.key(3)
  )
  tokens = np.asarray(tokens)
  first = np.bincount(tokens[:, 0], minlength=16)
  common = int(np.argmax(np.where(np.arange(16) == 1, 0, first)))

  def mixed(position, previous):
    """The mixture after `previous`, both networks run without a cache."""
    inputs = np.array([[0, *previous]], np.int32)
    batch = features(1, inputs.shape[1]) | {
      "decoder_input_tokens": inputs,
      "decoder_target_tokens": np.ones_like(inputs),
    }
    distributions = []
    for m, p, temperature in (
      (model.teacher, teacher, 0.5),
      (model.student, student, 1.0),
    ):
      logits = np.array(jax.jit(m.logits)(p, batch)[0, position], np.float64)
      logits[0] = -np.inf
      distributions.append(distribution(logits / temperature))
    assert np.abs(distributions[0] - distributions[1]).sum() > 0.3
    return mix * distributions[0] + (1 - mix) * distributions[1]

  second = np.bincount(tokens[tokens[:, 0] == common, 1], minlength=16)
  for counts, expected in (
    (first, mixed(0, [])),
    (second, mixed(1, [common])),
  ):
    number = counts.sum()
    assert number > 500
    error = np.sqrt(expected * (1 - expected) / number)
    assert np.all(np.abs(counts / number - expected) < 4.5 * error + 1e-9)


@pytest.mark.parametrize("toys", [toy_models, toy_decoder_only])
def test_a_teacher_equal_to_the_student_changes_no_output(toys):
  plain, student, _ = toys.gkd()
  model = models.MiniLLMModel(plain.student, plain.student, teacher_mix=0.3)
  batch, key = toys.batch(), jax.random.key(1)
  tokens, weights, _ = draw(model, student, student, batch, key)
  alone, alone_weights, _ = draw(plain, student, None, batch, key)
  np.testing.assert_array_equal(tokens, alone)
  np.testing.assert_array_equal(weights, alone_weights)
  lengths = np.asarray(weights).sum(1)
  assert lengths.min() < lengths.max()


@functools.cache
def step_gradient(microbatches):
  model, student, teacher = mini()
  step, optimizer = toy_models.sgd_step(
    model, "student", num_microbatches=microbatches
  )
  state = toy_models.state(student, optimizer)
  new, metrics = jax.jit(step)(state, teacher, toy_models.batch())
  return jax.tree.map(jnp.subtract, student, new.params), metrics


def assert_same(a, b, tolerance=1e-5):
  difference = optax.tree.norm(jax.tree.map(jnp.subtract, a, b))
  assert difference <= tolerance * optax.tree.norm(b)


def test_the_steps_gradient_is_the_papers():
  model, student, teacher = mini()
  got, metrics = step_gradient(1)
  key = jax.random.fold_in(jax.random.key(0), 0)
  batch = toy_models.batch()
  tokens, weights, _ = draw(
    model, student, teacher, batch, jax.random.split(key, 3)[1]
  )
  batch |= model.student.output_features(batch, tokens, weights)
  lengths = np.asarray(weights).sum(1).astype(int)
  assert lengths.min() < 4 < lengths.max()
  logits = jax.jit(model.student.logits)
  z, pull = jax.vjp(lambda p: logits(p, batch), student)
  distributions = []
  for x in (jax.jit(model.teacher.logits)(teacher, batch), z):
    x = np.array(x, np.float64)
    x[..., 0] = -np.inf
    distributions.append(distribution(x))
  slope = (
    by_hand(*distributions, np.asarray(tokens), lengths, 0.2, normalize=True)
    / 8
  )
  assert_same(got, pull(jnp.asarray(slope, jnp.float32))[0])
  y = np.asarray(tokens)
  gap = sum(
    np.log(distributions[1][b, t, y[b, t]] / distributions[0][b, t, y[b, t]])
    for b in range(8)
    for t in range(lengths[b])
  )
  np.testing.assert_allclose(
    np.divide(*metrics["sequence_reverse_kl"]), gap / 8, rtol=1e-4
  )


# tests/decoding/test_loops.py has slots, test_trainer.py schedules.
@pytest.mark.nightly
def test_slots_and_schedules_change_no_output():
  """At step 2 of 8 the lines have the numbers' values."""
  numbers = {"teacher_temperature": 0.75, "sampling_temperature": 1.25}
  lines = {
    k: schedules.linear(x - 0.25, x + 0.75, 8) for k, x in numbers.items()
  }
  drawn = []
  for settings in (numbers, {**lines, "decode_slots": 3}):
    model, student, teacher = mini(**settings)
    run = jax.jit(
      lambda s, t, b, m=model: m.draw(
        s,
        m.student.encode(s, b),
        b,
        jax.random.key(3),
        step=jnp.int32(2),
        teacher_params=t,
      )
    )
    drawn.append(run(student, teacher, toy_models.batch()))
  (tokens, weights, log_probs), got = drawn
  np.testing.assert_array_equal(got[0], tokens)
  np.testing.assert_array_equal(got[1], weights)
  np.testing.assert_allclose(got[2], log_probs, atol=1e-5)


# Its gradient is the paper's, above; test_trainer splits batches.
@pytest.mark.nightly
def test_microbatches_change_nothing():
  got, metrics = step_gradient(4)
  expected, expected_metrics = step_gradient(1)
  assert_same(got, expected)
  for name, pair in expected_metrics.items():
    np.testing.assert_allclose(
      metrics[name], pair, rtol=1e-4, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"teacher_mix": 1.0}, "set TEACHER_MIX"),
    ({"importance": "none"}, "set IMPORTANCE"),
    ({"sampling_temperature": 0.0}, "set SAMPLING_TEMPERATURE"),
    ({"teacher_temperature": 0.0}, "set TEACHER_TEMPERATURE"),
  ],
)
def test_wrong_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    mini(**settings)
  assert issubclass(models.MiniLLMModel, models.GKDModel)
