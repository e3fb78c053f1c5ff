"""Caches with N rows per prompt, and calls of a decode function.

A decode function (`types.DecodeFn`) is `sampling.sample`, `beams.beam_search` or
a user's own. A model makes the cache of B prompts, repeats each row N times, and
calls `decode`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import checks, types


def row_axes(make: Callable[[int], types.PyTree]) -> types.PyTree:
  """Returns the batch axis of each leaf of a cache, found from its shapes.

  >>> row_axes(lambda n: {"keys": jnp.zeros((3, 2 * n)), "index": jnp.int32(0)})
  {'index': -1, 'keys': 1}

  Args:
    make: returns the cache with N rows per prompt, given N; only traced.

  Returns:
    A tree with the cache's structure: the axis that grows with N, -1 for a leaf
    without one.
  """
  few, many = (jax.eval_shape(lambda n=n: make(n)) for n in (1, 2))

  def axis(a, b):
    grown = [i for i, n in enumerate(a.shape) if n != b.shape[i]]
    return grown[0] if grown else -1

  return jax.tree.map(axis, few, many)


def repeat_rows(
  tree: types.PyTree, num_decodes: int, axes: types.PyTree | None = None
) -> types.PyTree:
  """Repeats each row N times: row b becomes rows b N to b N + N - 1.

  >>> repeat_rows(jnp.array([5, 6]), 2).tolist()
  [5, 5, 6, 6]

  Args:
    tree: arrays.
    num_decodes: N.
    axes: the batch axis of each leaf, from `row_axes`; None for axis 0.
  """
  if num_decodes == 1:
    return tree
  if axes is None:
    axes = jax.tree.map(lambda _: 0, tree)

  def repeat(x, axis):
    if axis < 0:
      return x
    shape = (*x.shape[: axis + 1], num_decodes, *x.shape[axis + 1 :])
    rows = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
    return rows.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

  return jax.tree.map(repeat, tree, axes)


def decode(
  decode_fn: types.DecodeFn,
  tokens_to_logits: types.TokensToLogits,
  cache: types.PyTree,
  key: jax.Array | None,
  *,
  batch_size: int,
  num_decodes: int,
  options: Mapping[str, Any],
  **settings: Any,
) -> tuple[jax.Array, jax.Array]:
  """Calls a decode function and sorts its outputs by score, ascending.

  Args:
    decode_fn: see `types.DecodeFn`.
    tokens_to_logits: of B N rows.
    cache: of B N rows.
    key: random key, or None.
    batch_size: B.
    num_decodes: N.
    options: arguments of this decode function alone.
    **settings: `max_decode_length`, `eos_id` and `row_axes`.

  Returns:
    Tokens `[B, N, T]` and scores `[B, N]`, the best last. A sample's score is its
    log-prob, in nats.

  Raises:
    ValueError: the decode function does not take one of the options.
  """
  _check_options(decode_fn, options)
  tokens, scores = decode_fn(
    tokens_to_logits,
    cache,
    key,
    batch_size=batch_size,
    num_decodes=num_decodes,
    **settings,
    **options,
  )
  if tokens.ndim == 3:
    return tokens, scores
  scores = jnp.sum(scores, axis=-1).reshape(batch_size, num_decodes)
  tokens = tokens.reshape(batch_size, num_decodes, -1)
  order = jnp.argsort(scores, axis=1)
  return (
    jnp.take_along_axis(tokens, order[:, :, None], axis=1),
    jnp.take_along_axis(scores, order, axis=1),
  )


def check_options(
  options: Mapping[str, Any] | None, decode_fn: types.DecodeFn | None = None
) -> None:
  """Checks a decode function and its options, as far as they are there.

  Args:
    options: of `sampling.sample`, `beams.beam_search` or another.
    decode_fn: the function.

  Raises:
    ValueError: it is no function, or an option is out of its range.
  """
  if decode_fn is not None and not callable(decode_fn):
    checks.refuse(
      "a decode function such as @decoding.beam_search, or None",
      decode_fn,
      "DECODE_FN",
    )
  if not isinstance(options := options or {}, Mapping):
    checks.refuse(
      "options such as {'num_decodes': 4}, or None", options, "DECODER_PARAMS"
    )
  known = {
    "temperature": lambda x: checks.number(
      x, "SAMPLING_TEMPERATURE", least=0, what="a temperature"
    ),
    "top_k": lambda x: checks.whole(x, "SAMPLING_TOP_K", least=0),
    "top_p": lambda x: checks.number(x, "SAMPLING_TOP_P", above=0, most=1),
    "slots": lambda x: checks.whole(x, "DECODE_SLOTS", none=True),
    "num_decodes": lambda x: checks.whole(x, "DECODER_PARAMS"),
    "alpha": lambda x: checks.number(x, "DECODER_PARAMS", what="an alpha"),
  }
  for name in known.keys() & options.keys():
    known[name](options[name])


def _check_options(decode_fn, options):
  parameters = inspect.signature(decode_fn).parameters
  if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return
  unknown = sorted(set(options) - set(parameters))
  if unknown:
    function = getattr(decode_fn, "func", decode_fn)  # of a functools.partial
    name = getattr(function, "__name__", function)
    raise ValueError(
      f"expected options of the decode function {name}, got"
      f" {', '.join(unknown)}; set DECODE_FN or DECODER_PARAMS"
    )
