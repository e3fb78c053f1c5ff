"""Weight matrices, and what is multiplied with them: projections, embeddings.

`weights` says in which type a network keeps its matrices:

  float32   as they are trained
  auto      each in the type that it is used in: the same numbers, for half of
            the memory where activations are bfloat16
  bfloat16  all, the output head included
  int8      all, with a float32 scale for each column of a kernel (`kernel_scale`)
            and each row of an embedding (`embedding_scale`)

Norms and relative positions are float32 always. Parameters of a network that is
trained are float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning as flax_partitioning

from gkd_jax import kernels, losses, partitioning

param_with_axes = flax_partitioning.param_with_axes
WEIGHTS = ("float32", "auto", "bfloat16", "int8")
# A matrix's name to the axis that has scales; they are named behind it.
SCALED_AXIS = {"kernel": 1, "embedding": 0}
SCALE = "_scale"
Head = jax.Array | losses.Int8Head
TRUNCATED_NORMAL = nn.initializers.variance_scaling(
  1.0, "fan_in", "truncated_normal"
)


def stored_dtype(weights: str, used_in: Any) -> jnp.dtype:
  """The type in which a matrix is kept.

  >>> [str(stored_dtype(w, "bfloat16")) for w in WEIGHTS]
  ['float32', 'bfloat16', 'bfloat16', 'int8']

  Args:
    weights: of `WEIGHTS`.
    used_in: type of the matrix in its product.

  Raises:
    ValueError: another name.
  """
  if weights not in WEIGHTS:
    raise ValueError(
      f"expected weights of {', '.join(map(repr, WEIGHTS))}, got {weights!r};"
      " set TEACHER_WEIGHTS"
    )
  return jnp.dtype(used_in if weights == "auto" else weights)


def _matrix(name, init, shape, axes, dtype):
  """A module's matrix as it is kept, and its scales, or None."""
  if dtype == jnp.float32:
    return param_with_axes(name, init, shape, dtype, axes=axes), None
  if dtype != jnp.int8:
    rounded = lambda key: init(key, shape, jnp.float32).astype(dtype)
    return param_with_axes(name, rounded, axes=axes), None
  axis = SCALED_AXIS[name]

  def draw(key):
    matrix = init(key, shape, jnp.float32)
    columns = losses.quantize_head(matrix if axis else matrix.T)
    return columns if axis else columns._replace(values=columns.values.T)

  # Each with a key of its own, as Linen has it: of one distribution, not of one draw.
  values = param_with_axes(name, lambda key: draw(key).values, axes=axes)
  scales = param_with_axes(
    name + SCALE, lambda key: draw(key).scales, axes=(axes[axis],)
  )
  return values, partitioning.constrain(scales, axes[axis])


def _in_use(matrix, axes, dtype):
  """A matrix as it lies and in the type that it has in its product."""
  if matrix.dtype.itemsize < jnp.dtype(dtype).itemsize:
    # Gathered in the narrower type.
    return partitioning.constrain(matrix, *axes).astype(dtype)
  return partitioning.constrain(matrix.astype(dtype), *axes)


class Dense(nn.Module):
  """Projection of the last axis, without bias.

  Attributes:
    features: size of the result's last axis.
    kernel_axes: logical names of the kernel's two axes.
    dtype: of the computation.
    kernel_init: distribution of the initial kernel.
    weights: type of the kernel, see the module.
  """

  features: int
  kernel_axes: tuple[str, str]
  dtype: Any = jnp.float32
  kernel_init: Callable[..., jax.Array] = TRUNCATED_NORMAL
  weights: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., in]` -> `[..., features]`."""
    kernel, scales = _matrix(
      "kernel",
      self.kernel_init,
      (x.shape[-1], self.features),
      self.kernel_axes,
      stored_dtype(self.weights, self.dtype),
    )
    # One matrix product: XLA's CPU backend takes twice as long for the kernel's
    # gradient when it contracts over batch and length as two axes.
    rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
    kernel = _in_use(kernel, self.kernel_axes, self.dtype)
    if scales is None:
      y = kernels.project(rows, kernel)
    else:
      y = jnp.dot(rows, kernel, preferred_element_type=jnp.float32)
      y = (y * scales[None]).astype(self.dtype)
    return y.reshape(*x.shape[:-1], self.features)


class Embed(nn.Module):
  """Token embedding, by gather.

  T5X multiplies by a one-hot matrix; a gather gives the same numbers without
  the `[B*S, V]` product.

  Attributes:
    num_embeddings: V.
    features: D.
    dtype: of what is looked up.
    weights: type of the table, see the module; "auto" is that of a table which
      is no output head.
  """

  num_embeddings: int
  features: int
  dtype: Any = jnp.float32
  weights: str = "float32"

  def setup(self):
    self.embedding, self.scales = _matrix(
      "embedding",
      nn.initializers.normal(stddev=1.0),
      (self.num_embeddings, self.features),
      ("vocab", "embed"),
      stored_dtype(self.weights, self.dtype),
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """int32 `[B, S]` -> `[B, S, D]` in `dtype`."""
    # The table stays where it lies. Split over the data axis, each device looks
    # up its features of all rows' tokens, and rows are exchanged: bytes of
    # activations, not of the table, and as few for its gradient.
    x = partitioning.embed_lookup(self.embedding, tokens)
    if self.scales is not None:
      scales = jnp.take(self.scales, tokens, axis=0)[:, :, None]
      x = x.astype(jnp.float32) * scales
    return partitioning.constrain(
      x.astype(self.dtype), "batch", "length", "embed"
    )

  def attend(self, x: jax.Array) -> jax.Array:
    """`[B, T, D]` -> logits `[B, T, V]` by the transposed table, float32."""
    table = _in_use(self.embedding, ("vocab", "embed"), jnp.float32)
    logits = jnp.dot(x.astype(jnp.float32), table.T)
    return logits if self.scales is None else logits * self.scales[None, None]


def embed(config: Any, weights: str, **kwargs) -> Embed:
  """The embedding of the configuration's sizes."""
  if weights == "auto" and config.logits_via_embedding:
    weights = "float32"  # in which `attend` uses it
  return Embed(
    config.vocab_size, config.emb_dim, config.dtype, weights, **kwargs
  )


def to_logits(config: Any, weights: str, **kwargs) -> Dense:
  """The output head of the configuration's sizes, in float32."""
  axes = ("embed", "vocab")
  return Dense(config.vocab_size, axes, weights=weights, **kwargs)


def head(params: Mapping[str, Any], *, tied: bool) -> Head:
  """The output head `[D, V]` as it is kept.

  Args:
    params: of the projection to logits, or of the embedding.
    tied: whether they are the embedding's.
  """
  name = "embedding" if tied else "kernel"
  values = params[name].T if tied else params[name]
  if name + SCALE in params:
    return losses.Int8Head(values, params[name + SCALE])
  return values
