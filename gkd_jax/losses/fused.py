"""The distillation loss from hidden states and output heads.

Same value, gradient and metrics as `distillation.distillation_loss`, without the
logits `[B, T, V]` of either model: tokens go through in chunks, and while a chunk's
loss is computed, so is its gradient with respect to the student's hidden states
and head. The backward pass only scales them. The idea is that of Liger's chunked
losses (arXiv 2410.10989, section 3.2).

Padding is left out: tokens of weight 0 are moved behind the others, and chunks
that hold nothing else are not computed.

What happens within a chunk is `fused_chunks`. C stands for the tokens of a chunk,
R for the shards of the data axis (1 without a mesh).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gkd_jax import divergences, partitioning, types
from gkd_jax.losses import distillation, fused_chunks, vocabulary
from gkd_jax.partitioning import meshes


class Int8Head(NamedTuple):
  """A teacher's head in a quarter of the memory; see `quantize_head`.

  Attributes:
    values: `[D, V]` int8.
    scales: `[V]` float32; a column of the head is `values[:, v] * scales[v]`.
  """

  values: jax.Array
  scales: jax.Array


def quantize_head(head: jax.Array) -> Int8Head:
  """Rounds each column of a head to multiples of 1/127 of its largest entry.

  >>> head = quantize_head(jnp.array([[1.27, 0.0], [-0.5, 0.0]]))
  >>> head.values.tolist(), head.scales.shape
  ([[127, 0], [-50, 0]], (2,))

  Args:
    head: `[D, V]`.

  Returns:
    The head; its product with hidden states is off by at most half a step of
    each column, |hidden|₁ · scale / 2.
  """
  head = head.astype(jnp.float32)
  scales = jnp.max(jnp.abs(head), axis=0) / 127
  steps = head / jnp.where(scales > 0, scales, 1.0)[None]
  return Int8Head(jnp.round(steps).astype(jnp.int8), scales)


DEFAULT_CHUNK_SIZE = 256


def num_chunks(num_tokens: int, chunk_size: int) -> int:
  """Returns the number of chunks of a shard's tokens, padding included."""
  return -(-num_tokens // chunk_size)


@jax.named_scope("loss")
def fused_distillation_loss(
  student_hidden: jax.Array,
  student_head: jax.Array,
  teacher_hidden: jax.Array,
  teacher_head: jax.Array | Int8Head,
  weights: jax.Array,
  *,
  divergence: str | types.Divergence,
  teacher_temperature: float | jax.Array = 1.0,
  student_temperature: float | jax.Array = 1.0,
  length_normalization: str = "sequence",
  segment_ids: jax.Array | None = None,
  num_real_tokens: int | None = None,
  chunk_size: int = DEFAULT_CHUNK_SIZE,
  data_axis: str = "data",
  model_axis: str = "model",
) -> tuple[jax.Array, jax.Array, types.Metrics]:
  """`distillation.distillation_loss` of `hidden @ head`, without whole logits.

  A gradient flows into the student's hidden states and head alone; the teacher
  and all settings are constants. Products are taken in the wider type of hidden
  states and head and summed in float32; all else is float32.

  On a mesh that is set while tracing (`jax.set_mesh`) each data shard goes
  through its own tokens, and the head's gradient is summed over shards once. A
  head split over its vocabulary stays split: what is exchanged of the logits is
  a few numbers per token.

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
    teacher_head: `[D', V]` in any float type, or int8 with scales.
    weights: `[B, T]`, 0 at padding.
    divergence: see `distillation.distillation_loss`.
    teacher_temperature: divides the teacher's logits.
    student_temperature: divides the student's logits.
    length_normalization: see `distillation.token_weights`.
    segment_ids: `[B, T]` int for packed rows, see `distillation.token_weights`.
    num_real_tokens: see `distillation.distillation_loss`.
    chunk_size: most tokens of a chunk, on each data shard. On a CPU temporary
      memory is twice V · chunk_size float32 and more beside the gradients.
    data_axis: of the mesh, over which rows are split, as over its slices.
    model_axis: of the mesh, over which a vocabulary that it divides is split.

  Returns:
    `loss_sum`, `weight_sum` and metrics, as `distillation.distillation_loss`.

  Raises:
    ValueError: as `distillation.distillation_loss`, a `chunk_size` below 1, or hidden
      states that do not fit their head.
  """
  vocab_size = _check_shapes(
    student_hidden, student_head, teacher_hidden, teacher_head, weights
  )
  _check_chunk_size(chunk_size)
  vocabulary.check_temperatures(teacher_temperature, student_temperature)
  vocabulary.check_num_real_tokens(num_real_tokens, vocab_size)
  if isinstance(divergence, str):
    divergence = divergences.get(divergence)
  shares, weight_sum = distillation.token_weights(
    weights, length_normalization, segment_ids
  )
  weights = weights.astype(jnp.float32)
  layout = _layout(weights.shape, vocab_size, chunk_size, data_axis, model_axis)
  if divergences.sums_over_vocabulary(divergence):
    layout = layout._replace(tiles=_tiles(vocab_size, layout))
  order, chunks = _real_first(layout, weights)
  tokens = _Tokens(
    jax.lax.stop_gradient(_by_shard(layout, teacher_hidden)),
    _by_shard(layout, weights),
    _by_shard(layout, shares),
    order,
  )
  rules_of, settings = _split_settings(
    divergence, teacher_temperature, student_temperature, num_real_tokens
  )
  sums: Any = _loss(
    rules_of,
    layout,
    _by_shard(layout, student_hidden),
    layout.constrain(student_head, None, layout.model_axis),
    tokens,
    jax.lax.stop_gradient((_whole_columns(layout, teacher_head), settings)),
    chunks,
  )
  total = jnp.sum(weights)
  loss = sums.pop(_LOSS)
  metrics = {k: (jax.lax.stop_gradient(x), total) for k, x in sums.items()}
  return loss, weight_sum, metrics


def _whole_columns(layout, head):
  """A teacher's head as it is used, each column whole on a device."""
  if isinstance(head, Int8Head):
    return head._replace(values=_whole_columns(layout, head.values))
  return layout.constrain(head, None, layout.model_axis)


_LOSS = "loss"  # beside the names of the metrics


class _Tokens(NamedTuple):
  """Tokens of a batch, `[R, tokens of a shard, ...]`, and their order."""

  teacher_hidden: jax.Array
  weights: jax.Array
  shares: jax.Array
  order: jax.Array  # places of the tokens, those of padding last


class _Layout(NamedTuple):
  """How the tokens are cut, and on which axes of the mesh things lie."""

  chunk: int
  data_shards: int
  data_axis: str | tuple[str, ...] | None
  model_axis: str | None
  has_mesh: bool
  tiles: fused_chunks.Tiles  # of the vocabulary, on a CPU

  def constrain(self, x, *axes):
    """`x`, split over these axes of the mesh, where there is one."""
    return jax.lax.with_sharding_constraint(x, P(*axes)) if self.has_mesh else x


def _split_settings(divergence, *rest):
  """A function of settings to `Rules`, and the settings that are arrays.

  custom_vjp has to be handed those; numbers stay numbers, which are checked.
  """
  hyper = {}
  if isinstance(divergence, functools.partial):
    hyper, divergence = divergence.keywords, divergence.func
  fixed = [hyper, *rest]
  leaves, tree = jax.tree.flatten(fixed, is_leaf=lambda x: x is None)
  arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
  numbers = [None if i in arrays else x for i, x in enumerate(leaves)]

  def rules_of(arrays):
    values = [arrays.get(i, x) for i, x in enumerate(numbers)]
    hyper, *rest = jax.tree.unflatten(tree, values)
    return fused_chunks.Rules(functools.partial(divergence, **hyper), *rest)

  return rules_of, arrays


def _layout(shape, vocab_size, chunk_size, data_axis, model_axis):
  sizes = partitioning.auto_axes()
  row_axes, shards = meshes.rows(sizes, data_axis)
  parts = sizes.get(model_axis, 1)
  shards = 1 if shape[0] % shards else shards
  of_shard = shape[0] * shape[1] // shards
  # As few chunks as there can be, all of one size.
  chunk = -(-of_shard // num_chunks(of_shard, chunk_size))
  return _Layout(
    chunk,
    shards,
    row_axes if shards > 1 else None,
    model_axis if parts > 1 and vocab_size % parts == 0 else None,
    bool(sizes),
    fused_chunks.Tiles(1, vocab_size),
  )


# Numbers in a tile: some ten arrays of so many are in a CPU's cache.
_TILE = 2**17


def _tiles(vocab_size, layout):
  """Equal tiles for a CPU; one where the vocabulary has no fitting divisor."""
  most = _TILE // layout.chunk
  if layout.model_axis is None:
    for width in range(min(vocab_size, most), most // 8, -1):
      if vocab_size % width == 0:
        return fused_chunks.Tiles(vocab_size // width, width)
  return layout.tiles


def _by_shard(layout, x):
  """`[B, T, ...]` -> `[R, tokens of a shard, ...]`, with padding to whole chunks."""
  x = x.reshape(layout.data_shards, -1, *x.shape[2:])
  missing = -x.shape[1] % layout.chunk
  x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
  return layout.constrain(x, layout.data_axis)


def _real_first(layout, weights):
  """Places of a shard's tokens, padding last, and how many chunks hold others."""
  real = _by_shard(layout, weights) > 0
  order = jnp.argsort(jnp.logical_not(real), axis=1, stable=True)
  longest = jnp.max(jnp.sum(real, axis=1))
  return order, (longest + layout.chunk - 1) // layout.chunk


_IN_BOUNDS = {"unique_indices": True, "mode": "promise_in_bounds"}


def _take(x, places):
  """`[R, tokens, ...]` at `[R, C]` places."""
  return jax.vmap(lambda x, i: x.at[i].get(**_IN_BOUNDS))(x, places)


def _put(x, places, rows):
  """`x` with rows `[R, C, ...]` at these places."""
  return jax.vmap(lambda x, i, r: x.at[i].set(r, **_IN_BOUNDS))(x, places, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(rules_of, layout, hidden, head, tokens, constants, chunks):
  """Sums over tokens of the loss and of each metric, by name."""
  return _sums(rules_of, layout, hidden, head, tokens, constants, chunks, False)


def _loss_forward(*arguments):
  sums, d_hidden, d_head = _sums(*arguments, True)
  return sums, (d_hidden, d_head)


def _loss_backward(rules_of, layout, gradients, d_sums):
  del rules_of, layout
  scale = d_sums[_LOSS]
  scaled = (scale.astype(g.dtype) * g for g in gradients)
  return *scaled, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _sums(
  rules_of, layout, hidden, head, tokens, constants, chunks, with_gradient
):
  """What `_loss` returns; with the gradient, also those of its two inputs."""
  of = functools.partial(_over_chunks, rules_of, layout, with_gradient)
  arguments = hidden, head, tokens, constants, chunks
  whole = fused_chunks.Tiles(1, head.shape[1])
  if layout.tiles == whole:
    return of(whole, *arguments)
  # An accelerator is faster with few large products.
  return jax.lax.platform_dependent(
    *arguments,
    cpu=functools.partial(of, layout.tiles),
    default=functools.partial(of, whole),
  )


def _over_chunks(
  rules_of,
  layout,
  with_gradient,
  tiles,
  hidden,
  head,
  tokens,
  constants,
  chunks,
):
  """`_sums`, by these tiles of the vocabulary."""
  teacher_head, settings = constants
  rules = rules_of(settings)

  def step(index, carry):
    places = jax.lax.dynamic_slice_in_dim(
      tokens.order, index * layout.chunk, layout.chunk, axis=1
    )
    weights = _take(tokens.weights, places)
    shares = _take(tokens.shares, places)
    # 0 at padding, where a NaN would get into the head's gradient as 0 · NaN.
    of_real = lambda x: jnp.where(weights[:, :, None] > 0, _take(x, places), 0)
    rows = of_real(hidden)
    loss, metrics, residuals = fused_chunks.token_losses(
      rules,
      tiles,
      _logits(layout, of_real(tokens.teacher_hidden), teacher_head),
      _logits(layout, rows, head),
    )
    weights, shares = weights.reshape(-1), shares.reshape(-1)
    new = {name: weights * x for name, x in metrics.items()}
    new[_LOSS] = shares * loss
    sums, *gradients = carry
    sums = {name: sums[name] + jnp.sum(x) for name, x in new.items()}
    if with_gradient:
      d_logits = fused_chunks.logits_gradient(rules, residuals, shares)
      gradients = _add_gradients(
        layout, tiles, gradients, places, rows, head, d_logits
      )
    return sums, *gradients

  names = (_LOSS, *distillation.TOKEN_METRICS)
  start = ({name: jnp.zeros((), jnp.float32) for name in names},)
  if with_gradient:
    start += _no_gradients(layout, hidden, head)
  done = jax.lax.fori_loop(0, chunks, step, start)
  if not with_gradient:
    return done[0]
  sums, d_hidden, d_head = done
  return sums, d_hidden, jnp.sum(d_head, axis=0).astype(head.dtype)


def _no_gradients(layout, hidden, head):
  """Zeros for the gradients of hidden states and, on each shard, of the head."""
  of_head = jnp.zeros((layout.data_shards, *head.shape), jnp.float32)
  return (
    layout.constrain(jnp.zeros_like(hidden), layout.data_axis),
    layout.constrain(of_head, layout.data_axis, None, layout.model_axis),
  )


def _add_gradients(layout, tiles, gradients, places, rows, head, d_logits):
  """Gradients of hidden states and head, with those of one chunk in them."""
  d_hidden, d_head = gradients
  of_rows = fused_chunks.rows_gradient(tiles, d_logits, head)
  of_rows = of_rows.reshape(rows.shape).astype(d_hidden.dtype)
  rows = rows.astype(jnp.float32)
  # Of the gradient's arrays few are in use at once, and wide products are faster.
  tiles = tiles.joined(4)

  def sweep(first, d_head):
    part = tiles.of(d_logits, first)
    if layout.data_shards == 1:
      of_head = jnp.einsum("nd,nv->dv", rows[0], part)[None]
    else:
      by_shard = part.reshape(*rows.shape[:2], -1)
      of_head = jnp.einsum("rcd,rcv->rdv", rows, by_shard)
    return tiles.put(d_head, tiles.of(d_head, first) + of_head, first)

  return _put(d_hidden, places, of_rows), tiles.each(sweep, d_head)


def _logits(layout, hidden, head):
  """`[R, C, D]` and `[D, V]` -> `[R C, V]`, float32."""
  if isinstance(head, Int8Head):
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
  """V, if all shapes fit."""
  if isinstance(teacher_head, Int8Head):
    teacher_head = teacher_head.values
  sizes = teacher_head.shape[1], student_head.shape[1]
  if sizes[0] != sizes[1]:
    raise ValueError(
      "expected heads of one vocabulary, got"
      f" {sizes[0]} (teacher) and {sizes[1]} (student) columns; set the same"
      " vocab_size for TEACHER and STUDENT"
    )
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
  return sizes[0]
