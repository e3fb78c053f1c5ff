"""The loops of sampling, over `tokens_to_logits`.

A step feeds one token per row, gets logits, draws the next token and writes it.
The loops do not know the model. All control flow is traced, so they run under
`jit`, inside `lax.scan` over microbatches, and under `pmap`.

`decode_rows` decodes all rows until the last one has ended. On a mesh with the rows
sharded it is one program with one global "all rows have ended", so devices whose
rows end early wait and cannot deadlock.

`decode_with_slots` decodes K of P rows at a time; one that has ended gives its slot to the
next of the queue, so that one long row does not hold up a batch of short ones.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from gkd_jax import partitioning, types
from gkd_jax.partitioning import meshes

Draw = Callable[..., tuple[jax.Array, jax.Array]]


def is_eos(tokens: jax.Array, eos_id: int | Sequence[int]) -> jax.Array:
  """Returns which tokens end a sequence, bool of the same shape.

  >>> is_eos(jnp.array([5, 2, 7]), (2, 7)).tolist()
  [False, True, True]

  Args:
    tokens: ids of any shape.
    eos_id: one id or several; -1 and () are no token's.
  """
  ids = jnp.asarray(eos_id, jnp.int32).reshape((1,) * tokens.ndim + (-1,))
  return jnp.any(tokens[..., None] == ids, axis=-1)


class SamplingState(NamedTuple):
  """The carry of `decode_rows`.

  With T = 4 and EOS 1, after two steps of three rows, of which the last one was
  inactive and the second one drew EOS at once:

    position  2
    current   [   5,            0,            0          ]
    ended     [   False,        True,         True       ]
    tokens    [[7, 5, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]

  and at the end, if the first row draws EOS in the third step:

    tokens    [[7, 5, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]

  Attributes:
    position: `[]` int32, number of steps done, index of the token to write.
    current: `[B]` int32, token to feed next; 0 for rows that have ended.
    ended: `[B]` bool, true once EOS is written or the row is full.
    tokens: `[B, T]` int32, zeros from `position` on.
    log_probs: `[B, T]` float32, zeros from `position` on.
    cache: the model's state.
  """

  position: jax.Array  # []
  current: jax.Array  # [B]
  ended: jax.Array  # [B]
  tokens: jax.Array  # [B, T]
  log_probs: jax.Array  # [B, T]
  cache: types.PyTree


def decode_rows(
  tokens_to_logits: types.TokensToLogits,
  cache: types.PyTree,
  draw: Draw,
  *,
  row_keys: jax.Array | None,
  start_tokens: jax.Array,
  row_lengths: jax.Array,
  active: jax.Array,
  max_decode_length: int,
  eos_id: int | Sequence[int],
) -> tuple[jax.Array, jax.Array]:
  """Decodes B rows until the last one has ended.

  Args:
    tokens_to_logits: `(tokens [B], cache) -> (logits [B, V], cache)`.
    cache: the model's state before the first token.
    draw: `(logits [B, V], row_keys [B] or None, position []) -> (tokens,
      log_probs)`, `[B]` each.
    row_keys: `[B]` random keys, or None where nothing is drawn.
    start_tokens: `[B]` int32 fed first.
    row_lengths: `[B]` integer, longest output of each row, EOS included.
    active: `[B]` bool. Rows that are False stay zero.
    max_decode_length: T.
    eos_id: see `is_eos`.

  Returns:
    Tokens and log-probs, `[B, T]` each, zeros after a row's end.
  """

  def not_finished(state: SamplingState):
    return (state.position < max_decode_length) & ~jnp.all(state.ended)

  def step(state: SamplingState) -> SamplingState:
    logits, cache = lax.stop_gradient(
      tokens_to_logits(state.current, state.cache)
    )
    drawn, log_probs = draw(logits, row_keys, state.position)
    token = jnp.where(state.ended, 0, drawn)
    log_probs = jnp.where(state.ended, 0.0, log_probs)
    return SamplingState(
      position=state.position + 1,
      current=token,
      ended=state.ended
      | is_eos(token, eos_id)
      | (state.position + 1 >= row_lengths),
      tokens=_write(state.tokens, token, state.position),
      log_probs=_write(state.log_probs, log_probs, state.position),
      cache=cache,
    )

  shape = (active.shape[0], max_decode_length)
  initial = SamplingState(
    position=jnp.int32(0),
    current=start_tokens,
    ended=~active,
    tokens=jnp.zeros(shape, jnp.int32),
    log_probs=jnp.zeros(shape, jnp.float32),
    cache=cache,
  )
  final = lax.while_loop(not_finished, step, initial)
  return final.tokens, final.log_probs


class SlotDecodeResult(NamedTuple):
  """Outputs in the order of the rows, and the use of the slots.

  Attributes:
    tokens: `[P, T]` int32, zeros after a row's end.
    log_probs: `[P, T]` float32.
    steps: `[]` int32, steps of the model, of K slots each.
    busy: `[]` int32, summed over steps, slots whose row had not ended;
      `busy / (K steps)` is the share of useful work.
  """

  tokens: jax.Array
  log_probs: jax.Array
  steps: jax.Array
  busy: jax.Array


class _SlotsState(NamedTuple):
  """The carry of `decode_with_slots`.

  Attributes:
    next: `[]` int32, rows of the queue that have been given a slot.
    row: `[K]` int32, the current or last row of each slot.
    position: `[K]` int32, index of that row's token to write.
    current: `[K]` int32, token to feed next.
    free: `[K]` bool, the slot's row has ended.
    cache: of K rows.
    done: the result so far.
  """

  next: jax.Array
  row: jax.Array
  position: jax.Array
  current: jax.Array
  free: jax.Array
  cache: types.PyTree
  done: SlotDecodeResult


def decode_with_slots(
  tokens_to_logits: types.TokensToLogits,
  cache: types.PyTree,
  draw: Draw,
  *,
  slots: int,
  row_axes: types.PyTree,
  row_keys: jax.Array | None,
  start_tokens: jax.Array,
  row_lengths: jax.Array,
  active: jax.Array,
  max_decode_length: int,
  eos_id: int | Sequence[int],
  data_axis: str = "data",
) -> SlotDecodeResult:
  """Decodes P rows, K at a time; a finished row frees its slot for the next.

  An outer loop of two inner ones: one fills free slots, moving the next row's part
  of the cache in place; one decodes until a slot is free and a row is waiting.

  Args:
    tokens_to_logits: `(tokens [K], cache) -> (logits [K, V], cache)`.
    cache: of all P rows before their first tokens. A leaf without rows must be
      the same in every step; positions are therefore kept for each row.
    draw: `(logits [K, V], row_keys [K] or None, positions [K]) -> (tokens,
      log_probs)`, `[K]` each.
    slots: K, on each shard of the data axis.
    row_axes: the batch axis of each leaf of the cache, see `decoding.row_axes`.
    row_keys: `[P]` random keys, or None where nothing is drawn.
    start_tokens: `[P]` int32 fed first.
    row_lengths: `[P]` integer, longest output of each row, EOS included.
    active: `[P]` bool. Rows that are False get no slot, and stay zero.
    max_decode_length: T.
    eos_id: see `is_eos`.
    data_axis: the mesh axis that rows are sharded over, besides slices. Each
      shard has its own queue and waits for the others only at the end.

  Raises:
    ValueError: the data axis does not divide P.
  """
  of_rows = cache, row_keys, start_tokens, row_lengths, active
  run = functools.partial(
    _one_queue,
    tokens_to_logits,
    draw,
    slots=slots,
    row_axes=row_axes,
    max_decode_length=max_decode_length,
    eos_id=eos_id,
  )
  axes, shards = meshes.rows(partitioning.auto_axes(), data_axis)
  if shards == 1:
    return run(*of_rows)
  rows = start_tokens.shape[0]
  if rows % shards:
    raise ValueError(
      f"expected rows that the {shards} shards of data divide, got {rows};"
      " set BATCH_SIZE, or DECODE_SLOTS = None"
    )

  def on_shard(*of_rows):
    done = run(*of_rows)
    return done._replace(
      steps=lax.pmax(done.steps, axes),
      busy=lax.psum(done.busy, axes),
    )

  split = P(axes)
  whole = jax.tree.map(
    lambda axis: P() if axis < 0 else P(*[None] * axis, axes), row_axes
  )
  return jax.shard_map(
    on_shard,
    in_specs=(whole, split, split, split, split),
    out_specs=SlotDecodeResult(split, split, P(), P()),
    axis_names={axes} if isinstance(axes, str) else set(axes),
    check_vma=False,
  )(*of_rows)


def _one_queue(
  tokens_to_logits,
  draw,
  cache,
  row_keys,
  start_tokens,
  row_lengths,
  active,
  *,
  slots,
  row_axes,
  max_decode_length,
  eos_id,
) -> SlotDecodeResult:
  """Decodes the rows of one shard."""
  rows = start_tokens.shape[0]
  slots = min(slots, rows)
  queue = jnp.argsort(~active, stable=True).astype(jnp.int32)
  waiting = jnp.sum(active, dtype=jnp.int32)

  has_work = lambda s: ~jnp.all(s.free) | (s.next < waiting)
  can_refill = lambda s: jnp.any(s.free) & (s.next < waiting)
  can_step = lambda s: ~jnp.all(s.free) & ~can_refill(s)

  def refill(state: _SlotsState) -> _SlotsState:
    row = queue[state.next]
    return _refilled(state, row, start_tokens[row], cache, row_axes)

  def step(state: _SlotsState) -> _SlotsState:
    logits, new_cache = lax.stop_gradient(
      tokens_to_logits(state.current, state.cache)
    )
    keys = None if row_keys is None else row_keys[state.row]
    token, log_probs = draw(logits, keys, state.position)
    done = state.done
    # A free slot's token belongs to no row and is dropped.
    place = jnp.where(state.free, rows, state.row), state.position
    write = lambda to, x: to.at[place].set(x, mode="drop", unique_indices=True)
    position = state.position + 1
    ended = is_eos(token, eos_id) | (position >= row_lengths[state.row])
    return state._replace(
      position=position,
      current=token,
      free=state.free | ended,
      cache=new_cache,
      done=SlotDecodeResult(
        write(done.tokens, token),
        write(done.log_probs, log_probs),
        done.steps + 1,
        done.busy + jnp.sum(~state.free, dtype=jnp.int32),
      ),
    )

  def turn(state: _SlotsState) -> _SlotsState:
    state = lax.while_loop(can_refill, refill, state)
    return lax.while_loop(can_step, step, state)

  start = _first_rows(
    queue[:slots], waiting, start_tokens, cache, row_axes, max_decode_length
  )
  return lax.while_loop(has_work, turn, start).done


def _first_rows(
  first, waiting, start_tokens, cache, row_axes, length
) -> _SlotsState:
  """Returns the state with the first K rows of the queue, `[K]`, in the slots."""
  slots, shape = first.shape[0], (start_tokens.shape[0], length)
  take = lambda of, axis: of if axis < 0 else jnp.take(of, first, axis)
  zero = jnp.int32(0)
  return _SlotsState(
    next=jnp.minimum(slots, waiting),
    row=first,
    position=jnp.zeros(slots, jnp.int32),
    current=start_tokens[first],
    free=jnp.arange(slots) >= waiting,
    cache=jax.tree.map(take, cache, row_axes),
    done=SlotDecodeResult(
      jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), zero, zero
    ),
  )


def _refilled(state, row, start_token, cache, row_axes) -> _SlotsState:
  """Returns the state with `row` of the whole `cache` in the first free slot."""
  slot = jnp.argmax(state.free)

  def move(to, axis, of):
    if axis < 0:
      return to
    one = lax.dynamic_index_in_dim(of, row, axis)
    return lax.dynamic_update_slice_in_dim(to, one, slot, axis)

  return state._replace(
    next=state.next + 1,
    row=state.row.at[slot].set(row),
    position=state.position.at[slot].set(0),
    current=state.current.at[slot].set(start_token),
    free=state.free.at[slot].set(False),
    cache=jax.tree.map(move, state.cache, row_axes, cache),
  )


def _write(array, column, position):
  """Returns `array` `[B, T]` with `column` `[B]` at `position`."""
  return lax.dynamic_update_slice_in_dim(
    array, column[:, None], position, axis=1
  )
