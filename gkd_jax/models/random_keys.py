"""The random keys of a step: dropout, samples, coins."""

from typing import NamedTuple

import jax


def rngs(key: jax.Array | None) -> dict[str, jax.Array]:
  """Returns flax's `rngs` for a dropout key, or none."""
  return {} if key is None else {"dropout": key}


class StepKeys(NamedTuple):
  """The keys of one step: dropout, the student's samples, and the coins of λ."""

  dropout: jax.Array
  sample: jax.Array
  coin: jax.Array


def step_keys(key: jax.Array) -> StepKeys:
  """Splits the key of a step; every model of a run splits it alike."""
  return StepKeys(*jax.random.split(key, 3))


def split_key(key: jax.Array | None) -> tuple:
  """Returns a key for the encoder and one for the decoder; None twice for None."""
  return (None, None) if key is None else tuple(jax.random.split(key))


def dropout_key(
  dropout_rate: float, key: jax.Array, row_ids: jax.Array
) -> jax.Array | None:
  """Returns the dropout key of a microbatch; None without dropout.

  Args:
    dropout_rate: of the model.
    key: of the step.
    row_ids: `[B]`; each microbatch, known by its rows, has masks of its own, and
      so has each device under `pmap`.
  """
  return jax.random.fold_in(key, row_ids[0]) if dropout_rate > 0 else None


def dropout_keys(
  dropout_rate: float, key: jax.Array, row_ids: jax.Array
) -> tuple:
  """Returns `dropout_key` for the encoder and for the decoder."""
  return split_key(dropout_key(dropout_rate, key, row_ids))
