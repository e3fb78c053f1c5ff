"""The fused loss: equal to the dense one, in less memory, wherever it runs."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import nightly
import numpy as np
import optax
import pytest
import toy_decoder_only
import toy_models
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from loss_batches import log_softmax64

from gkd_jax import divergences, losses, models, training
from gkd_jax.kernels import row_blocks
from gkd_jax.losses import fused
from gkd_jax.network import projections

BETAS = {"jsd": 0.3, "generalized_jsd": 0.3, "normalized_jsd": 0.3}


def inputs(seed=0, rows=4, length=5, vocab_size=16):
  """Hidden states and heads of a student and a wider teacher, and weights."""
  rng = np.random.default_rng(seed)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  lengths = np.array([length, 2, 0, 3])[np.arange(rows) % 4]
  weights = np.arange(length)[None] < lengths[:, None]
  return (
    make(rows, length, 6),
    make(6, vocab_size),
    make(rows, length, 8),
    make(8, vocab_size),
    jnp.asarray(weights, jnp.float32),
  )


def results(loss):
  """Jitted: `(loss, (weight, metrics))` and gradients of the student's side."""

  def total(hidden, head, *others):
    value, weight, metrics = loss(hidden, head, *others)
    return value, (weight, metrics)

  return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def dense(
  hidden,
  head,
  teacher_hidden,
  teacher_head,
  weights,
  *,
  teacher_softcap=None,
  student_softcap=None,
  **settings,
):
  return losses.distillation_loss(
    losses.soft_cap(teacher_hidden @ teacher_head, teacher_softcap),
    losses.soft_cap(hidden @ head, student_softcap),
    weights,
    **settings,
  )


def assert_close(got, expected, tolerance=1e-5):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    scale = np.max(np.abs(y)) + 1e-30
    np.testing.assert_allclose(
      np.asarray(x) / scale, np.asarray(y) / scale, rtol=0, atol=tolerance
    )


NORMALIZATIONS = ["sequence", "token"]


@pytest.mark.parametrize(
  ("name", "normalization"),
  nightly.besides(
    list(zip(divergences.names(), itertools.cycle(NORMALIZATIONS))),
    divergences.names(),
    NORMALIZATIONS,
  ),
)
def test_equals_the_dense_loss(name, normalization, monkeypatch):
  arguments = inputs()
  more = {}
  if normalization == "token":  # two of a chunk's tokens at a time
    monkeypatch.setattr(row_blocks, "_BLOCK", 32)
    more = {
      "teacher_softcap": 3.0,
      "student_softcap": 2.0,
      "hard_labels": losses.HardLabels(
        jnp.arange(20).reshape(4, 5) % 14, jnp.array([[0.0], [0.3], [1], [1]])
      ),
    }

  def of(function, **options):
    def loss(beta, temperature, *arguments):
      hyper = {"beta": beta} if name in BETAS else {}
      return function(
        *arguments,
        divergence=divergences.get(name, **hyper),
        teacher_temperature=temperature,
        student_temperature=0.7,
        length_normalization=normalization,
        num_real_tokens=14,
        **more,
        **options,
      )

    # β and the temperature are traced, as a schedule's are.
    return jax.jit(lambda b, t, *a: results(functools.partial(loss, b, t))(*a))(
      BETAS.get(name, 0.0), 0.9, *arguments
    )

  # 10 of 20 tokens are real: three chunks of four, one of them not full.
  got = of(losses.fused_distillation_loss, chunk_size=4)
  assert_close(got, of(dense))


def test_a_divergence_that_is_no_sum_over_the_vocabulary():
  # Largest at the vocabulary's padding, which has no gradient all the same.
  largest = lambda p, q: jnp.max(p - 2 * q, axis=-1)
  settings = {"divergence": largest, "num_real_tokens": 14}
  got, expected = (
    results(functools.partial(loss, **settings))(*inputs())
    for loss in (
      functools.partial(losses.fused_distillation_loss, chunk_size=4),
      dense,
    )
  )
  assert_close(got, expected)


