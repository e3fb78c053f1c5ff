"""Decoding by beam search: one compiled loop over `tokens_to_logits`.

The N best outputs of each prompt under T5X's score: log-prob divided by the
brevity penalty of Wu et al. (arXiv 1609.08144, equation 14, without coverage),

  score(y) = log p(y) / ((5 + |y|) / 6)^α,   |y| with EOS.

Each step extends the N live outputs of a prompt by every token and keeps the 2N
likeliest, so that N of them go on even if N end (with E EOS tokens (1 + E) N, as
E N may end). Those that end compete by score
for the N finished slots; the others by log-prob for the N live ones. The loop
stops once no live output of any prompt can still beat a finished one, or at the
decode length. Like `sampling.sample`, it does not know the model, and runs under
`jit` on a mesh with the batch sharded: the cache is not moved (XLA may gather the
log-probs that `top_k` reads).

Ties fall as in T5X: of equal candidates the one of the worse-ranked live output
wins, then the lower token id. Equal finished outputs swap places in each step,
so that their order depends on how long the other prompts of the batch take; all
else is a prompt's own. Where T5X differs: a candidate without a live ancestor
never counts as finished (with V < 2N T5X can return one in place of live
outputs), and logits of -inf are allowed.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gkd_jax import types
from gkd_jax.decoding import loops

# T5X's score of a slot that holds nothing; no output of a model is as unlikely.
IMPOSSIBLE = -1e7


class BeamResult(NamedTuple):
  """The N best outputs of each prompt, from the worst to the best.

  Attributes:
    tokens: `[B, N, T]` int32; the EOS that ends an output is kept, zeros follow
      it.
    scores: `[B, N]` float32, ascending: log-prob in nats over the brevity
      penalty, or the plain log-prob where no output of the prompt has ended.
      -1e7 in slots without an output, whose tokens are zero.
  """

  tokens: jax.Array
  scores: jax.Array


class BeamState(NamedTuple):
  """Carry of the loop. Slots are in ascending order, empty ones at -inf.

  Attributes:
    position: `[]` int32, number of steps done, index of the token to write.
    current: `[B, N]` int32, token of each live output to feed next.
    live_tokens: `[B, N, T]` int32, zeros from `position` on.
    live_log_probs: `[B, N]` float32, nats.
    finished_tokens: `[B, N, T]` int32, zeros after EOS.
    finished_scores: `[B, N]` float32.
    cache: the model's state, of B N rows; row b N + n is live output n's.
  """

  position: jax.Array  # []
  current: jax.Array  # [B, N]
  live_tokens: jax.Array  # [B, N, T]
  live_log_probs: jax.Array  # [B, N]
  finished_tokens: jax.Array  # [B, N, T]
  finished_scores: jax.Array  # [B, N]
  cache: types.PyTree


def beam_search(
  tokens_to_logits: types.TokensToLogits,
  cache: types.PyTree,
  key: jax.Array | None = None,
  *,
  batch_size: int,
  max_decode_length: int,
  num_decodes: int = 4,
  alpha: float | jax.Array = 0.6,
  eos_id: int | Sequence[int] = 1,
  start_tokens: jax.Array | None = None,
  row_lengths: jax.Array | None = None,
  row_axes: types.PyTree | None = None,
) -> BeamResult:
  """Returns the N best outputs of each prompt that the search finds.

  Args:
    tokens_to_logits: `(tokens [B N], cache) -> (logits [B N, V], cache)`.
    cache: the model's state before the first token, of B N rows; those of one
      prompt, b N to b N + N - 1, are equal.
    key: not read; the argument of every decode function.
    batch_size: B, prompts.
    max_decode_length: T, EOS included.
    num_decodes: N, width of the beam and number of outputs.
    alpha: `[]`, exponent of the brevity penalty: 0 ranks by log-prob, larger
      values favour long outputs. An array may change without recompiling.
    eos_id: the token that ends an output, or several; -1 never ends one.
    start_tokens: `[B N]` int32 fed first, equal in the rows of one prompt; 0,
      T5's start token, by default.
    row_lengths: `[B N]` integer, T of each row where some prompts have less room
      than others, equal in the rows of one prompt. A prompt's search stops
      there, as it does at T.
    row_axes: tree of the cache's structure: the axis of each leaf's rows, -1
      for a leaf without rows. By default scalars have none, and all others have
      their rows on axis 0. Not needed where N is 1.

  Returns:
    Tokens `[B, N, T]` and scores `[B, N]`, the best last. A prompt of which no
    output has ended within T gets its live ones and their log-probs.

  Raises:
    ValueError: a setting is outside of its range, or `start_tokens`,
      `row_lengths` or a leaf of the cache have not B N rows.
  """
  del key
  _check_settings(max_decode_length, num_decodes, alpha)
  row_axes = _checked_row_axes(cache, row_axes, batch_size, num_decodes)
  slots = (batch_size, num_decodes)
  current = _slots("start_tokens", start_tokens, slots, 0)
  room = _slots("row_lengths", row_lengths, slots, max_decode_length)[:, 0]
  penalty = functools.partial(brevity_penalty, lax.stop_gradient(alpha))

  def not_finished(state: BeamState):
    # Log-probs only fall. The largest penalty brings a score closest to 0: that
    # of the longest output (T5X: and one token), or, with alpha below 0, of the
    # next one.
    largest = jnp.maximum(
      penalty(max_decode_length + 1), penalty(state.position + 1)
    )
    best_live = state.live_log_probs[:, -1]  # [B]
    can_improve = best_live / largest >= state.finished_scores[:, 0]
    can_improve &= (best_live != -jnp.inf) & (state.position < room)
    return (state.position < max_decode_length) & jnp.any(can_improve)

  def step(state: BeamState) -> BeamState:
    logits, cache = tokens_to_logits(state.current.reshape(-1), state.cache)
    extended, parents = _extended(state, logits, penalty, eos_id, room)
    return extended._replace(
      cache=_reorder(cache, state.cache, row_axes, parents)
    )

  tokens = jnp.zeros((*slots, max_decode_length), jnp.int32)
  empty = jnp.full(slots, -jnp.inf, jnp.float32)
  initial = BeamState(
    position=jnp.int32(0),
    current=current,
    live_tokens=tokens,
    # One live output, the empty one: N equal ones would stay equal.
    live_log_probs=empty.at[:, -1].set(0.0),
    finished_tokens=tokens,
    finished_scores=empty,
    cache=lax.stop_gradient(cache),
  )
  return _result(lax.while_loop(not_finished, step, initial))


def brevity_penalty(
  alpha: float | jax.Array, length: int | jax.Array
) -> jax.Array:
  """Returns ((5 + length) / 6)^α, by which a log-prob is divided.

  >>> round(float(brevity_penalty(0.6, 7)), 4)
  1.5157

  Args:
    alpha: α, a number or `[]`.
    length: in tokens, EOS included, a number or an array.

  Returns:
    Float32 of `length`'s shape; 1 at length 1.
  """
  return jnp.power((5.0 + jnp.asarray(length, jnp.float32)) / 6.0, alpha)


def _extended(state, logits, penalty, eos_id, room):
  """Extends each live output by one token.

  Args:
    state: see `BeamState`.
    logits: `[B N, V]` of that token.
    penalty: see `brevity_penalty`, of a length.
    eos_id: see `beam_search`.
    room: `[B]`, T of each prompt; one that is full stays as it is.

  Returns:
    The state with its old cache, and `[B, N]`, the live output that each new one
    extends.
  """
  found = _candidates(
    lax.stop_gradient(logits),
    state.live_log_probs,
    1 + max(1, np.size(eos_id)),
  )
  ended = loops.is_eos(found.tokens, eos_id)  # [B, 2N]
  scores = found.log_probs / penalty(state.position + 1)
  live, order = _best(
    jnp.where(ended, -jnp.inf, found.log_probs), state.live_log_probs.shape[1]
  )
  parents, current = _pick((found.parents, found.tokens), order)
  full = state.position >= room  # [B], the others go on alone
  ended &= ~full[:, None]
  finished, finished_tokens = _finish(
    state, found, jnp.where(ended, scores, -jnp.inf)
  )
  live_tokens = _write(
    _pick(state.live_tokens, parents), current, state.position
  )
  extended = state._replace(
    position=state.position + 1,
    current=current,
    live_tokens=jnp.where(full[:, None, None], state.live_tokens, live_tokens),
    live_log_probs=jnp.where(full[:, None], state.live_log_probs, live),
    finished_tokens=finished_tokens,
    finished_scores=finished,
  )
  return extended, parents


class _Candidates(NamedTuple):
  """The 2N likeliest extensions of each prompt's live outputs, best first."""

  log_probs: jax.Array  # [B, 2N], -inf for extensions of empty slots
  tokens: jax.Array  # [B, 2N]
  parents: jax.Array  # [B, 2N], slot of the output that is extended


