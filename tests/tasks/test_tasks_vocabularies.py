"""Token vocabularies: hand-worked ids, and Python against TensorFlow."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from gkd_jax.tasks import vocabularies

CHARACTERS, SYMBOLS = vocabularies.characters_and_symbols("ab'", ["AA", "B"])


def test_ids_are_shared_and_the_size_is_a_multiple_of_eight():
  assert CHARACTERS.vocab_size == SYMBOLS.vocab_size == 8
  assert CHARACTERS.encode("b'a") == [4, 5, 3]
  assert SYMBOLS.encode("B AA b") == [7, 6, 4]
  assert (SYMBOLS.pad_id, SYMBOLS.eos_id, SYMBOLS.unk_id) == (0, 1, 2)
  assert vocabularies.TokenVocabulary("abcdef").vocab_size == 16
  assert vocabularies.TokenVocabulary("a", multiple_of=1).vocab_size == 4


def test_decoding_stops_at_eos_and_shows_what_is_unknown():
  assert SYMBOLS.decode([6, 7, 1, 6]) == "AA B"
  assert SYMBOLS.decode([0, 6, 0, 2]) == "AA ⁇"
  assert CHARACTERS.decode([3, 4, 99]) == "ab⁇"
  # Ids that only round the size up are no token either.
  padded = vocabularies.TokenVocabulary("a")
  assert padded.decode([3, 7]) == "a⁇"
  assert CHARACTERS.encode(CHARACTERS.decode([3, 2])) == [3, 2]


@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(
  st.text(alphabet="ab' A?é"), st.lists(st.integers(0, 9), max_size=8)
)
def test_tensorflow_agrees_with_python(text, ids):
  for vocabulary in (CHARACTERS, SYMBOLS):
    np.testing.assert_array_equal(
      vocabulary.encode_tf(tf.constant(text)).numpy(), vocabulary.encode(text)
    )
    decoded = vocabulary.decode_tf(tf.constant(ids, tf.int32)).numpy()
    assert decoded.decode() == vocabulary.decode(ids)


def test_decoding_a_batch():
  batch = tf.constant([[6, 7, 1, 6], [1, 6, 6, 6], [2, 0, 0, 7]])
  assert SYMBOLS.decode_tf(batch).numpy().tolist() == [
    b"AA B",
    b"",
    "⁇ B".encode(),
  ]


def test_a_dataset_of_encoded_text_can_be_saved(tmp_path):
  def batches():
    dataset = tf.data.Dataset.from_tensor_slices(["ab", "b", "a'", "'"])
    return iter(dataset.map(CHARACTERS.encode_tf))

  first, second = batches(), batches()
  next(first)
  path = tf.train.Checkpoint(it=first).write(str(tmp_path / "it"))
  tf.train.Checkpoint(it=second).read(path).assert_consumed()
  assert next(second).numpy().tolist() == [4]


def test_equality_means_the_same_ids_and_texts():
  again, _ = vocabularies.characters_and_symbols("ab'", ["AA", "B"])
  assert again == CHARACTERS and hash(again) == hash(CHARACTERS)
  assert CHARACTERS != SYMBOLS
  assert vocabularies.TokenVocabulary("ab") != CHARACTERS


@pytest.mark.parametrize(
  ("tokens", "separator", "message"),
  [
    (["a", "a"], "", "distinct tokens"),
    (["a", ""], "", "not empty"),
    (["a b"], " ", "do not contain the separator"),
  ],
)
def test_tokens_that_cannot_be_told_apart(tokens, separator, message):
  with pytest.raises(ValueError, match=message):
    vocabularies.TokenVocabulary(tokens, separator=separator)


def test_a_size_must_be_a_multiple_of_something():
  with pytest.raises(ValueError, match="set multiple_of"):
    vocabularies.TokenVocabulary("a", multiple_of=0)
