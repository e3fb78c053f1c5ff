"""Decoding by sampling: the law of the next token, and what is drawn from it.

The loop over tokens is one of `decode_loops`; it knows nothing of the model.

Randomness belongs to rows, not to the batch: the numbers that decide row r at
position t come from `fold_in(fold_in(key, row_ids[r]), t)`. A row is sampled
alike wherever it stands, with whatever neighbours, on whatever mesh.

No gradient flows through anything here: tokens are drawn, and log-probs are
reported as constants (paper, section 3: no gradient through sampling).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gkd_jax import losses, types
from gkd_jax.decoding import loops

# Tokens of a group, see `_two_stage_categorical`. Vocabularies are padded to multiples of it, so
# that groups need no padding, and it divides over the devices of a model axis.
_MEMBERS = 128


class SampleResult(NamedTuple):
  """What was sampled, and how likely it was.

  Attributes:
    tokens: `[B, T]` int32; the EOS that ends a row is kept, zeros follow it.
    log_probs: `[B, T]` float32, nats per token, under the law that the token
      was drawn from; 0 after EOS. Both are `[B N, T]` for N samples per prompt.
  """

  tokens: jax.Array
  log_probs: jax.Array


def sample(
  tokens_to_logits: types.TokensToLogits,
  cache: types.PyTree,
  key: jax.Array | None,
  *,
  batch_size: int,
  max_decode_length: int,
  temperature: float | jax.Array = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  eos_id: int = 1,
  start_tokens: jax.Array | None = None,
  row_lengths: jax.Array | None = None,
  row_ids: jax.Array | None = None,
  active: jax.Array | None = None,
  suppress_ids: Sequence[int] = (),
  num_decodes: int = 1,
  slots: int | None = None,
  row_axes: types.PyTree | None = None,
) -> SampleResult:
  """Samples one continuation per row.

  The law of the next token is `softmax(sampling_logits(...))`: suppressed
  tokens removed, temperature applied, then top-k, then top-p, renormalised.
  The defaults sample from the model itself. Temperature 0 takes the likeliest
  token (the lowest id of equal ones) and draws no random number.

  Args:
    tokens_to_logits: `(tokens [B], cache) -> (logits [B, V], cache)`.
    cache: the model's state before the first token; any tree of arrays.
    key: `[]` random key, typed or raw; may be None where temperature is 0.
    batch_size: B.
    max_decode_length: T, EOS included. A row without EOS by then is cut.
    temperature: `[]`. A Python or numpy number is part of the program; an array
      may change without recompiling. Below float32's smallest normal number, 0
      included, an array acts as that number: greedy but for exact ties, which
      are drawn evenly. A negative array gives NaN log-probs.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the smallest set of likeliest tokens whose mass reaches this, at
      least one token; 1.0 keeps all.
    eos_id: the token that ends a row; -1 never ends one.
    start_tokens: `[B]` int32 fed first; PAD, T5's start token, by default.
    row_lengths: `[B]` integer, T of each row where some have less room than
      others; a row without EOS by then is cut.
    row_ids: `[B]` integer name of each row's random stream, `arange(B)` by
      default. Give rows of a microbatch their place in the whole batch.
    active: `[B]` bool. Rows that are False count as ended from the start: they
      stay zero, and no step is run for their sake.
    suppress_ids: tokens that are never produced. On-policy training suppresses
      PAD, which could not be told from the zeros after EOS.
    num_decodes: N, samples per prompt. The model then has B N rows, of which
      b N to b N + N - 1 are prompt b's, and every `[B]` here means `[B N]`.
    slots: decode so many rows at a time, and give the place of one that has
      ended to the next, see `loops.decode_with_slots`: the samples are those of all rows
      together. None, or as many as there are rows: all together.
    row_axes: of `slots`, see `types.DecodeFn`.

  Returns:
    Tokens and log-probs, `[B, T]` each. Under temperature 0 log-probs are the
    model's at temperature 1, without filters, suppressed tokens removed.

  Raises:
    ValueError: if a setting is outside its range, a shape is not `[B]`, or the
      key that a temperature above 0 needs is None.
  """
  _check_settings(max_decode_length, temperature, top_k, top_p)
  _check_slots(slots, row_axes)
  greedy = _is_static(temperature) and temperature == 0
  if key is None and not greedy:
    raise ValueError(
      f"expected a random key at temperature {temperature}, got None; set key"
    )
  rows = batch_size * num_decodes
  start_tokens, row_ids, active = _per_row(rows, start_tokens, row_ids, active)
  row_keys = None if greedy else _fold_in_rows(key, row_ids)
  law = functools.partial(sampling_logits, suppress_ids=suppress_ids)
  if not greedy:
    law = functools.partial(
      law, temperature=temperature, top_k=top_k, top_p=top_p
    )

  if row_lengths is None:
    row_lengths = jnp.full(rows, max_decode_length)
  _check_rows("row_lengths", row_lengths, rows)
  active &= row_lengths >= 1
  settings: dict[str, Any] = {
    "row_keys": row_keys,
    "start_tokens": start_tokens,
    "row_lengths": row_lengths,
    "active": active,
    "max_decode_length": max_decode_length,
    "eos_id": eos_id,
  }
  arguments = (
    tokens_to_logits,
    lax.stop_gradient(cache),
    lambda logits, keys, position: _draw(law(logits), keys, position),
  )
  if slots is None:
    return SampleResult(*loops.decode_rows(*arguments, **settings))
  settings |= {"slots": slots, "row_axes": row_axes}
  done = loops.decode_with_slots(*arguments, **settings)
  return SampleResult(done.tokens, done.log_probs)


def sampling_logits(
  logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  suppress_ids: Sequence[int] = (),
) -> jax.Array:
  """Returns the logits of the law that `sample` draws from.

  Args:
    logits: `[..., V]` in any float type.
    temperature: `[]` above 0, see `sample`.
    top_k: see `filter_logits`.
    top_p: see `filter_logits`.
    suppress_ids: tokens to remove before everything else.

  Returns:
    `[..., V]` float32, -inf where the law is 0; not normalised.

  Raises:
    ValueError: if `suppress_ids` holds an id outside 0..V-1, or all of them.
  """
  logits = logits.astype(jnp.float32)
  if suppress_ids:
    keep = np.ones(logits.shape[-1], bool)
    outside = [i for i in suppress_ids if not 0 <= i < keep.size]
    keep[[i for i in suppress_ids if i not in outside]] = False
    if outside or not keep.any():
      raise ValueError(
        f"expected suppress_ids within 0..{keep.size - 1} and not all of them, "
        f"got {tuple(suppress_ids)}; set suppress_ids"
      )
    keep = keep.reshape((1,) * (logits.ndim - 1) + keep.shape)
    logits = jnp.where(keep, logits, -jnp.inf)
  # With the maximum at 0, a small temperature sends the others to -inf and
  # never to inf - inf.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  smallest = float(jnp.finfo(jnp.float32).tiny)
  if not _is_static(temperature):
    temperature = lax.stop_gradient(temperature).astype(jnp.float32)
    temperature = jnp.where(
      temperature < 0, jnp.nan, jnp.maximum(temperature, smallest)
    )
    logits = logits / temperature
  elif temperature != 1:
    logits = logits / max(float(temperature), smallest)
  return filter_logits(logits, top_k=top_k, top_p=top_p)


def filter_logits(
  logits: jax.Array, *, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
  """Removes unlikely tokens: top-k first, then top-p on what is left.

  Tokens as likely as the least likely kept one are kept too, in both filters,
  so that the result does not depend on the order of the vocabulary; more than
  k tokens can remain.

  >>> law = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
  >>> jnp.isfinite(filter_logits(law, top_k=3)).tolist()
  [True, True, True, False]
  >>> jnp.isfinite(filter_logits(law, top_k=3, top_p=0.7)).tolist()
  [True, True, False, False]

  Args:
    logits: `[..., V]` float32.
    top_k: keep the k largest; 0, or V and above, keeps all.
    top_p: with tokens sorted from the likeliest down, keep each whose
      predecessors' mass is below this (softmax over what top-k left); 1.0 keeps
      all.

  Returns:
    `[..., V]` float32, removed tokens at -inf. Without filters the program
    holds no sort.
  """
  vocab_size = logits.shape[-1]
  count = top_k if 0 < top_k < vocab_size else vocab_size
  if count == vocab_size and top_p == 1:
    return logits
  ranked = lax.top_k(logits, count)[0]  # [..., k] from the largest down
  threshold = ranked[..., -1:]
  if count < vocab_size:
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  if top_p < 1:
    # `ranked` may miss ties of its last entry. They have that entry's value,
    # so they change the normaliser (over `logits`) but not the threshold.
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    mass = jnp.exp(ranked - total)
    mass_before = jnp.cumsum(mass, axis=-1) - mass
    threshold = jnp.min(
      jnp.where(mass_before < top_p, ranked, jnp.inf), axis=-1, keepdims=True
    )
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  return logits


def sequence_weights(
  tokens: jax.Array, eos_id: int = 1, active: jax.Array | None = None
) -> jax.Array:
  """Returns 1 up to and including a row's first EOS, and 0 after it.

  It goes by EOS alone: a row without EOS was cut, and has weight 1 everywhere.
  A PAD before EOS therefore counts; it cannot occur where PAD was suppressed.

  >>> sequence_weights(jnp.array([[7, 5, 1, 0], [7, 5, 3, 2]])).tolist()
  [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]

  Args:
    tokens: `[B, T]` int32, as sampled.
    eos_id: the token that ends a row.
    active: `[B]` bool, as given to `sample`; rows that are False get 0.

  Returns:
    `[B, T]` float32.
  """
  is_eos = (tokens == eos_id).astype(jnp.int32)
  eos_before = jnp.cumsum(is_eos, axis=-1) - is_eos
  weights = (eos_before == 0).astype(jnp.float32)
  if active is not None:
    weights = weights * active.astype(jnp.float32)[:, None]
  return weights


def shift_right(tokens: jax.Array) -> jax.Array:
  """Returns the decoder's inputs for these targets: PAD, then all but the last.

  >>> shift_right(jnp.array([[7, 5, 1, 0]])).tolist()
  [[0, 7, 5, 1]]

  Args:
    tokens: `[B, T]` int32 targets.

  Returns:
    `[B, T]` int32.
  """
  return jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=loops.PAD_ID)[:, :-1]


def _is_static(value) -> bool:
  """Whether a number is known while tracing."""
  return not isinstance(value, jax.Array)


def _check_settings(max_decode_length, temperature, top_k, top_p):
  if max_decode_length < 1:
    raise ValueError(
      f"expected a decode length of at least 1, got {max_decode_length}; "
      "set max_decode_length"
    )
  if _is_static(temperature) and not temperature >= 0:
    raise ValueError(
      f"expected a temperature of at least 0, got {temperature}; "
      "set temperature"
    )
  if top_k < 0:
    raise ValueError(
      f"expected top_k of at least 0, got {top_k}; set top_k (0 keeps all)"
    )
  if not 0 < top_p <= 1:
    raise ValueError(
      f"expected top_p in (0, 1], got {top_p}; set top_p (1.0 keeps all)"
    )


def _check_slots(slots, row_axes):
  if slots is None:
    return
  if slots < 1:
    raise ValueError(
      f"expected at least 1 slot, got {slots}; set DECODE_SLOTS, or None"
    )
  if row_axes is None:
    raise ValueError(
      "expected row_axes with slots, got None; set it to"
      " decoding.row_axes of the cache"
    )


def _per_row(batch_size, start_tokens, row_ids, active):
  """Returns the three `[B]` arguments of `sample`, defaults filled in."""
  if start_tokens is None:
    start_tokens = jnp.full(batch_size, loops.PAD_ID)
  if row_ids is None:
    row_ids = jnp.arange(batch_size)
  if active is None:
    active = jnp.full(batch_size, True)
  for name, array in (
    ("start_tokens", start_tokens),
    ("row_ids", row_ids),
    ("active", active),
  ):
    _check_rows(name, array, batch_size)
  return start_tokens.astype(jnp.int32), row_ids, active.astype(bool)


def _check_rows(name, array, batch_size):
  if array.shape != (batch_size,):
    raise ValueError(
      f"expected {name} of shape [{batch_size}], got "
      f"{list(array.shape)}; set {name} or batch_size"
    )


def _fold_in_rows(key, row_ids):
  """Returns one key per row, `[B]` keys, of the threefry generator."""
  if jax.random.key_impl(key) != "threefry2x32":
    # Under vmap the hardware generators draw the whole batch from the first
    # key, which would tie a row's sample to its neighbours.
    data = jax.random.key_data(key)
    key = jax.random.wrap_key_data(data[:2], impl="threefry2x32")
    for word in data[2:]:
      key = jax.random.fold_in(key, word)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)


def _draw(law, row_keys, position):
  """Draws from the softmax of `law` `[B, V]`; without keys, its argmax.

  `position` is `[]`, or `[B]` where rows are at different ones.

  Returns:
    `(tokens, log_probs)`, `[B]` int32 and `[B]` float32.
  """
  if row_keys is None:
    tokens = losses.argmax(law)
    drawn_law = jnp.take_along_axis(law, tokens[:, None], axis=-1)[:, 0]
    return tokens, drawn_law - jax.nn.logsumexp(law, axis=-1)
  position = jnp.broadcast_to(position, row_keys.shape[:1])
  keys = jax.vmap(jax.random.fold_in)(row_keys, position)
  return _two_stage_categorical(law, keys)


def _two_stage_categorical(law, keys):
  """Draws a group of tokens by its probability, then one of its members.

  The law is that of one draw among all V, with V / 128 + 128 random numbers in
  place of V. Both are drawn by Gumbel's noise: where logits differ by a
  rounding, as they do from one mesh to another, the token is as good as always
  the same. Groups are of equal remainders, since a vocabulary is split over
  devices in ranges of ids, and a CPU sums columns faster than rows. A
  vocabulary of up to 128 is one group.

  Args:
    law: `[B, V]`, at most 0, and 0 somewhere.
    keys: `[B]`.

  Returns:
    As `_draw`.
  """
  vocab_size = law.shape[-1]
  members = min(_MEMBERS, vocab_size)
  groups = -(-vocab_size // members)
  numbers = members + (groups if groups > 1 else 0)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, (numbers,)))(keys)

  unused = ((0, 0), (0, members * groups - vocab_size))
  law = jnp.pad(law, unused, constant_values=-jnp.inf)
  law = law.reshape(-1, members, groups)
  mass = jnp.sum(jnp.exp(law), axis=1)
  group = jnp.zeros((law.shape[0], 1), jnp.int32)
  if groups > 1:
    scores = jnp.log(mass) + noise[:, members:]
    group = losses.argmax(scores)[:, None]
  law = jnp.take_along_axis(law, group[:, None], axis=2)[:, :, 0]
  member = losses.argmax(law + noise[:, :members])[:, None]
  drawn_law = jnp.take_along_axis(law, member, axis=1)[:, 0]
  log_probs = drawn_law - jnp.log(jnp.sum(mass, axis=-1))
  return (member * groups + group)[:, 0], log_probs


def sampling_log_probs(
  logits: jax.Array,
  weights: jax.Array | None = None,
  *,
  num_real_tokens: int | None = None,
  **settings: Any,
) -> jax.Array:
  """The log-probs that a token is drawn by, gradients included.

  The score function of a sample is the gradient of its log-prob under exactly
  this law: temperature, filters and suppressed tokens are part of it.

  Args:
    logits: `[..., V]`, padding of the vocabulary included.
    weights: `[...]`; where it is 0 the logits are not read, and the law is that
      of equal ones.
    num_real_tokens: token ids from here on are never drawn.
    **settings: of `sampling_logits`.

  Returns:
    `[..., V]` float32, nats, -inf at what is never drawn.
  """
  logits = logits.astype(jnp.float32)
  if weights is not None:
    logits = jnp.where(weights[..., None] > 0, logits, 0.0)
  logits = losses.mask_vocab_padding(
    logits, num_real_tokens, fill_value=-jnp.inf
  )
  return jax.nn.log_softmax(sampling_logits(logits, **settings))
