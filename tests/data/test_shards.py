"""The order of the data does not depend on how many processes read it."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from gkd_jax import data
from gkd_jax.data import shards

BATCH = 8
LENGTHS = {"inputs": 4, "targets": 4}


@pytest.fixture(scope="module")
def task():
  """Numbers 2 to 99; each is its own token, input and target."""
  feature = seqio.Feature(seqio.PassThroughVocabulary(200), add_eos=False)
  numbers = lambda split, shuffle_files, seed=None: tf.data.Dataset.range(
    2, 100, output_type=tf.int32
  ).map(lambda i: {"inputs": i[None], "targets": i[None]})
  name = "shards_numbers"
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(numbers, splits=["train"]),
    preprocessors=[],
    output_features={"inputs": feature, "targets": feature},
  )
  yield seqio.TaskRegistry.get(name)
  seqio.TaskRegistry.remove(name)


# The process of each device, [data axis, model axis]. A host of a v5e pod has
# 2x2 chips, which are numbered row by row over the pod: hosts take turns. With a
# long model axis several hosts hold the same rows.
ONE = np.zeros((4, 1), int)
TWO = np.array([[0], [0], [1], [1]])
EIGHT = np.arange(8).reshape(8, 1)
IN_TURNS = np.array([[0, 0], [1, 1], [0, 0], [1, 1]])
SHARED_ROWS = np.array([[0, 1], [2, 2]])


def readers(task, grid, n=4, only=None):
  rows = shards.rows_of_processes(grid, BATCH)
  return {
    p: data.TrainIterator(
      task, LENGTHS, BATCH, seed=3, share=shards.share(rows, p, BATCH, n)
    )
    for p in only or rows
  }


def global_batch(grid, processes):
  """Puts each process's rows where its devices are; all must agree."""
  whole = np.full(BATCH, -1)
  per = BATCH // len(grid)
  for p, iterator in processes.items():
    local = next(iterator)["decoder_target_tokens"][:, 0]
    places = [d for d in range(len(grid)) if p in grid[d]]
    for i, d in enumerate(places):
      rows = local[i * per : (i + 1) * per]
      held = whole[d * per : (d + 1) * per]
      assert np.all((held == -1) | (held == rows))
      whole[d * per : (d + 1) * per] = rows
  return whole


@pytest.fixture(scope="module")
def alone(task, tmp_path_factory):
  """What one process reads of four shards, and its position after batch 8."""
  folder = tmp_path_factory.mktemp("position")
  one = readers(task, ONE)
  batches = [global_batch(ONE, one) for _ in range(8)]
  one[0].save_state(folder)
  return one, folder, [*batches, *(global_batch(ONE, one) for _ in range(6))]


def test_blocks_of_a_batch_are_shards_in_order(alone):
  batches = np.stack(alone[2])
  # seqio gives every fourth of the numbers from 2 on to a shard.
  assert np.all((batches - 2) % 4 == np.repeat(np.arange(4), 2))
  assert not np.all(np.diff(batches[:, 0]) > 0)


@pytest.mark.parametrize(
  "grid, only",
  [
    pytest.param(TWO, None, marks=pytest.mark.nightly),
    pytest.param(IN_TURNS, None, marks=pytest.mark.nightly),
    (SHARED_ROWS, None),
    (EIGHT, (2, 3)),
  ],
  ids=["two", "in turns", "shared rows", "half of a shard"],
)
def test_other_processes_read_the_same_and_go_on(
  task, alone, grid, only, tmp_path
):
  one, folder, expected = alone
  processes = readers(task, grid, only=only)
  read = slice(2, 4) if only else slice(0, BATCH)
  for batch in expected[:3]:
    assert np.array_equal(global_batch(grid, processes)[read], batch[read])
  for iterator in processes.values():
    iterator.save_state(tmp_path)
  for iterator in processes.values():
    iterator.restore_state(folder)
  for batch in expected[8:]:
    assert np.array_equal(global_batch(grid, processes)[read], batch[read])
  names = sorted(p.name for p in tmp_path.glob("shard*"))
  assert names == [f"shard_{s}-of-4" for s in ((1,) if only else range(4))]
  if not only:  # and one process goes on where they stopped
    one[0].restore_state(tmp_path)
    assert np.array_equal(global_batch(ONE, one), expected[3])


PODS = {
  "one": (ONE, 1),
  "two": (TWO, 2),
  "eight": (EIGHT, 8),
  "in turns": (IN_TURNS, 4),
  "shared rows": (SHARED_ROWS, 2),
}


@pytest.mark.parametrize("grid, n", list(PODS.values()), ids=list(PODS))
def test_the_default_lets_no_process_read_what_it_does_not_use(grid, n):
  rows = shards.rows_of_processes(grid, BATCH)
  assert shards.count(None, None, BATCH, rows) == n
  assert shards.count(8, None, BATCH, rows) == 8


def test_each_position_is_saved_once():
  rows = shards.rows_of_processes(SHARED_ROWS, BATCH)
  owned = [shards.share(rows, p, BATCH, 4).owned for p in range(3)]
  assert owned == [(0, 1), (), (2, 3)]


def test_the_number_is_the_one_that_the_run_began_with():
  rows = shards.rows_of_processes(ONE, BATCH)
  assert shards.count(None, 4, BATCH, rows) == 4
  assert shards.count(4, 4, BATCH, rows) == 4
  with pytest.raises(
    ValueError, match="expected DATA_SHARDS = 4, which the run"
  ):
    shards.count(2, 4, BATCH, rows)
  with pytest.raises(ValueError, match="divide the 6 rows of a batch, got 4"):
    shards.count(None, 4, 6, rows)


@pytest.mark.parametrize("n", [0, -1, 3, 16])
def test_wrong_numbers(n):
  rows = shards.rows_of_processes(TWO, BATCH)
  with pytest.raises(ValueError, match=f"got {n}; set DATA_SHARDS"):
    shards.count(n, None, BATCH, rows)
