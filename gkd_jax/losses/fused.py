"""The distillation loss from hidden states and output heads.

Same value, gradient and metrics as `distillation.distillation_loss`, without the
logits `[B, T, V]` of either model: tokens go through in chunks, and while a chunk's
loss is computed, so is its gradient with respect to the student's hidden states
and head. The backward pass only scales them. The idea is that of Liger's chunked
losses (arXiv 2410.10989, section 3.2).

Padding is skipped: tokens of weight 0 are sorted behind the others, and chunks
that hold nothing else are not computed.

C is the number of tokens of a chunk, R the number of shards of the data axis (1
without a mesh).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gkd_jax import divergences, kernels, partitioning, types
from gkd_jax.losses import distillation, vocabulary
from gkd_jax.partitioning import meshes

DEFAULT_CHUNK_SIZE = 256


def num_chunks(num_tokens: int, chunk_size: int) -> int:
  """Returns the number of chunks of a shard's tokens, padding included."""
  return -(-num_tokens // chunk_size)


@jax.named_scope("loss")
def fused_distillation_loss(
  student_hidden: jax.Array,
  student_head: jax.Array,
  teacher_hidden: jax.Array,
  teacher_head: jax.Array | types.Int8Matrix,
  weights: jax.Array,
  *,
  divergence: str | types.Divergence,
  teacher_temperature: float | jax.Array = 1.0,
  student_temperature: float | jax.Array = 1.0,
  length_normalization: str = "sequence",
  segment_ids: jax.Array | None = None,
  num_real_tokens: int | None = None,
  teacher_softcap: float | None = None,
  student_softcap: float | None = None,
  hard_labels: distillation.HardLabels | None = None,
  chunk_size: int = DEFAULT_CHUNK_SIZE,
  data_axis: str = "data",
  model_axis: str = "model",
) -> tuple[jax.Array, jax.Array, types.Metrics]:
  """Computes `distillation.distillation_loss` of `hidden @ head`, in chunks.

  Logits with a soft cap are c tanh(hidden @ head / c).

  Gradients flow into the student's hidden states and head only; the teacher and
  all settings are constants. Matrix products use the wider type of hidden
  states and head and are summed in float32; everything else is float32.

  On a mesh that is set while tracing (`jax.set_mesh`) each data shard goes
  through its own tokens, and the head's gradient is summed over shards once. A
  head sharded over its vocabulary stays sharded: devices exchange a few numbers
  per token, not logits.

  >>> hidden, weights = jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), jnp.ones((1, 2))
  >>> heads = jnp.log(jnp.array([[[0.75, 0.25]] * 2, [[0.5, 0.5]] * 2]))
  >>> loss, weight, _ = fused_distillation_loss(
  ...     hidden, heads[0], hidden, heads[1], weights, divergence="forward_kl")
  >>> round(float(loss / weight), 4)
  0.1438

  Args:
    student_hidden: `[B, T, D]`, what the head is multiplied with.
    student_head: `[D, V]`.
    teacher_hidden: `[B, T, D']`; the teacher may be wider.
    teacher_head: `[D', V]` in any float type, or int8 with scales; V may differ
      from the student's where `num_real_tokens` is given.
    weights: `[B, T]`, 0 at padding.
    divergence: see `distillation.distillation_loss`.
    teacher_temperature: divides the teacher's logits.
    student_temperature: divides the student's logits.
    length_normalization: see `distillation.token_weights`.
    segment_ids: `[B, T]` int for packed rows, see `distillation.token_weights`.
    num_real_tokens: see `distillation.distillation_loss`.
    teacher_softcap: of the teacher's logits, before the temperature; see
      `vocabulary.soft_cap`.
    student_softcap: of the student's logits.
    hard_labels: see `distillation.distillation_loss`.
    chunk_size: most tokens of a chunk, on each data shard. Temporary memory is
      at least three float32 arrays of chunk_size · V numbers.
    data_axis: mesh axis that shards the batch, within a slice.
    model_axis: mesh axis that shards a vocabulary that it divides.

  Returns:
    `loss_sum`, `weight_sum` and metrics, as `distillation.distillation_loss`.

  Raises:
    ValueError: as `distillation.distillation_loss`, a `chunk_size` below 1, or
      hidden states that do not fit their head.
  """
  teacher_head, student_head = vocabulary.of_one_size(
    teacher_head, student_head, num_real_tokens
  )
  _check_shapes(
    student_hidden, student_head, teacher_hidden, teacher_head, weights
  )
  vocab_size = student_head.shape[1]
  vocabulary.check_temperatures(teacher_temperature, student_temperature)
  vocabulary.check_num_real_tokens(num_real_tokens, vocab_size)
  shares, weight_sum = distillation.token_weights(
    weights, length_normalization, segment_ids
  )
  weights = weights.astype(jnp.float32)
  layout = _layout(weights.shape, vocab_size, chunk_size, data_axis, model_axis)
  order, chunks = _real_first(layout, weights)
  tokens = _shard_tokens(
    layout, teacher_hidden, weights, shares, order, hard_labels
  )
  settings, traced = _split(
    _Settings(
      _as_tree(divergence),
      teacher_temperature,
      student_temperature,
      num_real_tokens,
      teacher_softcap,
      student_softcap,
    )
  )
  constants = tokens, _whole_columns(layout, teacher_head), traced
  sums: Any = _loss(
    (layout, settings),
    _by_shard(layout, student_hidden),
    layout.constrain(student_head, None, layout.model_axis),
    jax.lax.stop_gradient(constants),
    chunks,
  )
  loss = sums.pop(_LOSS)
  return loss, weight_sum, distillation.summed(sums, weights, hard_labels)


_LOSS = "loss"  # beside the names of the metrics


class _Tokens(NamedTuple):
  """A batch's tokens, `[R, tokens of a shard, ...]`, and their order."""

  teacher_hidden: jax.Array
  weights: jax.Array
  shares: jax.Array
  order: jax.Array  # indices of the tokens, those of padding last
  hard_labels: distillation.HardLabels | None


def _shard_tokens(layout, teacher_hidden, weights, shares, order, hard_labels):
  if hard_labels is not None:
    whole = lambda x: _by_shard(layout, jnp.broadcast_to(x, weights.shape))
    hard_labels = distillation.HardLabels(*map(whole, hard_labels))
  return _Tokens(
    _by_shard(layout, teacher_hidden),
    _by_shard(layout, weights),
    _by_shard(layout, shares),
    order,
    hard_labels,
  )


class _Settings(NamedTuple):
  """Arguments of `distillation.token_losses` after the logits; a pytree."""

  divergence: jax.tree_util.Partial
  teacher_temperature: float | jax.Array
  student_temperature: float | jax.Array
  num_real_tokens: int | None
  teacher_softcap: float | None
  student_softcap: float | None


def _as_tree(divergence):
  """Returns a divergence, or one by its name, as a pytree of its parameters."""
  if isinstance(divergence, str):
    divergence = divergences.get(divergence)
  if isinstance(divergence, functools.partial):
    bound = divergence.args, divergence.keywords
    return jax.tree_util.Partial(divergence.func, *bound[0], **bound[1])
  return jax.tree_util.Partial(divergence)


def _split(settings):
  """Returns a function of a tree's traced leaves to the tree, and those leaves.

  A custom_vjp takes arrays only as arguments. Numbers stay Python numbers,
  which are checked and pick the cheaper formulas.
  """
  leaves, structure = jax.tree.flatten(settings)
  is_array = [isinstance(x, jax.Array) for x in leaves]

  def rebuild(arrays):
    arrays = iter(arrays)
    return structure.unflatten(
      next(arrays) if traced else x
      for x, traced in zip(leaves, is_array, strict=True)
    )

  return rebuild, [x for x in leaves if isinstance(x, jax.Array)]


class _Layout(NamedTuple):
  """Size of a chunk, and the mesh axes that shard the arrays."""

  chunk: int
  data_shards: int
  data_axis: str | tuple[str, ...] | None
  model_axis: str | None
  has_mesh: bool

  def constrain(self, x, *axes):
    """Shards `x` over these axes of the mesh, if there is one."""
    return jax.lax.with_sharding_constraint(x, P(*axes)) if self.has_mesh else x


def _layout(shape, vocab_size, chunk_size, data_axis, model_axis):
  _check_chunk_size(chunk_size)
  sizes = partitioning.auto_axes()
  row_axes, shards = meshes.rows(sizes, data_axis)
  parts = sizes.get(model_axis, 1)
  shards = 1 if shape[0] % shards else shards
  of_shard = shape[0] * shape[1] // shards
  return _Layout(
    # As few chunks as possible, all of one size.
    -(-of_shard // num_chunks(of_shard, chunk_size)),
    shards,
    row_axes if shards > 1 else None,
    model_axis if parts > 1 and vocab_size % parts == 0 else None,
    bool(sizes),
  )


def _whole_columns(layout, head):
  """Returns a teacher's head with each column whole on a device."""
  if isinstance(head, types.Int8Matrix):
    return head._replace(values=_whole_columns(layout, head.values))
  return layout.constrain(head, None, layout.model_axis)


def _by_shard(layout, x):
  """Reshapes `[B, T, ...]` to `[R, tokens, ...]`, padded to whole chunks."""
  x = x.reshape(layout.data_shards, -1, *x.shape[2:])
  missing = -x.shape[1] % layout.chunk
  x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
  return layout.constrain(x, layout.data_axis)


def _real_first(layout, weights):
  """Returns an order with padding last, and how many chunks hold real tokens."""
  real = _by_shard(layout, weights) > 0
  order = jnp.argsort(jnp.logical_not(real), axis=1, stable=True)
  longest = jnp.max(jnp.sum(real, axis=1))
  return order, (longest + layout.chunk - 1) // layout.chunk


_IN_BOUNDS = {"unique_indices": True, "mode": "promise_in_bounds"}


def _take(x, indices):
  """Returns rows `[R, C, ...]` of `[R, tokens, ...]`."""
  return jax.vmap(lambda x, i: x.at[i].get(**_IN_BOUNDS))(x, indices)


def _put(x, indices, rows):
  """Returns `x` with rows `[R, C, ...]` written at these indices."""
  return jax.vmap(lambda x, i, r: x.at[i].set(r, **_IN_BOUNDS))(
    x, indices, rows
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static, hidden, head, constants, chunks):
  """Returns sums over tokens of the loss and of each metric, by name."""
  return _loss_forward(static, hidden, head, constants, chunks)[0]


def _loss_forward(static, hidden, head, constants, chunks):
  """Returns these sums, and the loss's gradients for hidden states and head."""
  layout, rebuild = static
  tokens, teacher_head, traced = constants
  losses_of = functools.partial(
    distillation.token_losses, **rebuild(traced)._asdict()
  )

  def step(index, carry):
    sums, d_hidden, d_head = carry
    indices = jax.lax.dynamic_slice_in_dim(
      tokens.order, index * layout.chunk, layout.chunk, axis=1
    )
    weights = _take(tokens.weights, indices)
    flat = lambda x: _take(x, indices).reshape(-1)
    shares = flat(tokens.shares)
    # 0 at padding, whose NaN would reach the head's gradient as 0 · NaN.
    real = lambda x: jnp.where(weights[:, :, None] > 0, _take(x, indices), 0)
    rows = real(hidden)
    loss, metrics, d_logits = kernels.rows_gradient(
      losses_of,
      _logits(layout, real(tokens.teacher_hidden), teacher_head),
      _logits(layout, rows, head),
      shares,
      {"hard_labels": jax.tree.map(flat, tokens.hard_labels)},
    )
    new = {name: weights.reshape(-1) * x for name, x in metrics.items()}
    new[_LOSS] = shares * loss
    sums = {name: sums[name] + jnp.sum(x) for name, x in new.items()}
    gradients = d_hidden, d_head
    return sums, *_add_gradients(
      layout, *gradients, indices, rows, head, d_logits
    )

  names = [_LOSS, *distillation.TOKEN_METRICS]
  if tokens.hard_labels is not None:
    names.append(distillation.HARD_LABELS)
  d_head = jnp.zeros((layout.data_shards, *head.shape), jnp.float32)
  start = (
    {name: jnp.zeros((), jnp.float32) for name in names},
    layout.constrain(jnp.zeros_like(hidden), layout.data_axis),
    layout.constrain(d_head, layout.data_axis, None, layout.model_axis),
  )
  sums, d_hidden, d_head = jax.lax.fori_loop(0, chunks, step, start)
  return sums, (d_hidden, jnp.sum(d_head, axis=0).astype(head.dtype))


def _loss_backward(static, gradients, d_sums):
  del static
  scale = d_sums[_LOSS]
  scaled = (scale.astype(g.dtype) * g for g in gradients)
  return *scaled, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _add_gradients(layout, d_hidden, d_head, indices, rows, head, d_logits):
  """Returns both gradients with those of one chunk added."""
  of_rows = kernels.times_transposed(d_logits, head.astype(jnp.float32))
  of_rows = of_rows.reshape(rows.shape).astype(d_hidden.dtype)
  by_shard = d_logits.reshape(*rows.shape[:2], -1)
  d_head = jax.vmap(kernels.add_product)(
    d_head, rows.astype(jnp.float32), by_shard
  )
  return _put(d_hidden, indices, of_rows), d_head


def _logits(layout, hidden, head):
  """Multiplies `[R, C, D]` by `[D, V]`: logits `[R C, V]`, float32."""
  if isinstance(head, types.Int8Matrix):
    scales = head.scales.astype(jnp.float32)[None]
    return scales * _logits(layout, hidden, head.values)
  dtype = jnp.promote_types(hidden.dtype, head.dtype)
  logits = jnp.einsum(
    "nd,dv->nv",
    hidden.reshape(-1, hidden.shape[-1]).astype(dtype),
    head.astype(dtype),
    preferred_element_type=jnp.float32,
  )
  return layout.constrain(logits, layout.data_axis, layout.model_axis)


def _check_chunk_size(chunk_size):
  if chunk_size < 1:
    raise ValueError(
      f"expected a chunk_size of at least 1, got {chunk_size};"
      " set LOSS_CHUNK_SIZE"
    )


def _check_shapes(
  student_hidden, student_head, teacher_hidden, teacher_head, weights
):
  """Raises ValueError unless all shapes fit."""
  if isinstance(teacher_head, types.Int8Matrix):
    teacher_head = teacher_head.values
  for name, hidden, head in (
    ("student", student_hidden, student_head),
    ("teacher", teacher_hidden, teacher_head),
  ):
    shape = (*weights.shape, head.shape[0])
    if hidden.shape != shape:
      raise ValueError(
        f"expected {name}_hidden of shape {shape}, as weights and {name}_head"
        f" have it, got {hidden.shape}; set {name}_hidden"
      )
