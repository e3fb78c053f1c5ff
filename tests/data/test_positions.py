"""A position in the data: it counts rows, and belongs to the data it is of."""

import contextlib
import json
import os

import nightly
import numpy as np
import pytest
import seqio
import tensorflow as tf

from gkd_jax import data
from gkd_jax.data import identity, positions, shards

LENGTHS = {"inputs": 4, "targets": 4}
FEATURE = seqio.Feature(seqio.PassThroughVocabulary(300), add_eos=False)


@contextlib.contextmanager
def task(rows, *preprocessors, name="positions_numbers"):
  """A task of numbers; a list of them, or what makes a data set."""
  make = (
    rows
    if callable(rows)
    else lambda: tf.data.Dataset.from_tensor_slices(np.array(rows, np.int32))
  )
  source = seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: make().map(
      lambda i: {"inputs": i[None], "targets": i[None]}
    ),
    splits=["train"],
  )
  try:
    yield add(name, source, *preprocessors)
  finally:
    seqio.TaskRegistry.remove(name)


def add(name, source, *preprocessors):
  return seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=list(preprocessors),
    output_features={"inputs": FEATURE, "targets": FEATURE},
  )


def iterator(a_task, batch_size=8, n=1, lengths=LENGTHS, seed=3, **kwargs):
  rows = {0: np.arange(batch_size)}
  share = shards.share(rows, 0, batch_size, n)
  return data.TrainIterator(
    a_task, lengths, batch_size, seed=seed, share=share, **kwargs
  )


def numbers(an_iterator, batches, n=1):
  """Rows of each shard in the order read, `[n, rows]`."""
  read = [
    next(an_iterator)["decoder_target_tokens"][:, 0] for _ in range(batches)
  ]
  return np.concatenate([x.reshape(n, -1) for x in read], axis=1)


@pytest.fixture(name="saved", scope="module")
def _saved(tmp_path_factory):
  """The position after three batches of 8 of the numbers 2 to 199."""
  folder = tmp_path_factory.mktemp("saved")
  with task(range(2, 200)) as a_task:
    one = iterator(a_task)
    numbers(one, 3)
    one.save_state(folder)
  return folder