def test_memory_is_that_of_a_chunks_logits_and_the_gradients():
  vocab_size, width, chunk = 32768, 16, 128
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  program = results(
    functools.partial(
      losses.fused_distillation_loss,
      divergence=divergences.get("jsd", beta=0.5),
      chunk_size=chunk,
    )
  ).lower(
    shape(4, 256, width),
    shape(width, vocab_size),
    shape(4, 256, width),
    shape(width, vocab_size),
    shape(4, 256),
  )
  memory = program.compile().memory_analysis()
  # Both logits and the gradient of the student's; the head's gradient is formed
  # where it is returned. Some ten arrays of four rows are a 32nd each.
  logits = 4 * vocab_size * chunk
  assert memory.temp_size_in_bytes > 2 * logits
  assert memory.temp_size_in_bytes < 4 * logits


def test_agreement_is_of_the_first_of_equal_ones():
  # All pairs of distributions of four logits that are 0 or 1.
  logits = np.array(list(itertools.product([0.0, 1.0], repeat=4)), np.float32)
  p, q = np.repeat(logits, 16, axis=0), np.tile(logits, (16, 1))
  of = functools.partial(
    losses.token_losses,
    divergence=divergences.forward_kl,
    teacher_temperature=3.0,
    student_temperature=0.7,
    num_real_tokens=None,
  )
  _, metrics = jax.jit(of)(p, q)
  expected = p.argmax(-1) == q.argmax(-1)
  assert 0 < expected.sum() < 256
  np.testing.assert_array_equal(metrics["top1_agreement"], expected)


def test_forward_kl_equals_float64():
  hidden, head, *_ = inputs(1)
  loss = functools.partial(
    losses.fused_distillation_loss, divergence="forward_kl", chunk_size=3
  )
  (value, (number, metrics)), (d_hidden, d_head) = results(loss)(*inputs(1))
  h, w, th, tw, weights = (np.asarray(x, np.float64) for x in inputs(1))
  p, q = log_softmax64(th @ tw), log_softmax64(h @ w)
  shares = weights / np.maximum(weights.sum(1, keepdims=True), 1)
  kl = np.sum(np.exp(p) * (p - q), -1)
  d_logits = shares[:, :, None] * (np.exp(q) - np.exp(p))
  assert number == 3
  np.testing.assert_allclose(value, np.sum(shares * kl), rtol=1e-5)
  assert_close(d_hidden, d_logits @ w.T)
  assert_close(d_head, np.einsum("btd,btv->dv", h, d_logits))
  agree = np.sum(weights * (p.argmax(-1) == q.argmax(-1)))
  assert metrics["top1_agreement"] == (agree, 10)
  # Without a gradient, the same value; with one scaled, the same gradient.
  assert_close(jax.jit(loss)(*inputs(1))[0], value, 1e-6)
  scaled = lambda h, w: 3 * jax.checkpoint(loss)(h, w, *inputs(1)[2:])[0]
  assert_close(
    jax.jit(jax.grad(scaled, (0, 1)))(hidden, head),
    (3 * d_hidden, 3 * d_head),
  )


CAPS = {
  "both": (2.0, 1.5),
  "student": (None, 1.5),
  "teacher": (2.0, None),
}


@pytest.mark.parametrize("capped", nightly.of(CAPS, ["both"]))
def test_soft_caps_of_each_model_equal_float64(capped):
  teacher_cap, student_cap = CAPS[capped]
  loss = functools.partial(
    losses.fused_distillation_loss,
    divergence="reverse_kl",
    chunk_size=3,
    teacher_softcap=teacher_cap,
    student_softcap=student_cap,
    student_temperature=0.8,
  )
  (value, _), gradients = results(loss)(*inputs(6))
  h, w, th, tw, weights = (np.asarray(x, np.float64) for x in inputs(6))
  # c tanh(x / c), and its slope 1 - tanh(x / c)^2; without a cap x, and 1.
  z, slope, teacher = h @ w, 1.0, th @ tw
  if student_cap:
    slope = 1 / np.cosh(z / student_cap) ** 2
    z = student_cap * np.tanh(z / student_cap)
  if teacher_cap:
    teacher = teacher_cap * np.tanh(teacher / teacher_cap)
  p, q = log_softmax64(teacher), log_softmax64(z / 0.8)
  shares = weights / np.maximum(weights.sum(1, keepdims=True), 1)
  kl = np.sum(np.exp(q) * (q - p), -1)
  of_capped = np.exp(q) * (q - p - kl[:, :, None]) / 0.8
  d_logits = shares[:, :, None] * of_capped * slope
  np.testing.assert_allclose(value, np.sum(shares * kl), rtol=1e-5)
  expected = d_logits @ w.T, np.einsum("btd,btv->dv", h, d_logits)
  assert_close(gradients, expected)


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_padding_changes_nothing(junk):
  hidden, head, teacher_hidden, teacher_head, weights = inputs(2)
  padding = weights[:, :, None] == 0
  loss = results(
    functools.partial(
      losses.fused_distillation_loss,
      divergence="reverse_kl",
      chunk_size=4,
    )
  )
  clean = loss(hidden, head, teacher_hidden, teacher_head, weights)
  got = loss(
    jnp.where(padding, junk, hidden),
    head,
    jnp.where(padding, junk, teacher_hidden),
    teacher_head,
    weights,
  )
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(clean), strict=True):
    np.testing.assert_array_equal(x, y)
  np.testing.assert_array_equal(got[1][0] * padding, 0.0)


