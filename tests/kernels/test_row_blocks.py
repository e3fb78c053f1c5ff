"""Rows a few at a time: the plain form's values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_loops import loops

from gkd_jax import kernels
from gkd_jax.kernels import row_blocks


def softmax_sum(logits, scale):
  """A row's `[...]` sum and `[..., V]` array."""
  probs = jax.nn.softmax(logits)
  return scale * jnp.sum(probs * logits, axis=-1), probs


@pytest.mark.parametrize(("rows", "count"), [(3, 0), (8, 1), (10, 1)])
def test_rows_by_blocks(rows, count, monkeypatch):
  monkeypatch.setattr(row_blocks, "_BLOCK", 4 * 6 + 5)  # four rows of six
  rng = np.random.default_rng(0)
  logits, scale = rng.normal(size=(rows, 6)), rng.normal(size=rows)
  inputs = jnp.asarray(logits, jnp.float32), jnp.asarray(scale, jnp.float32)
  of = lambda *x: kernels.map_rows(softmax_sum, *x)
  assert loops(of, *inputs) == count
  got, pull = jax.vjp(jax.jit(of), *inputs)
  exact = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  mean = np.sum(exact * logits, axis=-1)
  np.testing.assert_allclose(got[0], scale * mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got[1], exact, rtol=1e-5)
  slopes = pull((jnp.ones(rows), jnp.zeros((rows, 6))))
  by_logit = exact * (1 + logits - mean[:, None]) * scale[:, None]
  np.testing.assert_allclose(slopes[0], by_logit, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(slopes[1], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("size", "count"),
  [(3 * 1024, 0), (5 * 1024, 1), (4099, 0)],  # one part, two, and a prime
)
def test_a_product_is_added(size, count):
  rng = np.random.default_rng(0)
  total, x, y = (
    rng.normal(size=shape) for shape in ((3, size), (5, 3), (5, size))
  )
  inputs = [jnp.asarray(a, jnp.float32) for a in (total, x, y)]
  assert loops(kernels.add_product, *inputs) == count
  got, pull = jax.vjp(jax.jit(kernels.add_product), *inputs)
  np.testing.assert_allclose(got, total + x.T @ y, rtol=1e-4, atol=1e-5)
  d = rng.normal(size=total.shape)
  slopes = pull(jnp.asarray(d, jnp.float32))
  for slope, want in zip(slopes, (d, y @ d.T, x @ d), strict=True):
    np.testing.assert_allclose(slope, want, rtol=1e-4, atol=1e-5)


def test_a_mesh_keeps_the_plain_forms():
  mesh = jax.make_mesh(
    (2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2
  )
  with jax.set_mesh(mesh):
    matrix = jnp.ones((128, 2**17))
    of = lambda x: kernels.map_rows(jax.nn.softmax, x)
    assert loops(of, matrix) == 0
    assert (
      loops(kernels.add_product, matrix, jnp.ones((1, 128)), matrix[:1]) == 0
    )
