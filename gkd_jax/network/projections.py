"""Projections and embeddings, whose weight matrices have one of several types.

`weights` is the type that a network stores its matrices in:

  float32   as trained
  auto      each in the type of its product: the same numbers, in half of the
            memory where activations are bfloat16
  bfloat16  all, the output head included
  int8      all, with a float32 scale for each column of a kernel (`kernel_scale`)
            and each row of an embedding (`embedding_scale`)

Norms and relative positions are always float32, and so are all parameters of a
network that is trained.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning as flax_partitioning

from gkd_jax import checks, kernels, partitioning, types

param_with_axes = flax_partitioning.param_with_axes
_SETTINGS = "TEACHER_WEIGHTS, SCORER_WEIGHTS or WEIGHTS"
WEIGHTS = ("float32", "auto", "bfloat16", "int8")
# A matrix's name to the axis of its scales, whose name ends with `SCALE`.
SCALED_AXIS = {"kernel": 1, "embedding": 0}
SCALE = "_scale"
Head = jax.Array | types.Int8Matrix
TRUNCATED_NORMAL = nn.initializers.variance_scaling(
  1.0, "fan_in", "truncated_normal"
)


def check_module(module: Any) -> None:
  """Raises a ValueError for a network with a wrong field."""
  if not hasattr(module.config, "vocab_size"):
    checks.refuse(
      "sizes such as %T5_1_1_SMALL of models/t5_1_1.gin",
      module.config,
      "STUDENT, TEACHER or SCORER",
    )
  weights = getattr(module, "weights", "auto")
  checks.one_of(weights, _SETTINGS, WEIGHTS)
  checks.boolean(getattr(module, "scan_layers", False), "TEACHER_SCAN_LAYERS")


def stored_dtype(weights: str, used_in: Any) -> jnp.dtype:
  """Returns the type in which a matrix is stored.

  >>> [str(stored_dtype(w, "bfloat16")) for w in WEIGHTS]
  ['float32', 'bfloat16', 'bfloat16', 'int8']

  Args:
    weights: of `WEIGHTS`.
    used_in: type of the matrix product.

  Raises:
    ValueError: an unknown name.
  """
  if weights not in WEIGHTS:
    raise ValueError(
      f"expected weights of {', '.join(map(repr, WEIGHTS))}, got {weights!r};"
      f" set {_SETTINGS}"
    )
  return jnp.dtype(used_in if weights == "auto" else weights)


def quantize(matrix: jax.Array) -> types.Int8Matrix:
  """Rounds each column of a matrix to multiples of 1/127 of its largest entry.

  >>> matrix = quantize(jnp.array([[1.27, 0.0], [-0.5, 0.0]]))
  >>> matrix.values.tolist(), matrix.scales.shape
  ([[127, 0], [-50, 0]], (2,))

  Args:
    matrix: `[D, V]`.

  Returns:
    The rounded matrix; its product with x is off by at most half a step of each
    column, |x|₁ · scale / 2.
  """
  matrix = matrix.astype(jnp.float32)
  scales = jnp.max(jnp.abs(matrix), axis=0) / 127
  steps = matrix / jnp.where(scales > 0, scales, 1.0)[None]
  return types.Int8Matrix(jnp.round(steps).astype(jnp.int8), scales)


def _matrix(name, init, shape, axes, dtype):
  """Returns a module's stored matrix, and its scales or None."""
  if dtype == jnp.float32:
    return param_with_axes(name, init, shape, dtype, axes=axes), None
  if dtype != jnp.int8:
    rounded = lambda key: init(key, shape, jnp.float32).astype(dtype)
    return param_with_axes(name, rounded, axes=axes), None
  axis = SCALED_AXIS[name]

  def draw(key):
    matrix = init(key, shape, jnp.float32)
    columns = quantize(matrix if axis else matrix.T)
    return columns if axis else columns._replace(values=columns.values.T)

  # Linen gives each its own key, so they fit in distribution only.
  values = param_with_axes(name, lambda key: draw(key).values, axes=axes)
  scales = param_with_axes(
    name + SCALE, lambda key: draw(key).scales, axes=(axes[axis],)
  )
  return values, partitioning.constrain(scales, axes[axis])


def _in_use(matrix, axes, dtype):
  """Returns a matrix sharded and in the type of its product."""
  if matrix.dtype.itemsize < jnp.dtype(dtype).itemsize:
    # Gathered in the smaller type.
    return partitioning.constrain(matrix, *axes).astype(dtype)
  return partitioning.constrain(matrix.astype(dtype), *axes)


