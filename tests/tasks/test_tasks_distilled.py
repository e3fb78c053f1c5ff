"""A seqio task over a teacher's shards: train is theirs, the rest the original's."""

import json

import numpy as np
import pytest
import seqio

from gkd_jax import data
from gkd_jax.tasks import distilled, teacher_shards


@pytest.fixture(name="registry")
def _registry():
  data.load_task("arithmetic_cot")  # registers the shipped tasks
  before = set(seqio.TaskRegistry.names())
  yield seqio.TaskRegistry
  for name in set(seqio.TaskRegistry.names()) - before:
    seqio.TaskRegistry.remove(name)


def record(index, number=0, **more):
  return {
    "inputs": [4 + index, 12, 5, 1],
    "targets": [13, 4 + index] + [1] * (index != 1),
    "inputs_pretokenized": f"input {index}",
    "targets_pretokenized": "output",
    "score": -0.5 - index,
    "example_index": index,
    "sample_number": number,
  } | more


def write(prefix, shards, num_samples=1, storage=None):
  manifest = {
    "settings": {"NUM_SHARDS": len(shards), "NUM_SAMPLES": num_samples},
    "num_examples": sum(map(len, shards)) // num_samples,
    teacher_shards.STORAGE: storage,
  }
  teacher_shards.write_manifest(str(prefix), manifest)
  paths = teacher_shards.shard_paths(str(prefix), len(shards))
  for path, records in zip(paths, shards, strict=True):
    teacher_shards.write_shard(path, records)
  return str(prefix)


def rows(dataset):
  return list(dataset.as_numpy_iterator())


def test_train_is_the_shards_and_the_rest_is_the_original(tmp_path, registry):
  prefix = write(
    tmp_path / "deep" / "out", [[record(0), record(1)], [], [record(2)]]
  )
  task = distilled.add_distilled_task("taught", prefix, "arithmetic_cot")
  original = registry.get("arithmetic_cot")
  train = rows(task.get_dataset(split="train", shuffle=False))
  assert [r["example_index"] for r in train] == [0, 1, 2]
  for i, row in enumerate(train):
    assert row["inputs"].tolist() == record(i)["inputs"]
    # A target that was cut gets no EOS.
    assert row["targets"].tolist() == record(i)["targets"]
    assert row["targets"].dtype == np.int32
    assert row["score"] == -0.5 - i
  assert task.num_input_examples("train") == 3
  for split in ("validation", "test"):
    of_both = [
      rows(t.get_dataset(split=split, shuffle=False).take(20))
      for t in (task, original)
    ]
    for a, b in zip(*of_both, strict=True):
      assert set(a) == set(b)
      for name in a:
        np.testing.assert_array_equal(a[name], b[name])
  assert task.metric_fns == original.metric_fns
  assert task.postprocessor == original.postprocessor
  assert task.num_input_examples("test") == 1000


def test_a_whole_epoch_is_shuffled_and_dealt_to_processes(tmp_path, registry):
  shards = [[record(i), record(i, 1)] for i in range(8)]
  prefix = write(tmp_path / "out", shards, num_samples=2)
  task = distilled.add_distilled_task("taught", prefix, "arithmetic_cot")
  assert task.num_input_examples("train") == 16
  # More processes than two have files of their own, more than eight have not.
  for processes in (2, 16):
    dealt = [
      (int(r["example_index"]), int(r["sample_number"]))
      for index in range(processes)
      for r in rows(
        task.get_dataset(
          split="train",
          shuffle=True,
          seed=1,
          shard_info=seqio.ShardInfo(index, processes),
        )
      )
    ]
    assert sorted(dealt) == [(i, n) for i in range(8) for n in range(2)]
    assert dealt != sorted(dealt)


def test_top_k_log_probs_are_read_whatever_their_storage(tmp_path, registry):
  ids = np.array([[3, 40000], [5, 6], [1, 0]])
  log_probs = np.array([[-0.5, -1, -3e4], [-0.25, -2, -4], [-8, -9, -0.125]])
  for name, stored in (
    ("narrow", ("uint16", "float16")),
    ("wide", ("int32", "float32")),
  ):
    storage = {"top_k": 2, "ids": stored[0], "log_probs": stored[1]}
    row = record(0) | {
      "top_k_ids": ids.astype(stored[0]),
      "top_k_log_probs": log_probs.astype(stored[1]),
    }
    prefix = write(tmp_path / name, [[row]], storage=storage)
    task = distilled.add_distilled_task(name, prefix, "arithmetic_cot")
    (got,) = rows(task.get_dataset(split="train"))
    np.testing.assert_array_equal(got["top_k_ids"], ids)
    # All are numbers that float16 holds, but for the largest.
    np.testing.assert_allclose(got["top_k_log_probs"], log_probs, rtol=1e-3)
    assert got["top_k_ids"].dtype == np.int32
    assert got["top_k_log_probs"].dtype == np.float32


def test_a_shard_is_whole_or_not_there(tmp_path):
  path = tmp_path / "out-00000-of-00001"

  def stopped():
    yield record(0)
    assert not path.exists()
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    teacher_shards.write_shard(str(path), stopped())
  assert not path.exists()
  teacher_shards.write_shard(str(path), [record(0)])
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_original_trims_its_own_rows(tmp_path, registry):
  """EOS after trimming needs the lengths, which the source does not have."""
  base = registry.get("arithmetic_cot")
  registry.add(
    "trimmed",
    source=base.source,
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features=base.output_features,
  )
  prefix = write(tmp_path / "out", [[record(0)]])
  task = distilled.add_distilled_task("taught", prefix, "trimmed")
  dataset = task.get_dataset({"inputs": 3, "targets": 3}, "test", shuffle=False)
  for row in rows(dataset.take(5)):
    assert row["inputs"].tolist()[2] == 1 and len(row["inputs"]) == 3


def test_unfinished_and_other_files_are_told(tmp_path, registry, monkeypatch):
  task = distilled.add_distilled_task("taught", "$SHARDS/out", "arithmetic_cot")
  monkeypatch.setenv("SHARDS", str(tmp_path))
  with pytest.raises(ValueError, match=r"without .*out-manifest\.json"):
    task.get_dataset(split="train")
  prefix = write(tmp_path / "out", [[record(0)], [record(1)]])
  assert len(rows(task.get_dataset(split="train"))) == 2
  (tmp_path / "out-00001-of-00002").unlink()
  with pytest.raises(ValueError, match=r"expected 2 shards at .*out', got 1"):
    task.get_dataset(split="train")
  for text in ("no JSON", "[]", json.dumps({"format": "another"})):
    (tmp_path / "out-manifest.json").write_text(text)
    with pytest.raises(ValueError, match="expected a manifest of format"):
      teacher_shards.read_manifest(prefix)


def test_names_for_gin(tmp_path, registry):
  name = data.distilled_task("a", "arithmetic_cot")
  assert name == "arithmetic_cot_distilled"
  assert data.distilled_task("a", "arithmetic_cot") == name
  assert data.load_task(name).source.prefix == "a"
  with pytest.raises(ValueError, match="expected a new name"):
    data.distilled_task("b", "arithmetic_cot")
  assert data.distilled_task("b", "arithmetic_cot", name="two") == "two"
  with pytest.raises(ValueError, match=r"got [$]NO_ONE in .*; set NO_ONE"):
    data.distilled_task("$NO_ONE/a", "arithmetic_cot")
  with pytest.raises(ValueError, match="set ORIGINAL_TASK or"):
    data.distilled_task("a", "aritmetic_cot")