def _candidates(
  logits: jax.Array, live_log_probs: jax.Array, per_slot: int
) -> _Candidates:
  """Returns the best extensions.

  Args:
    logits: `[B N, V]`.
    live_log_probs: `[B, N]`.
    per_slot: candidates for each live output, 2 with one EOS.
  """
  batch_size, num_decodes = live_log_probs.shape
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  log_probs = log_probs + live_log_probs.reshape(-1, 1)  # [B N, V]
  # As written, NaN is kept, and shows in the scores.
  log_probs = jnp.where(log_probs <= IMPOSSIBLE, -jnp.inf, log_probs)
  # Slot by slot first, so that a sharded vocabulary stays an axis of its own.
  # Of equal candidates top_k takes the first: in order of slots, then of ids.
  each = min(per_slot * num_decodes, logits.shape[-1])
  log_probs, tokens = lax.top_k(log_probs, each)
  count = min(per_slot * num_decodes, num_decodes * each)
  log_probs, index = lax.top_k(log_probs.reshape(batch_size, -1), count)
  tokens = jnp.take_along_axis(tokens.reshape(batch_size, -1), index, axis=1)
  return _Candidates(log_probs, tokens, index // each)


def _finish(state: BeamState, found: _Candidates, scores: jax.Array):
  """Chooses the N best of the finished outputs and the candidates that end now.

  Returns:
    Scores `[B, N]` and tokens `[B, N, T]`.
  """
  num_decodes = state.finished_scores.shape[1]
  old = jnp.arange(num_decodes)
  old = jnp.broadcast_to(old, state.finished_scores.shape)
  # Rows of finished and live outputs put together, [B, 2N, T].
  sources = jnp.concatenate([old, num_decodes + found.parents], axis=1)
  rows = jnp.concatenate([state.finished_tokens, state.live_tokens], axis=1)
  last = jnp.concatenate([jnp.zeros_like(old), found.tokens], axis=1)
  # Empty slots come first, and are preferred to candidates that do not end.
  best, order = _best(
    jnp.concatenate([state.finished_scores, scores], axis=1), num_decodes
  )
  sources, last = _pick((sources, last), order)
  return best, _write(_pick(rows, sources), last, state.position)


def _result(state: BeamState) -> BeamResult:
  """Returns the finished outputs, or the live ones of prompts without any."""
  none = ~jnp.any(state.finished_scores != -jnp.inf, axis=1)  # [B]
  scores = jnp.where(none[:, None], state.live_log_probs, state.finished_scores)
  tokens = jnp.where(
    none[:, None, None], state.live_tokens, state.finished_tokens
  )
  is_empty = scores == -jnp.inf
  return BeamResult(
    jnp.where(is_empty[:, :, None], 0, tokens),
    jnp.where(is_empty, IMPOSSIBLE, scores),
  )


def _best(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Returns the largest `count` of `[B, M]`, ascending, and their indices.

  Of equal values the first is preferred and comes last.
  """
  best, order = lax.top_k(values, count)
  return best[:, ::-1], order[:, ::-1]


def _pick(tree: types.PyTree, order: jax.Array) -> types.PyTree:
  """Takes entries `order` `[B, N]` of axis 1 of arrays `[B, M, ...]`."""
  return jax.tree.map(lambda x: _take(x, order, 1), tree)


def _take(array: jax.Array, order: jax.Array, axis: int) -> jax.Array:
  """Takes `order` `[B, N]` of `axis`, which follows the axis of size B."""
  batch_axis = axis - 1
  # A batched gather, which a mesh splits over the batch without communication.
  take = functools.partial(jnp.take, axis=batch_axis, mode="clip")
  return jax.vmap(take, (batch_axis, 0), batch_axis)(array, order)


def _write(tokens: jax.Array, column: jax.Array, position: jax.Array):
  """Returns `tokens` `[B, N, T]` with `column` `[B, N]` at `position`."""
  return lax.dynamic_update_slice_in_dim(
    tokens, column[:, :, None], position, axis=2
  )


def _reorder(new, old, row_axes, parents):
  """Returns the cache `new` with its rows taken from `parents` `[B, N]`."""
  batch_size, num_decodes = parents.shape

  def reorder(leaf, before, axis):
    # A leaf that the step returns unchanged, such as cross-attention's keys, is
    # equal in all rows of a prompt and need not be copied.
    if leaf is before:
      return leaf
    leaf = lax.stop_gradient(leaf)
    if axis < 0 or num_decodes == 1:
      return leaf
    shape = leaf.shape
    split = (*shape[:axis], batch_size, num_decodes, *shape[axis + 1 :])
    return _take(leaf.reshape(split), parents, axis + 1).reshape(shape)

  return jax.tree.map(reorder, new, old, row_axes)


def _checked_row_axes(cache, row_axes, batch_size, num_decodes):
  """Returns `row_axes` or their default, checked against the cache."""
  rows = batch_size * num_decodes
  if row_axes is None:
    # With one output per prompt no row moves, wherever rows are.
    default = 0 if num_decodes > 1 else -1
    row_axes = jax.tree.map(lambda x: default if jnp.ndim(x) else -1, cache)

  def check(path, leaf, axis):
    if axis >= 0 and (axis >= jnp.ndim(leaf) or leaf.shape[axis] != rows):
      raise ValueError(
        f"expected {rows} rows on axis {axis} of the cache's"
        f" {jax.tree_util.keystr(path)}, got the shape {jnp.shape(leaf)};"
        " set row_axes, batch_size or num_decodes"
      )

  jax.tree_util.tree_map_with_path(check, cache, row_axes)
  return row_axes


def _slots(name, rows, slots, default):
  """Returns one number per row, or the default, as int32 `[B, N]`."""
  if rows is None:
    return jnp.full(slots, default, jnp.int32)
  number = math.prod(slots)
  if rows.shape != (number,):
    raise ValueError(
      f"expected {name} of shape [{number}], got {list(rows.shape)};"
      f" set {name} or batch_size"
    )
  return rows.astype(jnp.int32).reshape(slots)


def _check_settings(max_decode_length, num_decodes, alpha):
  if max_decode_length < 1:
    raise ValueError(
      f"expected a decode length of at least 1, got {max_decode_length};"
      " set max_decode_length"
    )
  if num_decodes < 1:
    raise ValueError(
      f"expected at least 1 decode, got {num_decodes}; set num_decodes"
    )
  if not isinstance(alpha, jax.Array) and not math.isfinite(alpha):
    raise ValueError(f"expected a finite alpha, got {alpha}; set alpha")
