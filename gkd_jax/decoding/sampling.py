"""Sampling from a model's next-token distribution.

The loop over tokens is in `loops`; it does not know the model.

Each row has its own stream of random numbers: row r at position t uses
`fold_in(fold_in(key, row_ids[r]), t)`. A row's sample therefore does not depend
on its place in the batch, on the other rows, or on the mesh.

`sample` has no gradient (paper, section 3: no backpropagation through sampling).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gkd_jax import kernels, types
from gkd_jax.decoding import distributions, loops

# Tokens per group in `_two_stage_categorical`. Vocabularies are padded to multiples.
_MEMBERS = 128


class SampleResult(NamedTuple):
  """Sampled tokens and their log-probs.

  Attributes:
    tokens: `[B, T]` int32, EOS included, zeros after it; `[B N, T]` for N
      samples per prompt.
    log_probs: of the same shape, float32, nats per token, under the distribution
      that the token was drawn from; 0 after EOS.
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
  eos_id: int | Sequence[int] = 1,
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

  The distribution of the next token is `softmax(sampling_logits(...))`: suppressed
  tokens are removed, the temperature is applied, then top-k, then top-p, and the
  rest is renormalized. By default it is the model's own. Temperature 0 takes the
  most likely token (the lowest id of equal ones) and needs no key.

  Args:
    tokens_to_logits: `(tokens [B], cache) -> (logits [B, V], cache)`.
    cache: the model's state before the first token; any tree of arrays.
    key: `[]` random key, typed or raw; may be None at temperature 0.
    batch_size: B.
    max_decode_length: T, EOS included. A row without EOS by then is cut.
    temperature: `[]`. A Python or numpy number is part of the program; an array
      may change without recompiling. An array below float32's smallest normal
      number, 0 included, acts as that number: greedy, but exact ties are drawn
      evenly; a negative one gives NaN log-probs.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches
      this, at least one token; 1.0 keeps all.
    eos_id: the token that ends a row, or several; -1 never ends one.
    start_tokens: `[B]` int32 fed first; 0, T5's start token, by default.
    row_lengths: `[B]` integer, T of each row; `max_decode_length` by default.
    row_ids: `[B]` integer, names each row's random stream; `arange(B)` by
      default. In a microbatch, pass the rows' places in the whole batch.
    active: `[B]` bool. Rows that are False count as ended from the start: they
      stay zero, and no step is run for them.
    suppress_ids: tokens that are never produced. On-policy training suppresses
      PAD, which is no text.
    num_decodes: N, samples per prompt. The model then has B N rows, of which
      b N to b N + N - 1 are prompt b's, and every `[B]` here means `[B N]`.
    slots: number of rows to decode at a time: one that has ended gives its slot
      to the next, see `loops.decode_with_slots`. The samples are the same. None
      decodes all rows at once.
    row_axes: batch axes of the cache, read with `slots`; see `types.DecodeFn`.

  Returns:
    Tokens and log-probs, `[B, T]` each. At temperature 0 the log-probs are the
    model's at temperature 1, without filters, suppressed tokens removed.

  Raises:
    ValueError: a setting is out of range, a shape is not `[B]`, or the key is
      None at a temperature above 0.
  """
  _check_settings(key, max_decode_length, temperature, top_k, top_p)
  _check_slots(slots, row_axes)
  if distributions.is_static(temperature) and temperature == 0:
    key, temperature, top_k, top_p = None, 1.0, 0, 1.0

  def draw(logits, row_keys, position):
    logits = distributions.sampling_logits(
      logits,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      suppress_ids=suppress_ids,
    )
    return _draw(logits, row_keys, position)

  decode = loops.decode_rows
  if slots is not None:
    decode = functools.partial(
      loops.decode_with_slots, slots=slots, row_axes=row_axes
    )
  tokens, log_probs, *_ = decode(
    tokens_to_logits,
    lax.stop_gradient(cache),
    draw,
    max_decode_length=max_decode_length,
    eos_id=eos_id,
    **_per_row(
      batch_size * num_decodes,
      max_decode_length,
      key,
      start_tokens=start_tokens,
      row_lengths=row_lengths,
      row_ids=row_ids,
      active=active,
    ),
  )
  return SampleResult(tokens, log_probs)


def sequence_weights(
  tokens: jax.Array,
  eos_id: int | Sequence[int] = 1,
  active: jax.Array | None = None,
  row_lengths: jax.Array | None = None,
) -> jax.Array:
  """Returns 1 up to and including a row's first EOS, and 0 after it.

  A row without EOS was cut and has weight 1 in all of its room.

  >>> sequence_weights(jnp.array([[7, 5, 1, 0], [7, 5, 3, 2]])).tolist()
  [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]

  Args:
    tokens: `[B, T]` int32, as sampled.
    eos_id: as given to `sample`, as the next two.
    active: `[B]` bool; rows that are False get 0.
    row_lengths: `[B]` integer.

  Returns:
    `[B, T]` float32.
  """
  is_eos = loops.is_eos(tokens, eos_id).astype(jnp.int32)
  eos_before = jnp.cumsum(is_eos, axis=-1) - is_eos
  weights = (eos_before == 0).astype(jnp.float32)
  if active is not None:
    weights = weights * active.astype(jnp.float32)[:, None]
  if row_lengths is not None:
    weights *= jnp.arange(tokens.shape[-1])[None] < row_lengths[:, None]
  return weights


def shift_right(tokens: jax.Array, start: int = 0) -> jax.Array:
  """Returns the decoder inputs of these targets: `start`, then all but the last.

  >>> shift_right(jnp.array([[7, 5, 1, 0]])).tolist()
  [[0, 7, 5, 1]]

  Args:
    tokens: `[B, T]` int32 targets.
    start: what the decoder reads first.

  Returns:
    `[B, T]` int32.
  """
  return jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=start)[:, :-1]


def _check_settings(key, max_decode_length, temperature, top_k, top_p):
  if max_decode_length < 1:
    raise ValueError(
      f"expected a decode length of at least 1, got {max_decode_length}; "
      "set max_decode_length"
    )
  if distributions.is_static(temperature) and not temperature >= 0:
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
  is_greedy = distributions.is_static(temperature) and temperature == 0
  if key is None and not is_greedy:
    raise ValueError(
      f"expected a random key at temperature {temperature}, got None; set key"
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


def _per_row(
  rows, max_decode_length, key, *, start_tokens, row_lengths, row_ids, active
) -> dict[str, Any]:
  """Returns the loops' arguments with a value per row, defaults filled in."""

  def filled(name, array, default):
    if array is None:
      return default
    if array.shape != (rows,):
      raise ValueError(
        f"expected {name} of shape [{rows}], got "
        f"{list(array.shape)}; set {name} or batch_size"
      )
    return array

  full = functools.partial(jnp.full, rows)
  start_tokens = filled("start_tokens", start_tokens, full(0))
  row_ids = filled("row_ids", row_ids, jnp.arange(rows))
  active = filled("active", active, full(True))
  row_lengths = filled("row_lengths", row_lengths, full(max_decode_length))
  return {
    "row_keys": None if key is None else row_keys(key, row_ids),
    "start_tokens": start_tokens.astype(jnp.int32),
    "row_lengths": row_lengths,
    "active": active.astype(bool) & (row_lengths >= 1),
  }