@pytest.mark.parametrize(("real", "chunks"), [(0, 0), (1, 1), (8, 2), (9, 3)])
def test_chunks_of_padding_are_not_computed(real, chunks):
  weights = jnp.zeros((20,)).at[jnp.arange(real) * 2].set(1.0).reshape(4, 5)
  layout = fused._layout((4, 5), 16, 4, "data", "model")
  assert layout.chunk == 4
  order, number = fused._real_first(layout, weights)
  assert number == chunks
  np.testing.assert_array_equal(
    weights.reshape(-1)[order[0]], np.arange(20) < real
  )


def test_no_real_token_gives_zero():
  *others, weights = inputs()
  loss = functools.partial(
    losses.fused_distillation_loss, divergence="forward_kl"
  )
  (value, (number, _)), gradients = results(loss)(*others, 0 * weights)
  assert (value, number) == (0.0, 0.0)
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0.0)


def test_teacher_heads_in_int8_and_bfloat16():
  hidden, head, teacher_hidden, teacher_head, weights = inputs(3)
  teacher_head = teacher_head.at[:, 3].set(0.0)
  small = projections.quantize(teacher_head)
  wide = np.asarray(small.values, np.float64) * np.asarray(small.scales)
  step = np.abs(np.asarray(teacher_head)).max(0) / 127
  assert np.all(np.abs(wide - teacher_head) <= step / 2 * 1.0001)
  assert small.values.dtype == jnp.int8 and np.abs(small.values).max() == 127
  loss = functools.partial(losses.fused_distillation_loss, chunk_size=7)
  half = divergences.get("jsd", beta=0.5)
  low = teacher_head.astype(jnp.bfloat16)
  for given, meant in ((small, wide), (low, low)):
    got = results(functools.partial(loss, divergence=half))(
      hidden, head, teacher_hidden, given, weights
    )
    expected = results(functools.partial(dense, divergence=half))(
      hidden, head, teacher_hidden, jnp.asarray(meant, jnp.float32), weights
    )
    assert_close(got, expected)


def test_gradients_have_the_types_of_their_inputs():
  hidden, head, *others = inputs(4)
  low = hidden.astype(jnp.bfloat16)
  loss = functools.partial(
    losses.fused_distillation_loss, divergence="forward_kl"
  )
  _, gradients = results(loss)(low, head, *others)
  _, expected = results(functools.partial(dense, divergence="forward_kl"))(
    low.astype(jnp.float32), head, *others
  )
  assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
  assert_close(gradients[0], expected[0], 4e-3)
  assert_close(gradients[1], expected[1])


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_on_a_mesh_the_vocabulary_stays_split(shape):
  vocab_size = 48
  arguments = inputs(5, rows=8, vocab_size=vocab_size)
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()).reshape(shape), ("data", "model")
  )
  rows, columns = P("data"), P(None, "model")
  placed = [
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip(
      arguments, (rows, columns, rows, columns, rows), strict=True
    )
  ]
  loss = results(
    functools.partial(
      losses.fused_distillation_loss,
      divergence="reverse_kl",
      chunk_size=2,
      student_softcap=3.0,
      hard_labels=losses.HardLabels(
        jnp.arange(40).reshape(8, 5), jnp.arange(8)[:, None] / 8
      ),
    )
  )
  with jax.set_mesh(mesh):
    program = loss.lower(*placed).compile()
    got = program(*placed)
  # 18 of 40 tokens are real, at most 10 on one shard.
  assert_close(got, loss(*arguments))
  text = program.as_text()
  assert "while(" in text
  for line in text.splitlines():
    moved = re.search(
      r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce)"
      r"(?:-start)?\(",
      line,
    )
    if not moved:
      continue
    shapes = re.findall(r"\w+\[([\d,]*)\]", moved[1])
    # Logits have a side of V; gathered ones the whole of it.
    widths = {int(n) for dims in shapes for n in dims.split(",") if n}
    if moved[2] == "all-reduce":
      # The head's gradient, D by V, is summed over shards, outside of the loop.
      assert not (widths & {48, 12}) or "while/body" not in line, line
    else:
      assert not widths & {48}, line


