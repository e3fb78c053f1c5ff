"""The network against T5X's numbers, and its own invariants."""

import dataclasses

import golden_t5x
import jax
import jax.numpy as jnp
import jaxprs
import nightly
import numpy as np
import pytest
from flax import traverse_util

from gkd_jax import models, network
from gkd_jax.decoding import sampling
from gkd_jax.network import layers

each = pytest.mark.parametrize("name", golden_t5x.NAMES)


@each
def test_names_shapes_and_axes_are_t5x(name):
  _, info = golden_t5x.load(name)
  model, _, batch = golden_t5x.model(name)
  variables = jax.eval_shape(
    lambda: model.get_initial_variables(
      jax.random.key(0), {k: v.shape for k, v in batch.items()}
    )
  )
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  assert {k: list(v.shape) for k, v in flat.items()} == info["params"]
  axes = traverse_util.flatten_dict(variables["params_axes"], sep="/")
  assert {k: str(v) for k, v in axes.items()} == info["params_axes"]


@each
def test_logits_equal_t5x(name):
  numbers, _ = golden_t5x.load(name)
  model, params, batch = golden_t5x.model(name)
  logits = jax.jit(model.logits)(params, batch)
  np.testing.assert_allclose(logits, numbers["logits"], rtol=1e-5, atol=1e-5)


@each
def test_packed_logits_equal_t5x(name):
  numbers, _ = golden_t5x.load(name)
  model, params, _ = golden_t5x.model(name)
  batch = golden_t5x.part(numbers, "packed")
  kept = batch["decoder_loss_weights"] > 0
  logits = np.asarray(jax.jit(model.logits)(params, batch))
  expected = numbers["packed_logits"][kept]
  np.testing.assert_allclose(logits[kept], expected, rtol=1e-5, atol=1e-5)


@each
def test_loss_and_gradients_equal_t5x(name):
  numbers, _ = golden_t5x.load(name)
  model, params, batch = golden_t5x.model(name, z_loss=1e-4)
  grad_fn = jax.value_and_grad(lambda p: model.loss_fn(p, batch, None)[0])
  loss, grads = jax.jit(grad_fn)(params)
  np.testing.assert_allclose(loss, numbers["loss"], rtol=1e-5)
  expected = golden_t5x.part(numbers, "grads")
  for path, grad in traverse_util.flatten_dict(grads, sep="/").items():
    scale = np.linalg.norm(expected[path])
    assert np.linalg.norm(grad - expected[path]) <= 1e-5 * scale, path


@each
def test_scores_equal_t5x(name):
  numbers, _ = golden_t5x.load(name)
  model, params, batch = golden_t5x.model(name)
  scores = jax.jit(model.score_batch)(params, batch)
  np.testing.assert_allclose(scores, numbers["scores"], rtol=1e-5)


@each
def test_greedy_tokens_equal_t5x(name):
  numbers, _ = golden_t5x.load(name)
  model, params, batch = golden_t5x.model(name)
  tokens = jax.jit(model.predict_batch)(params, batch)
  np.testing.assert_array_equal(tokens, numbers["greedy"])


@each
def test_cached_decoding_equals_the_full_forward_pass(name):
  model, params, batch = golden_t5x.model(name)
  sample = lambda params, batch: model.sample(
    params,
    model.encode(params, batch),
    batch,
    jax.random.key(3),
    suppress_ids=(0,),
  )
  tokens, log_probs = jax.jit(sample)(params, batch)
  forced = dict(batch)
  forced["decoder_target_tokens"] = tokens
  forced["decoder_input_tokens"] = sampling.shift_right(tokens)
  logits = jax.jit(model.logits)(params, forced).at[:, :, 0].set(-jnp.inf)
  full = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens)[..., None], -1
  )[..., 0]
  kept = np.asarray(tokens) > 0
  assert kept.sum() > 20
  np.testing.assert_allclose(np.asarray(log_probs)[kept], full[kept], atol=1e-5)


def test_no_position_sees_a_later_one():
  model, params, batch = golden_t5x.model("t5_1_1_tiny")
  encoded = jax.jit(model.encode)(params, batch)
  row = {k: jnp.asarray(v[:1]) for k, v in batch.items()}

  def logit(embedding):
    variables = {
      "params": params | {"token_embedder": {"embedding": embedding}}
    }
    return model.module.apply(
      variables,
      encoded[:1],
      row["encoder_input_tokens"],
      row["decoder_input_tokens"],
      row["decoder_target_tokens"],
      enable_dropout=False,
      method="decode",
    )[0, 4].sum()

  grad = jax.jit(jax.grad(logit))(params["token_embedder"]["embedding"])
  inputs = batch["decoder_input_tokens"][0]
  later = set(inputs[5:]) - set(inputs[:5])
  earlier = set(inputs[:5])
  assert later
  assert all(np.abs(grad[t]).max() == 0 for t in later)
  assert all(np.abs(grad[t]).max() > 0 for t in earlier)


def weight_products(jaxpr):
  """Number of products with weights, which have no batch dimension."""
  products = jaxprs.equations(jaxpr, "dot_general")
  return sum(not x.params["dimension_numbers"][1][0] for x in products)