def row_keys(key: jax.Array, row_ids: jax.Array) -> jax.Array:
  """Returns a random key per row, which does not depend on the other rows.

  Args:
    key: of any kind.
    row_ids: `[B]` integer.

  Returns:
    `[B]` threefry keys.
  """
  if jax.random.key_impl(key) != "threefry2x32":
    # Under vmap the hardware generators draw the whole batch from the first key,
    # and a row's sample would depend on the other rows.
    data = jax.random.key_data(key)
    key = jax.random.wrap_key_data(data[:2], impl="threefry2x32")
    for word in data[2:]:
      key = jax.random.fold_in(key, word)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)


def _draw(logits, row_keys, position):
  """Samples from the softmax of `[B, V]` logits; takes the argmax without keys.

  Args:
    logits: `[B, V]`, from `sampling_logits`.
    row_keys: `[B]` keys, or None.
    position: `[]`, or `[B]` where rows are at different positions.

  Returns:
    `(tokens, log_probs)`, `[B]` int32 and `[B]` float32.
  """
  if row_keys is None:
    tokens = kernels.argmax(logits)
    drawn = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, drawn - jax.nn.logsumexp(logits, axis=-1)
  position = jnp.broadcast_to(position, row_keys.shape[:1])
  keys = jax.vmap(jax.random.fold_in)(row_keys, position)
  return _two_stage_categorical(logits, keys)


def _two_stage_categorical(logits, keys):
  """Samples a group of tokens, then a token within it.

  The distribution is that of one draw among V tokens, with V / 128 + 128 random
  numbers in place of V. Both stages add Gumbel noise and take the maximum, so that
  logits that differ by rounding, as they do from mesh to mesh, almost always give
  the same token. A group holds the ids with one remainder: a vocabulary is sharded
  in ranges of ids, and a CPU sums columns faster than rows. A vocabulary of up to
  128 tokens is one group.

  Args:
    logits: `[B, V]` with maximum 0.
    keys: `[B]`.

  Returns:
    As `_draw`.
  """
  vocab_size = logits.shape[-1]
  members = min(_MEMBERS, vocab_size)
  groups = -(-vocab_size // members)
  numbers = members + (groups if groups > 1 else 0)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, (numbers,)))(keys)

  unused = ((0, 0), (0, members * groups - vocab_size))
  logits = jnp.pad(logits, unused, constant_values=-jnp.inf)
  logits = logits.reshape(-1, members, groups)
  mass = jnp.sum(jnp.exp(logits), axis=1)
  group = jnp.zeros((logits.shape[0], 1), jnp.int32)
  if groups > 1:
    scores = jnp.log(mass) + noise[:, members:]
    group = kernels.argmax(scores)[:, None]
  logits = jnp.take_along_axis(logits, group[:, None], axis=2)[:, :, 0]
  member = kernels.argmax(logits + noise[:, :members])[:, None]
  drawn = jnp.take_along_axis(logits, member, axis=1)[:, 0]
  log_probs = drawn - jnp.log(jnp.sum(mass, axis=-1))
  return (member * groups + group)[:, 0], log_probs
