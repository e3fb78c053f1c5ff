"""argmax, in both forms."""

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import kernels
from gkd_jax.kernels import reductions


def test_argmax_is_the_first_of_equal_ones():
  x = np.random.default_rng(0).integers(0, 4, (50, 3, 7)).astype(np.float32)
  x[0] = -np.inf
  for of in (kernels.argmax, jax.jit(reductions._two_sweeps)):
    got = of(jnp.asarray(x))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, x.argmax(-1))


def test_argmax_has_no_gradient():
  of = lambda x: jnp.sum(x * kernels.argmax(x)[:, None])
  x = jnp.array([[1.0, 3.0], [2.0, 0.0]])
  np.testing.assert_array_equal(jax.grad(of)(x), [[1, 1], [0, 0]])


def test_argmax_of_a_split_vocabulary_is_not_gathered():
  mesh = jax.make_mesh((8,), ("model",), (jax.sharding.AxisType.Auto,))
  split = jax.NamedSharding(mesh, jax.P(None, "model"))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4096)), jnp.float32)
  with jax.set_mesh(mesh):
    of = jax.jit(kernels.argmax, in_shardings=split)
    program = of.lower(x).compile()
    np.testing.assert_array_equal(of(jax.device_put(x, split)), x.argmax(-1))
  assert "[4,4096]" not in program.as_text()
