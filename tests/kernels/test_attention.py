"""Both forms of attention give the numbers of float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_loops import loops

from gkd_jax import kernels
from gkd_jax.network import layers


def _softmax_attention(query, key, value, bias):
  """In float64; `[B, H, T, S]` weights and their product with the values."""
  logits = np.einsum("bhtk,bhsk->bhts", query, key) + bias
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  weights /= weights.sum(axis=-1, keepdims=True)
  return weights, np.einsum("bhts,bhsk->bhtk", weights, value)


def _gradients(query, key, value, bias, pull):
  """Of Σ pull · attention, by hand."""
  weights, _ = _softmax_attention(query, key, value, bias)
  by_weight = np.einsum("bhtk,bhsk->bhts", pull, value)
  mean = np.sum(by_weight * weights, axis=-1, keepdims=True)
  by_logit = weights * (by_weight - mean)
  return (
    np.einsum("bhts,bhsk->bhtk", by_logit, key),
    np.einsum("bhts,bhtk->bhsk", by_logit, query),
    np.einsum("bhts,bhtk->bhsk", weights, pull),
    np.sum(by_logit, axis=0, keepdims=True),
  )


def _attention_inputs(rows, heads, length, size):
  rng = np.random.default_rng(0)
  query, key, value = rng.standard_normal((3, rows, heads, length, size))
  bias = rng.standard_normal((1, heads, length, length))
  bias[..., -1] -= 1e10  # the last key is masked
  return query, key, value, bias


def attend(*inputs):
  return kernels.attend(layers.dot_product_attention, *inputs)


@pytest.mark.parametrize("length, count", [(8, 0), (512, 1)])
def test_attention_and_its_gradient(length, count):
  exact = _attention_inputs(2, 2, length, 4)
  pull = np.random.default_rng(1).standard_normal(exact[0].shape)
  inputs = [jnp.asarray(x, jnp.float32) for x in exact]
  assert loops(attend, *inputs) == count

  out, of_pull = jax.vjp(attend, *inputs)
  np.testing.assert_allclose(out, _softmax_attention(*exact)[1], atol=2e-6)
  for got, want in zip(
    of_pull(jnp.asarray(pull, jnp.float32)),
    _gradients(*exact, pull),
    strict=True,
  ):
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("length", [4, 512])
def test_a_query_without_keys_attends_evenly(length):
  rng = np.random.default_rng(0)
  query, key, value = rng.standard_normal((3, 1, 2, length, 2), np.float32)
  bias = jnp.full((1, 1, 1, 1), -1e10)
  out = jax.jit(attend)(query, key, value, bias)
  mean = np.mean(value, axis=2, keepdims=True)
  np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=1e-6)


@pytest.mark.parametrize("length", [300, 600])
def test_attention_in_bfloat16(length):
  ones = jnp.ones((1, 2, length, 1), jnp.bfloat16)
  out = attend(ones, ones, ones, jnp.zeros((1, 1, 1, 1)))
  assert out.dtype == jnp.bfloat16
  # Each weight, alike, is off by at most 2^-9 of itself.
  np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, rtol=2**-8)


def test_dropout_takes_weights_and_not_their_sum():
  # What is dropped is not made up for: the two keys keep a third each.
  inputs = jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 3, 1))
  value = jnp.array([1.0, 10.0, 100.0]).reshape(1, 1, 3, 1)
  keep = jnp.array([1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
  out = layers.dot_product_attention(
    *inputs, value, jnp.zeros(()), lambda w: w * keep
  )
  np.testing.assert_allclose(out[0, 0, 0, 0], 101 / 3, rtol=1e-6)


def test_a_mesh_keeps_the_plain_form():
  mesh = jax.make_mesh(
    (2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2
  )
  with jax.set_mesh(mesh):
    heads = jnp.ones((2, 2, 512, 4))
    assert loops(attend, heads, heads, heads, jnp.zeros(())) == 0
