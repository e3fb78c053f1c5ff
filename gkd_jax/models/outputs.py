"""Outputs that the student samples: drawing them, where they end, metrics."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import decoding, types
from gkd_jax.decoding import sampling


def draw(
  step: types.TokensToLogits,
  cache: types.PyTree,
  key: jax.Array,
  batch: types.Batch,
  *,
  eos_id: int | Sequence[int],
  row_lengths: jax.Array | None = None,
  **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Samples outputs of the batch's length; returns as `GKDModel.draw`.

  Args:
    step: scores the next token.
    cache: before the first token.
    key: random key.
    batch: whose targets say B and T.
    eos_id: see `decoding.sample`.
    row_lengths: `[B]`, see `decoding.sample`.
    **options: of `decoding.sample`.
  """
  batch_size, length = batch["decoder_target_tokens"].shape
  tokens, log_probs = decoding.sample(
    step,
    cache,
    key,
    batch_size=batch_size,
    max_decode_length=length,
    eos_id=eos_id,
    row_lengths=row_lengths,
    **options,
  )
  weights = sampling.sequence_weights(tokens, eos_id, row_lengths=row_lengths)
  return tokens, weights, log_probs


def ends(
  tokens: jax.Array,
  eos_id: int | Sequence[int],
  row_lengths: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """Returns where decoded outputs end, and whether with EOS.

  Args:
    tokens: `[B, N, T]` int32, as decoded.
    eos_id: see `decoding.is_eos`.
    row_lengths: `[B N]`, longest output of each row; None: T.

  Returns:
    "lengths" `[B, N]` int32, in tokens, EOS included, and "ended" `[B, N]` bool.
  """
  rows = tokens.reshape(-1, tokens.shape[-1])
  weights = sampling.sequence_weights(rows, eos_id, row_lengths=row_lengths)
  weights = weights.reshape(tokens.shape)
  return {
    "lengths": jnp.sum(weights, axis=-1).astype(jnp.int32),
    "ended": has_eos(tokens, weights, eos_id),
  }


def has_eos(
  tokens: jax.Array, weights: jax.Array, eos_id: int | Sequence[int]
) -> jax.Array:
  """Returns which outputs have ended, bool `[...]`.

  Args:
    tokens: `[..., T]`.
    weights: `[..., T]`, 0 at what does not count.
    eos_id: see `decoding.is_eos`.
  """
  return jnp.any(decoding.is_eos(tokens, eos_id) & (weights > 0), axis=-1)


def check_unpacked(batch: types.Batch) -> None:
  """Raises a ValueError for a packed batch, whose outputs cannot be replaced."""
  if "decoder_segment_ids" in batch:
    raise ValueError(
      "expected unpacked batches for on-policy training, got packed ones;"
      " set PACK = False"
    )


def output_metrics(
  targets: jax.Array, weights: jax.Array, eos_id: int | Sequence[int]
) -> types.Metrics:
  """Returns metrics of a batch whose outputs were all sampled by the student.

  Args:
    targets: `[B, T]` int32.
    weights: `[B, T]`, 1 at the tokens of an output and 0 elsewhere.
    eos_id: see `decoding.is_eos`.

  Returns:
    `sampled_length`, the mean in tokens; `sampled_eos`, the share of outputs that
    ended; and `on_policy_share`, 1. Rows without an output do not count.
  """
  rows = jnp.any(weights > 0, axis=1).astype(jnp.float32)
  ended = has_eos(targets, weights, eos_id)
  number = jnp.sum(rows)
  return {
    "sampled_length": (jnp.sum(weights), number),
    "sampled_eos": (jnp.sum(rows * ended), number),
    "on_policy_share": (number, number),
  }
