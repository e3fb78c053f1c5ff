"""Products of few rows give the numbers of float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_loops import loops

from gkd_jax import kernels


@pytest.mark.parametrize(
  "rows, shape, count",
  [
    (2, (1024, 1024), 1),
    (8, (512, 2048), 1),
    (16, (1024, 1024), 1),
    (1, (1024, 1024), 0),  # a matrix times a vector is fast as it is
    (17, (1024, 1024), 0),
    (8, (512, 1024), 1),
    (8, (256, 1024), 0),  # small
    (8, (2048, 768), 0),  # narrow
    (8, (1030, 1024), 0),  # rows of the kernel that 8 does not divide
    (8, (1024, 1030), 0),  # columns that 32 does not divide
  ],
)
def test_few_rows_times_a_large_matrix(rows, shape, count):
  rng = np.random.default_rng(0)
  x, kernel = rng.standard_normal((rows, shape[0])), rng.standard_normal(shape)
  inputs = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
  assert loops(kernels.project, *inputs) == count
  y, pull = jax.vjp(jax.jit(kernels.project), *inputs)
  np.testing.assert_allclose(y, x @ kernel, atol=2e-4)
  slopes = pull(jnp.ones_like(y))
  ones = np.ones(y.shape)
  np.testing.assert_allclose(slopes[0], ones @ kernel.T, atol=1e-3)
  np.testing.assert_allclose(slopes[1], x.T @ ones, atol=1e-4)


def test_few_rows_keep_their_types():
  x, kernel = jnp.ones((2, 1024), jnp.bfloat16), jnp.ones((1024, 1024))
  assert kernels.project(x, kernel).dtype == jnp.float32
  y = kernels.project(x, kernel.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(y, np.float32), 1024.0)


def test_a_product_with_a_transposed_matrix():
  rng = np.random.default_rng(0)
  x, matrix = rng.normal(size=(5, 7)), rng.normal(size=(3, 7))
  inputs = jnp.asarray(x, jnp.float32), jnp.asarray(matrix, jnp.float32)
  y, pull = jax.vjp(jax.jit(kernels.times_transposed), *inputs)
  np.testing.assert_allclose(y, x @ matrix.T, rtol=1e-5, atol=1e-5)
  d = rng.normal(size=y.shape)
  slopes = pull(jnp.asarray(d, jnp.float32))
  np.testing.assert_allclose(slopes[0], d @ matrix, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(slopes[1], d.T @ x, rtol=1e-5, atol=1e-5)


def test_a_mesh_keeps_the_plain_form():
  mesh = jax.make_mesh(
    (2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2
  )
  with jax.set_mesh(mesh):
    matrix = jnp.ones((1024, 1024))
    assert loops(kernels.project, jnp.ones((8, 1024)), matrix) == 0
