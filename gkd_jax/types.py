"""The dimension key, and the types that modules agree on.

Shapes in docstrings, in trailing comments and in the suffixes of local names
use these letters, everywhere in the package:

  | letter | meaning                                             |
  |--------|-----------------------------------------------------|
  | `B`    | batch: rows of one (micro)batch, over all devices   |
  | `N`    | samples or beams per prompt                         |
  | `S`    | encoder length, in tokens                           |
  | `T`    | decoder length, in tokens                           |
  | `V`    | vocabulary, padding to a round size included        |
  | `D`    | width of the residual stream (`emb_dim`)            |
  | `H`    | attention heads                                     |
  | `K`    | width of one head (`head_dim`)                      |
  | `F`    | width of the MLP's hidden layer (`mlp_dim`)         |

`[...]` stands for any leading dimensions, `[]` for a scalar. p is the teacher
and q the student, in that order in every signature.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax

PyTree = Any
"""Nested containers of arrays: parameters, a KV cache, an optimizer state."""

Batch = Mapping[str, jax.Array]
"""Feature name (T5X's, e.g. `decoder_target_tokens`) to an array `[B, ...]`."""

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name to `(sum, weight)`, both `[]` float32: sums add up over microbatches,
devices and steps, and are divided by the summed weight once, at the end."""


class TokensToLogits(Protocol):
  """One step of incremental decoding."""

  def __call__(
    self, tokens: jax.Array, cache: PyTree, /
  ) -> tuple[jax.Array, PyTree]:
    """Reads one token per row and scores the next one.

    Args:
      tokens: `[B]` int32, the token of each row at the current position.
      cache: what the model keeps between steps, positions included; any tree.

    Returns:
      `(logits, cache)`: `[B, V]` logits of the next token in any float type,
      and the cache after this step, with the same shapes and types.
    """
    ...


class DecodeFn(Protocol):
  """What `sampling.sample` and `beam_search.beam_search` have in common."""

  def __call__(
    self,
    tokens_to_logits: TokensToLogits,
    cache: PyTree,
    key: jax.Array | None,
    /,
    *,
    batch_size: int,
    max_decode_length: int,
    num_decodes: int,
    eos_id: int,
    row_axes: PyTree | None,
    **options: Any,
  ) -> tuple[jax.Array, jax.Array]:
    """Decodes N outputs for each of B prompts.

    Args:
      tokens_to_logits: of B N rows; row b N + n is prompt b's n-th.
      cache: the model's state before the first token, of B N rows; those of one
        prompt are equal.
      key: random key, None where nothing is drawn.
      batch_size: B.
      max_decode_length: T, EOS included.
      num_decodes: N.
      eos_id: the token that ends an output.
      row_axes: tree of the cache's structure: the axis of each leaf's rows, -1
        for a leaf without rows; None where nothing moves rows.
      **options: the decode function's own.

    Returns:
      Tokens `[B, N, T]` and scores `[B, N]` in ascending order; or, as `sample`
      does, tokens and their log-probs in nats, `[B N, T]` each.
    """
    ...


class Divergence(Protocol):
  """A divergence D(p ‖ q) between two next-token laws, position by position."""

  def __call__(
    self, teacher_log_probs: jax.Array, student_log_probs: jax.Array, /
  ) -> jax.Array:
    """Measures how far the student's law is from the teacher's.

    Args:
      teacher_log_probs: `[..., V]` log p, normalised, in nats.
      student_log_probs: `[..., V]` log q, normalised, in nats.

    Returns:
      `[...]` float32, nats per position.
    """
    ...


class Schedule(Protocol):
  """A number that depends on the training step."""

  def __call__(self, step: int | jax.Array, /) -> Any:
    """Returns the value at `step`, a float32 scalar.

    Args:
      step: `[]` updates made so far; a Python integer on the host, or a traced
        integer in a compiled step.
    """
    ...