@pytest.mark.parametrize(
  ("n", "sizes"),
  [(1, (12, 2, 8)), pytest.param(2, (4, 10), marks=pytest.mark.nightly)],
)
def test_another_batch_size_goes_on_with_the_next_row(n, sizes, tmp_path):
  with task(range(2, 200)) as a_task:
    whole = numbers(iterator(a_task, n=n), 9, n)  # 9 x 8 rows
    assert len(set(whole.flat)) > 50
    one = iterator(a_task, n=n)
    numbers(one, 3, n)
    at = 24 // n
    for i, size in enumerate(sizes):
      folder = tmp_path / str(i)
      folder.mkdir()
      one.save_state(folder)
      one = iterator(a_task, size, n)
      one.restore_state(folder)
      got = numbers(one, 2, n)
      np.testing.assert_array_equal(got, whole[:, at : at + 2 * size // n])
      at += 2 * size // n
      one.save_state(folder)
      record = json.loads((folder / "position.json").read_text())
      assert record["examples"] == at * n


def test_an_unchanged_run_leaves_no_rows_over(saved):
  files = {p.name for p in (saved / "shard_0-of-1").iterdir()}
  assert files == {
    "iterator.index",
    "iterator.data-00000-of-00001",
    "first_rows.json",
  }


def corrected(row):
  rows = np.arange(2, 200)
  rows[row] = 7
  return rows


OTHERS = {
  "seed": (range(2, 200), {"seed": 4}, r"SEED = 4 \(saved with 3\)"),
  "lengths": (
    range(2, 200),
    {"lengths": {"inputs": 4, "targets": 5}},
    r"TASK_FEATURE_LENGTHS = .*5.* \(saved with .*4.*4.*\)",
  ),
  "pack": (range(2, 200), {"pack": True}, r"PACK = True \(saved with False\)"),
  "task": (
    range(2, 200),
    {"name": "positions_other"},
    r"NAME = 'positions_other' \(saved with 'positions_numbers'\)",
  ),
  "one row of many": (corrected(190), {}, r"198 rows .*\(saved with 198 rows"),
  "one row more": (range(2, 201), {}, r"199 rows .*\(saved with 198 rows"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_data_do_not_go_on_at_the_position(saved, name):
  rows, settings, message = OTHERS[name]
  settings = dict(settings)
  name = settings.pop("name", "positions_numbers")
  with (
    task(rows, name=name) as a_task,
    pytest.raises(ValueError, match=message) as error,
  ):
    iterator(a_task, **settings).restore_state(saved)
  text = str(error.value)
  assert text.startswith("expected ") and "\n" not in text
  assert "INITIAL_CHECKPOINT_PATH" in text and "delete" not in text


def same(dataset):
  return dataset.map(lambda x: {k: v * 1 for k, v in x.items()})


def plus_one(dataset):
  return dataset.map(lambda x: {k: v + 1 for k, v in x.items()})


@pytest.mark.parametrize("preprocessor", [plus_one, same])
def test_another_pipeline_is_not_called_damage(saved, preprocessor):
  with (
    task(range(2, 200), preprocessor) as a_task,
    pytest.raises(ValueError, match="expected the pipeline") as error,
  ):
    iterator(a_task).restore_state(saved)
  assert "set the task as it was" in str(error.value)
  assert "delete" not in str(error.value) and "whole" not in str(error.value)


def _cut(folder):
  file = folder / "shard_0-of-1" / "iterator.data-00000-of-00001"
  file.write_bytes(file.read_bytes()[:100])


def _flip(folder):
  file = folder / "shard_0-of-1" / "iterator.data-00000-of-00001"
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 255
  file.write_bytes(bytes(content))


def _remove(folder):
  (folder / "shard_0-of-1" / "iterator.index").unlink()


def _cut_rows(folder):
  (folder / "shard_0-of-1" / "rows_left.npz").write_bytes(b"PK")


@pytest.mark.parametrize("damage", [_cut, _flip, _remove, _cut_rows])
def test_a_damaged_position_is_called_so(saved, damage, tmp_path):
  for file in saved.rglob("*"):
    if file.is_file():
      copy = tmp_path / file.relative_to(saved)
      copy.parent.mkdir(exist_ok=True)
      copy.write_bytes(file.read_bytes())
  damage(tmp_path)
  with (
    task(range(2, 200)) as a_task,
    pytest.raises(ValueError, match="expected a whole position") as error,
  ):
    iterator(a_task).restore_state(tmp_path)
  assert "delete" not in str(error.value)
  assert "SAVE_DATA_POSITION = False" in str(error.value)


def test_positions_of_older_versions_go_on(saved, tmp_path):
  """Those hold TensorFlow's two files of each shard, and nothing else."""
  with task(range(2, 200)) as a_task:
    expected = numbers(iterator(a_task), 6)[:, 24:]
    (tmp_path / "shard_0-of-1").mkdir()
    for name in ("iterator.index", "iterator.data-00000-of-00001"):
      old = saved / "shard_0-of-1" / name
      (tmp_path / "shard_0-of-1" / name).write_bytes(old.read_bytes())
    one = iterator(a_task)
    one.restore_state(tmp_path)
    np.testing.assert_array_equal(numbers(one, 1), expected[:, :8])
    again = tmp_path / "again"
    again.mkdir()
    one.save_state(again)
    one = iterator(a_task)
    one.restore_state(again)
    np.testing.assert_array_equal(numbers(one, 2), expected[:, 8:])
    with pytest.raises(
      ValueError, match=r"expected the pipeline .*Incompatible"
    ):
      iterator(a_task, 4).restore_state(tmp_path)


def _generator():
  yield from (np.int32(i) for i in range(2, 200))


def _map(function):
  return lambda: tf.data.Dataset.range(2, 200).map(
    lambda i: tf.ensure_shape(tf.cast(function(i), tf.int32), ())
  )


STATEFUL = {
  "from_generator": lambda: tf.data.Dataset.from_generator(
    _generator, output_signature=tf.TensorSpec((), tf.int32)
  ),
  "py_function": _map(lambda i: tf.py_function(lambda x: x, [i], tf.int64)),
  "numpy_function": _map(
    lambda i: tf.numpy_function(lambda x: x, [i], tf.int64)
  ),
  "random": _map(lambda i: i + tf.random.uniform((), maxval=9, dtype=tf.int64)),
}


@pytest.mark.parametrize(
  "name", nightly.of(STATEFUL, ["from_generator", "random"])
)
def test_a_pipeline_without_a_position_is_told_at_the_first_try(name):
  with task(STATEFUL[name]) as a_task:
    with pytest.raises(ValueError, match="set SAVE_DATA_POSITION = False"):
      data.try_saving(iterator(a_task))
    without = iterator(a_task, save_position=False)
    data.try_saving(without)
    assert numbers(without, 2).size == 16


def test_a_look_and_a_try_change_nothing(saved, tmp_path):
  tokens = lambda batch: batch["decoder_target_tokens"][:, 0]
  with task(range(2, 200)) as a_task:
    expected = numbers(iterator(a_task), 5)
    one = iterator(a_task)
    for _ in range(2):
      np.testing.assert_array_equal(tokens(one.peek()), expected[0, :8])
    data.try_saving(one)
    np.testing.assert_array_equal(numbers(one, 3), expected[:, :24])
    one.peek()
    one.save_state(tmp_path)
    for folder in (tmp_path, saved):  # saved after a look, and without one
      other = iterator(a_task)
      other.peek()
      other.restore_state(folder)
      np.testing.assert_array_equal(tokens(other.peek()), expected[0, 24:32])
      np.testing.assert_array_equal(numbers(other, 2), expected[:, 24:])


def test_files_are_known_by_their_content(tmp_path, monkeypatch):
  path = tmp_path / "numbers.txt"
  path.write_text("\n".join(map(str, range(1000))))
  source = seqio.TextLineDataSource({"train": os.fspath(path)})
  a_task = add("positions_lines", source)
  try:
    before = identity.sources(a_task, "train")
    assert before["positions_lines"][os.fspath(path)][0] == path.stat().st_size
    os.utime(path, (0, 0))  # as a copy of the file
    assert identity.sources(a_task, "train") == before
    path.write_text(path.read_text().replace("777", "778"))
    after = identity.sources(a_task, "train")
    assert after != before
    # Of too many bytes, blocks are read, the first ones of each file among them.
    monkeypatch.setattr(identity, "_READ_WHOLE", 100)
    part = identity.sources(a_task, "train")
    path.write_text(path.read_text().replace("0\n1\n", "0\n2\n"))
    assert identity.sources(a_task, "train") != part
  finally:
    seqio.TaskRegistry.remove("positions_lines")


def test_rows_are_known_by_the_digest_that_saved_positions_hold():
  with task(range(2, 1500)) as a_task:
    found = identity.sources(a_task, "train")["positions_numbers"]["rows"]
  # A polynomial in the hashes of all features, one after the other.
  total = 0
  for i in range(2, 1500):
    text = tf.io.serialize_tensor(tf.constant([i], tf.int32))
    value = int(tf.strings.to_hash_bucket_fast(text, 2**62))
    for _ in ("inputs", "targets"):
      total = (total * 1_000_003 + value) % 2**64
  assert found == [1498, f"{total:016x}"]


def test_a_mixture_is_known_by_its_tasks_and_rates():
  with task([2, 3], name="positions_a") as a, task([4, 5], name="positions_b"):
    settings = {"SEED": 0}
    seen = []
    for rates in ((1.0, 2.0), (1.0, 3.0)):
      seqio.MixtureRegistry.add(
        "positions_mixed",
        list(zip(("positions_a", "positions_b"), rates, strict=True)),
      )
      mixture = seqio.MixtureRegistry.get("positions_mixed")
      seen.append(settings | {"sources": identity.sources(mixture, "train")})
      seqio.MixtureRegistry.remove("positions_mixed")
    seen.append(settings | {"sources": identity.sources(a, "train")})
  assert identity.differences(seen[0], seen[0]) == []
  assert identity.differences(seen[0], seen[1]) == [
    "positions_b: rate 3.0 (saved with rate 2.0)"
  ]
  found = identity.differences(seen[0], seen[2])
  assert [x.split(" (")[0] for x in found] == [
    "positions_b: no rate",
    "positions_b: no rows",
  ]
  assert positions.ANEW.startswith("SAVE_DATA_POSITION")
