"""Outputs that are drawn one update before they are trained on.

By default sampling is a part of the training step. With `GKDModel.sample_ahead`
it is a program of its own, which the host starts before it starts an update, and
whose outputs the update after that one trains on. They are therefore those of a
student one update older (of the first step, of this one), and `importance` weighs
them.

When the host asks for outputs the devices still have an update to do: the host's
work between two steps falls beside it. The update itself begins when the sampler
has read the parameters, since it puts the new ones in their place.
"""

import os
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from gkd_jax import models, partitioning, types
from gkd_jax.models import importance
from gkd_jax.training import trainer

_FILE = "drawn_ahead.npz"


class Ahead:
  """A run's batches, those of on-policy steps with outputs drawn ahead.

  A batch that is drawn and not yet trained on is part of the position: the
  parameters that drew it are gone when a run is resumed.

  Args:
    iterator: the data's batches, a `checkpoints.SavableIterator`.
    model: `GKDModel`.
    seed: of the run.
    mesh: see `partitioning.make_mesh`.
  """

  def __init__(self, iterator: Any, model: Any, *, seed: int, mesh: Any):
    self._iterator, self._model = iterator, model
    self._seed, self._mesh = seed, mesh
    self._draw = sampler(model, mesh)
    self._drawn: types.Batch | None = None  # of the next step, on the devices

  def next(self, step: int, params: Any) -> dict[str, np.ndarray]:
    """This process's rows for a step; starts to draw those of the next one.

    Waits for the outputs of this step alone, which were begun a step ago.

    Args:
      step: updates made so far.
      params: the student's after them.
    """
    drawn, batch = self._drawn, None
    if drawn is None:
      if self._samples(step):  # nothing was drawn before a run's first step
        drawn = self._start(step, params)
      else:
        batch = next(self._iterator)
    self._drawn = None
    if self._samples(step + 1):
      self._drawn = self._start(step + 1, params)
    if batch is None:
      batch = jax.tree.map(partitioning.local_rows, drawn)
    return batch

  def _samples(self, step):
    source = trainer.source_of_step(self._model, self._seed, step)
    return source == models.STUDENT

  def _start(self, step, params):
    """The data's next batch with a step's outputs; does not wait for them."""
    placed = partitioning.put_batch(next(self._iterator), self._mesh)
    key = jax.random.fold_in(jax.random.key(self._seed), step)
    return self._draw(params, placed, key)

  def save_state(self, path: str | os.PathLike[str]) -> None:
    """Writes the position into the folder `path`; all processes have to call.

    Waits for what is being drawn.
    """
    self._iterator.save_state(path)
    if self._drawn is None:
      return
    drawn = self._drawn
    if jax.process_count() > 1:
      drawn = multihost_utils.process_allgather(drawn, tiled=True)
    if jax.process_index() == 0:
      with (epath.Path(path) / _FILE).open("wb") as file:
        np.savez(file, **jax.tree.map(np.asarray, drawn))

  def restore_state(self, path: str | os.PathLike[str]) -> None:
    """Goes to the position that `save_state` wrote.

    A run that began without sampling ahead draws its next outputs freshly.
    """
    self._iterator.restore_state(path)
    self._drawn = None
    file = epath.Path(path) / _FILE
    if not file.exists():
      return
    sharding = partitioning.batch_sharding(self._mesh)
    with file.open("rb") as opened, np.load(opened) as arrays:
      self._drawn = {
        name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
        for name, x in arrays.items()
      }


def sampler(model: Any, mesh: Any) -> Any:
  """`importance.draw` of a model under jit, rows over the data axis."""
  return partitioning.jit(
    lambda *args: importance.draw(model, *args),
    mesh,
    out_shardings=partitioning.batch_sharding(mesh),
  )


def check_none(path: str | os.PathLike[str]) -> None:
  """Raises a ValueError if a position holds a batch that was drawn ahead."""
  if (epath.Path(path) / _FILE).exists():
    raise ValueError(
      "expected a checkpoint without outputs that were drawn ahead, got some in"
      f" {path}; set SAMPLE_AHEAD = True as the run began, or another MODEL_DIR"
    )
