"""Rows a few at a time: the plain form's values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_loops import loops

from gkd_jax import kernels
from gkd_jax.kernels import row_blocks


def products(p, q):
  """Σ p softmax(q) of each row `[...]`, and the softmax `[..., V]`."""
  probs = jax.nn.softmax(q)
  return jnp.sum(p * probs, axis=-1), probs


@pytest.mark.parametrize(("rows", "count"), [(3, 0), (8, 1), (10, 1)])
def test_rows_by_blocks(rows, count, monkeypatch):
  monkeypatch.setattr(row_blocks, "_BLOCK", 4 * 6 + 5)  # four rows of six
  rng = np.random.default_rng(0)
  p, q, shares = (rng.normal(size=n) for n in ((rows, 6), (rows, 6), rows))
  inputs = [jnp.asarray(x, jnp.float32) for x in (p, q, shares)]
  of = functools.partial(kernels.rows_gradient, products)
  assert loops(of, *inputs) == count
  losses, probs, gradient = jax.jit(of)(*inputs)
  exact = np.exp(q) / np.exp(q).sum(-1, keepdims=True)
  mean = np.sum(p * exact, axis=-1)
  np.testing.assert_allclose(losses, mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(probs, exact, rtol=1e-5)
  by_logit = shares[:, None] * exact * (p - mean[:, None])
  np.testing.assert_allclose(gradient, by_logit, rtol=1e-4, atol=1e-6)


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
    of = functools.partial(kernels.rows_gradient, products)
    assert loops(of, matrix, matrix, jnp.ones(128)) == 0
    assert (
      loops(kernels.add_product, matrix, jnp.ones((1, 128)), matrix[:1]) == 0
    )