@pytest.mark.parametrize("policy", nightly.of(["minimal", "full"], ["minimal"]))
def test_remat_changes_nothing_but_the_work(policy):
  model, params, batch = golden_t5x.model("t5_1_1_tiny")
  config = dataclasses.replace(model.config, remat_policy=policy)
  other = models.EncoderDecoderModel(network.Transformer(config))
  grad = lambda m: jax.grad(lambda p: m.loss_fn(p, batch, None)[0])
  for a, b in zip(
    jax.tree.leaves(jax.jit(grad(model))(params)),
    jax.tree.leaves(jax.jit(grad(other))(params)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  of = lambda m: weight_products(jax.make_jaxpr(grad(m))(params).jaxpr)
  # Queries, keys, values, what leaves attention, and two into the MLP; what leaves
  # the MLP is in no derivative.
  again = config.num_encoder_layers * 6 + config.num_decoder_layers * 10
  assert of(other) - of(model) == {"minimal": 0, "full": again}[policy]


def test_bfloat16_is_near_float32_and_gives_float32_logits():
  model, params, batch = golden_t5x.model("t5_1_1_tiny")
  config = dataclasses.replace(model.config, dtype="bfloat16")
  other = models.EncoderDecoderModel(network.Transformer(config))
  logits = jax.jit(other.logits)(params, batch)
  assert logits.dtype == jnp.float32
  expected = jax.jit(model.logits)(params, batch)
  np.testing.assert_allclose(logits, expected, atol=0.15)


@pytest.mark.parametrize(
  ("distance", "bidirectional", "bucket"),
  [
    (0, True, 0),
    (-7, True, 7),
    (-8, True, 8),
    (7, True, 23),
    (500, True, 31),
    (-15, False, 15),
    (-16, False, 16),
    (-500, False, 31),
    (3, False, 0),
  ],
)
def test_buckets_by_hand(distance, bidirectional, bucket):
  got = layers.relative_position_bucket(
    jnp.asarray(distance), bidirectional=bidirectional
  )
  assert int(got) == bucket


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_whole_numbers_and_take_no_logarithm(bidirectional):
  """Half of the buckets are exact, the others begin at 8 · 16^(k/8) or 16 · 8^(k/16)."""
  exact, factor = (8, 16) if bidirectional else (16, 8)

  def by_hand(distance):
    if distance < exact:
      return distance
    # distance >= exact * factor^(k / exact), both sides to the power `exact`.
    return exact + max(
      k for k in range(exact) if distance**exact >= factor**k * exact**exact
    )

  distances = [*range(300), 10**6]
  bucket = lambda x: layers.relative_position_bucket(
    x, bidirectional=bidirectional
  )
  expected = np.array([by_hand(n) for n in distances])
  np.testing.assert_array_equal(bucket(-jnp.array(distances)), expected)
  ahead = expected + 16 if bidirectional else 0 * expected
  np.testing.assert_array_equal(bucket(jnp.array(distances))[1:], ahead[1:])
  # A device's own logarithm may be off by a bit.
  assert " log " not in str(jax.make_jaxpr(bucket)(jnp.arange(9)))


def test_float32_attention_logits_are_computed_in_float32():
  """In bfloat16, logits of about 100 are off by up to a half without it."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 9, 16)), jnp.bfloat16)
  outputs = {}
  for flag in (False, True):
    config = dataclasses.replace(
      network.T5Config(vocab_size=8, dtype="bfloat16"),
      emb_dim=16,
      num_heads=2,
      head_dim=8,
      dropout_rate=0.0,
      float32_attention_logits=flag,
    )
    module = layers.Attention(config)
    bias = jnp.zeros((1, 1, 1, 1))
    params = module.init(jax.random.key(0), x, None, bias, deterministic=True)
    params = jax.tree.map(lambda p: 6 * p, params["params"])
    with jax.disable_jit():
      out = module.apply({"params": params}, x, None, bias, deterministic=True)
    outputs[flag] = np.asarray(out, np.float64)
  # By hand in float64, from the projections as bfloat16 has them.
  project = lambda name: np.asarray(
    (x @ params[name]["kernel"].astype(jnp.bfloat16)).reshape(2, 9, 2, 8),
    np.float64,
  )
  query, key, value = map(project, ("query", "key", "value"))
  logits = np.einsum("bqhk,bshk->bhqs", query, key)
  assert np.abs(logits).max() > 30
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  weights /= weights.sum(axis=-1, keepdims=True)
  mixed = np.einsum("bhqs,bshk->bqhk", weights, value).reshape(2, 9, 16)
  exact = mixed @ np.asarray(params["out"]["kernel"], np.float64)
  error = {
    flag: np.abs(out - exact).max() / np.abs(exact).max()
    for flag, out in outputs.items()
  }
  assert error[True] < 0.012 < error[False], error


def test_a_wrong_size_names_the_setting():
  with pytest.raises(ValueError, match=r"at least 1, got 0; set .*\.emb_dim"):
    network.T5Config(vocab_size=8, emb_dim=0)
