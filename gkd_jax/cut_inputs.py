"""Batches whose encoder inputs are no longer than they need to be.

The host cuts each batch to one of a few lengths, and jit compiles a program for
each length that comes up: at most one more than there are buckets.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gkd_jax import buckets

_INPUTS = "encoder_input_tokens"


class CutInputs:
  """Batches of an iterator, inputs cut to the shortest bucket that holds them all.

  Losses are those of uncut batches to rounding, but for dropout on the weights of
  the encoder's self-attention and of cross-attention: its masks have the length of
  the inputs, and so other numbers of the same law. What is cut depends on the
  batch alone: the position is the iterator's, and a resumed run goes on bit for
  bit. With several processes all cut alike: each batch, they exchange a number,
  for which the host waits until the devices are done with the step before.

  Args:
    iterator: a `checkpoints.SavableIterator` of batches.
    lengths: ascending; a batch whose longest row exceeds all is left as it is.
    features: name to length of the batches' features, `data.feature_lengths`.

  Raises:
    ValueError: lengths that do not ascend, packed batches, or batches without
      encoder inputs.
  """

  def __init__(
    self, iterator: Any, lengths: Sequence[int], features: Mapping[str, int]
  ):
    buckets.check(lengths, "INPUT_BUCKETS")
    if _INPUTS not in features:
      raise ValueError(
        f"expected batches with {_INPUTS}, got {', '.join(sorted(features))};"
        " set INPUT_BUCKETS = None"
      )
    if "encoder_segment_ids" in features:
      raise ValueError(
        "expected unpacked batches with INPUT_BUCKETS, got packed ones;"
        " set PACK = False or INPUT_BUCKETS = None"
      )
    self._iterator = iterator
    self._lengths = buckets.lengths(lengths, features[_INPUTS])

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self._iterator)
    place = np.searchsorted(self._lengths, _longest(batch[_INPUTS]))
    if jax.process_count() > 1:
      place = np.max(multihost_utils.process_allgather(place))
    cut = batch[_INPUTS][:, : self._lengths[int(place)]]
    return batch | {_INPUTS: cut}

  def save_state(self, path: str | os.PathLike[str]) -> None:
    """Writes the iterator's position into `path`."""
    self._iterator.save_state(path)

  def restore_state(self, path: str | os.PathLike[str]) -> None:
    """Goes to the position that `save_state` wrote."""
    self._iterator.restore_state(path)


def _longest(tokens):
  """Positions up to the last token of any row of `[B, S]`; 0 without a token."""
  used = np.flatnonzero(tokens.any(axis=0))
  return used[-1] + 1 if used.size else 0
