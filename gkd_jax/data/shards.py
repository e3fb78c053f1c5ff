"""Which shards of the data each process reads, for any number of processes.

A batch of B rows is n blocks of B / n, one from each of n shards of the data, in
order. n is fixed for a run; a process reads the rows that its devices hold. The
batches of a run therefore do not depend on the number of processes, and a run can
be resumed with another one. A shard whose rows belong to several processes is
read by each of them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Share(NamedTuple):
  """The shards and rows that one process reads.

  Attributes:
    count: n, shards of the data in all.
    shards: numbers of those that the process reads, ascending.
    owned: of these, those whose position it saves; no two processes own one.
    rows: its rows among the concatenated rows of `shards`.
  """

  count: int
  shards: tuple[int, ...]
  owned: tuple[int, ...]
  rows: np.ndarray


def rows_of_processes(
  process_grid: np.ndarray, batch_size: int
) -> dict[int, np.ndarray]:
  """Returns the rows of a batch that each process's devices hold, ascending.

  Two processes that take turns along the data axis, and share a model axis:

  >>> rows_of_processes(np.array([[0, 0], [1, 1], [0, 0], [1, 1]]), 8)
  {0: array([0, 1, 4, 5]), 1: array([2, 3, 6, 7])}

  Args:
    process_grid: see `partitioning.process_grid`.
    batch_size: rows of all processes together, a multiple of the data axis.
  """
  rows = np.arange(batch_size).reshape(len(process_grid), -1)
  return {
    int(p): rows[(process_grid == p).any(axis=1)].ravel()
    for p in np.unique(process_grid)
  }


def folder(shard: int, n: int) -> str:
  """Returns the name of the folder with a shard's position."""
  return f"shard_{shard}-of-{n}"


def share(
  process_rows: Mapping[int, np.ndarray], process: int, batch_size: int, n: int
) -> Share:
  """Returns what `process` reads of `n` shards.

  Two processes of four rows each read half of the four shards:

  >>> share({0: np.arange(4), 1: np.arange(4, 8)}, 1, batch_size=8, n=4)
  Share(count=4, shards=(2, 3), owned=(2, 3), rows=array([0, 1, 2, 3]))

  Args:
    process_rows: see `rows_of_processes`.
    process: its number.
    batch_size: rows of all processes together, a multiple of n.
    n: shards of the data.
  """
  size = batch_size // n
  shards = np.unique(process_rows[process] // size)
  before = [rows // size for p, rows in process_rows.items() if p < process]
  owned = np.setdiff1d(shards, np.concatenate([[-1], *before]))
  places = np.searchsorted(shards, process_rows[process] // size)
  return Share(
    n,
    tuple(int(x) for x in shards),
    tuple(int(x) for x in owned),
    places * size + process_rows[process] % size,
  )


def count(
  given: int | None,
  recorded: int | None,
  batch_size: int,
  process_rows: Mapping[int, np.ndarray],
) -> int:
  """Returns the number of shards: as recorded, as given, or the fewest that serve.

  Args:
    given: DATA_SHARDS.
    recorded: the number in the run's checkpoints, None before the first; see
      `checkpoints.recorded_data_shards`.
    batch_size: rows of all processes together.
    process_rows: see `rows_of_processes`.

  Raises:
    ValueError: the run began with another number, or it does not divide
      `batch_size`.
  """
  if recorded and given not in (None, recorded):
    raise ValueError(
      f"expected DATA_SHARDS = {recorded}, which the run began with, got {given};"
      " set DATA_SHARDS, or another MODEL_DIR"
    )
  n = recorded or given
  if n is None:
    return _default(batch_size, process_rows)
  if n < 1 or batch_size % n:
    raise ValueError(
      f"expected DATA_SHARDS to divide the {batch_size} rows of a batch, got {n};"
      " set DATA_SHARDS or BATCH_SIZE"
    )
  return n


def _default(batch_size, process_rows):
  """Returns the fewest shards such that no process reads rows of another."""
  for n in range(1, batch_size):
    if batch_size % n == 0 and all(
      len(share(process_rows, p, batch_size, n).shards) * batch_size
      == n * len(rows)
      for p, rows in process_rows.items()
    ):
      return n
  return batch_size