class Dense(nn.Module):
  """Projection of the last axis.

  Attributes:
    features: size of the result's last axis.
    kernel_axes: logical names of the kernel's two axes.
    dtype: of the computation.
    kernel_init: distribution of the initial kernel.
    weights: type of the kernel, see the module.
    use_bias: add a bias, which is float32.
  """

  features: int
  kernel_axes: tuple[str, str]
  dtype: Any = jnp.float32
  kernel_init: Callable[..., jax.Array] = TRUNCATED_NORMAL
  weights: str = "float32"
  use_bias: bool = False

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
    # One axis of rows: XLA's CPU backend takes twice as long for the kernel's
    # gradient when it contracts over batch and length.
    rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
    kernel = _in_use(kernel, self.kernel_axes, self.dtype)
    if scales is None:
      y = kernels.project(rows, kernel)
    else:
      y = jnp.dot(rows, kernel, preferred_element_type=jnp.float32)
      y = (y * scales[None]).astype(self.dtype)
    if self.use_bias:
      axes = self.kernel_axes[1:]
      bias = param_with_axes(
        "bias", nn.initializers.zeros, (self.features,), axes=axes
      )
      y = y + partitioning.constrain(bias.astype(self.dtype), *axes)[None]
    return y.reshape(*x.shape[:-1], self.features)


class Embed(nn.Module):
  """Token embedding, by gather.

  T5X multiplies by a one-hot matrix; a gather gives the same numbers without
  the `[B*S, V]` product.

  Attributes:
    num_embeddings: V.
    features: D.
    dtype: of what is looked up.
    weights: type of the table, see the module; "auto" is that of a table that
      is no output head.
    stddev: of the initial table.
    apart: id of a token that has a vector beside the table, see `rotary.embedded`;
      None: there is none.
  """

  num_embeddings: int
  features: int
  dtype: Any = jnp.float32
  weights: str = "float32"
  stddev: float = 1.0
  apart: int | None = None

  def setup(self):
    if self.apart is not None:
      self.vector = param_with_axes(
        "vector", nn.initializers.zeros, (self.features,), axes=("embed",)
      )
    self.embedding, self.scales = _matrix(
      "embedding",
      nn.initializers.normal(stddev=self.stddev),
      (self.num_embeddings, self.features),
      ("vocab", "embed"),
      stored_dtype(self.weights, self.dtype),
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """int32 `[B, S]` -> `[B, S, D]` in `dtype`."""
    # The table is not gathered. Sharded over the data axis, each device looks up
    # its features of all rows' tokens, and rows are exchanged: bytes of
    # activations, not of the table, for its gradient too.
    x = partitioning.embed_lookup(self.embedding, tokens)
    if self.scales is not None:
      scales = jnp.take(self.scales, tokens, axis=0)[:, :, None]
      x = x.astype(jnp.float32) * scales
    return partitioning.constrain(
      x.astype(self.dtype), "batch", "length", "embed"
    )

  def attend(self, x: jax.Array) -> jax.Array:
    """Multiplies `[B, T, D]` by the transposed table: logits `[B, T, V]`."""
    table = _in_use(self.embedding, ("vocab", "embed"), jnp.float32)
    logits = jnp.dot(x.astype(jnp.float32), table.T)
    return logits if self.scales is None else logits * self.scales[None, None]


def embed(config: Any, weights: str, **kwargs) -> Embed:
  """Returns the token embedding of a configuration."""
  if weights == "auto" and config.logits_via_embedding:
    weights = "float32"  # in which `attend` uses it
  return Embed(
    config.vocab_size, config.emb_dim, config.dtype, weights, **kwargs
  )


def to_logits(config: Any, weights: str, **kwargs) -> Dense:
  """Returns the output head of a configuration, in float32."""
  axes = ("embed", "vocab")
  return Dense(config.vocab_size, axes, weights=weights, **kwargs)


def head(params: Mapping[str, Any], *, tied: bool) -> Head:
  """Returns the stored output head `[D, V]`.

  Args:
    params: parameters of the projection to logits, or of the embedding.
    tied: whether they are the embedding's.
  """
  name = "embedding" if tied else "kernel"
  values = params[name].T if tied else params[name]
  if name + SCALE in params:
    return types.Int8Matrix(values, params[name + SCALE])
  return values