@functools.cache
def toy_gradient(chunk_size, source="student", microbatches=1, how="jit"):
  """Gradient of a step of the toy pair, and its metrics."""
  model, student, teacher = toy_models.gkd(
    divergence="jsd", beta=0.5, loss_chunk_size=chunk_size
  )
  options = {"axis_name": "data"} if how == "pmap" else {}
  step, optimizer = toy_models.sgd_step(
    model, source, num_microbatches=microbatches, **options
  )
  state, batch = toy_models.state(student, optimizer), toy_models.batch()
  if how == "pmap":
    run = training.pmap_step(step, jax.devices()[:4])
    new, metrics = run(state, teacher, batch, source=source)
  else:
    new, metrics = jax.jit(step)(state, teacher, batch)
  return jax.tree.map(jnp.subtract, state.params, new.params), metrics


@pytest.mark.parametrize(
  ("microbatches", "how"),
  nightly.besides([(1, "jit")], [1, 2], ["jit", "pmap"]),
)
def test_a_training_step_equals_the_dense_one(microbatches, how):
  expected, expected_metrics = toy_gradient(0)
  got, metrics = toy_gradient(5, "student", microbatches, how)
  difference = optax.tree.norm(jax.tree.map(jnp.subtract, got, expected))
  assert difference <= 1e-5 * optax.tree.norm(expected)
  for name in metrics:
    np.testing.assert_allclose(
      metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
    )


def test_the_step_uses_the_fused_loss_where_logits_are_large():
  for rows, is_fused in ((2, False), (2**17, True)):
    model, student, teacher = toy_models.gkd()
    batch = {
      name: jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype)
      for name, x in toy_models.batch().items()
    }
    text = str(
      jax.make_jaxpr(
        lambda p, t, b, model=model: model.train_loss(
          p, t, b, toy_models.inputs("data", rows=1)
        )
      )(student, teacher, batch)
    )
    assert ("custom_vjp_call" in text and "while" in text) == is_fused


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("toy", [toy_models, toy_decoder_only])
def test_hidden_states_times_the_head_are_the_logits(toy, tied):
  import dataclasses

  model = toy.model(8) if toy is toy_models else toy.model()
  config = dataclasses.replace(model.config, logits_via_embedding=tied)
  model = type(model)(type(model.module)(config))
  batch = toy.batch()
  shapes = {name: x.shape for name, x in batch.items()}
  params = toy_models.initial_params(model, 0, shapes)

  @jax.jit
  def both(params):
    encoded = model.encode(params, batch)
    return (
      model.decoder_logits(params, encoded, batch),
      model.decoder_hidden(params, encoded, batch),
    )

  logits, hidden = both(params)
  assert hidden.shape[-1] == config.emb_dim
  head = model.output_head(params)
  np.testing.assert_allclose(hidden @ head, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"chunk_size": 0}, "set LOSS_CHUNK_SIZE"),
    ({"teacher_head": jnp.zeros((8, 15))}, "set the same vocab_size"),
    ({"student_hidden": jnp.zeros((4, 5, 7))}, "set student_hidden"),
    ({"teacher_hidden": jnp.zeros((4, 4, 8))}, "set teacher_hidden"),
    ({"student_temperature": 0.0}, "set STUDENT_TEMPERATURE"),
    ({"divergence": "kl"}, "set DIVERGENCE"),
    ({"num_real_tokens": 17}, "set NUM_REAL_TOKENS"),
  ],
)
def test_wrong_settings(change, message):
  names = "student_hidden", "student_head", "teacher_hidden", "teacher_head"
  arguments = dict(zip((*names, "weights"), inputs(), strict=True))
  arguments |= {"divergence": "forward_kl"} | change
  with pytest.raises(ValueError, match=message):
    losses.fused_distillation_loss(**arguments)


def test_a_negative_chunk_size_of_the_model():
  with pytest.raises(ValueError, match="set LOSS_CHUNK_SIZE"):
    models.GKDModel(
      toy_models.model(8), toy_models.model(12), loss_chunk_size=-1
    )
