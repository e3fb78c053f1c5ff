"""The dimension key, and the types that modules agree on.

Shapes in docstrings, in trailing comments and in the suffixes of local names
use these letters, everywhere in the package:

  | letter | meaning                                             |
  |--------|-----------------------------------------------------|
  | `B`    | batch: rows of one (micro)batch, over all devices   |
  | `N`    | samples drawn per prompt                            |
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
