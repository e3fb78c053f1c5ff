"""Special tokens of vocabularies, and the batches of those in which 0 is a token."""

import io

import numpy as np
import pytest
import sentencepiece
import seqio
import token_layouts
import toy_models

from gkd_jax import data, models, types
from gkd_jax.data import vocabularies

LENGTHS = {"inputs": 4, "targets": 5}


@pytest.fixture(name="registry", autouse=True)
def _registry():
  before = set(seqio.TaskRegistry.names())
  yield seqio.TaskRegistry
  for name in set(seqio.TaskRegistry.names()) - before:
    seqio.TaskRegistry.remove(name)


def sentencepieces(folder, **ids):
  """A SentencePiece model of a few letters, with these special ids."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["abcdefgh hgfedcba"] * 8),
    model_writer=model,
    model_type="char",
    vocab_size=12,
    hard_vocab_limit=False,
    minloglevel=2,
    **ids,
  )
  path = folder / "pieces.model"
  path.write_bytes(model.getvalue())
  return seqio.SentencePieceVocabulary(str(path))


@pytest.mark.parametrize(
  ("ids", "expected"),
  [
    # SentencePiece's own: unknown 0, BOS 1, EOS 2, no PAD, whatever seqio says.
    ({}, types.SpecialTokens((2,), None, 0, False)),
    (
      {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
      types.SpecialTokens((1,), 0, 0, True),
    ),
    (
      {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3},
      types.SpecialTokens((2,), 1, 0, False),
    ),
    ({"eos_id": -1, "pad_id": 3}, types.SpecialTokens((), 3, 0, False)),
  ],
)
def test_special_tokens_of_sentencepieces(tmp_path, ids, expected):
  vocabulary = sentencepieces(tmp_path, **ids)
  assert types.SpecialTokens.of(vocabulary) == expected


def test_special_tokens_of_other_vocabularies():
  for layout, (eos, zero, never) in token_layouts.EXPECTED.items():
    got = types.SpecialTokens.of(token_layouts.Letters(layout))
    assert got == token_layouts.special_tokens(layout), layout
    assert (got.eos, got.zero_is_padding, got.never_sampled) == (
      eos,
      zero,
      never,
    ), layout
  assert types.SpecialTokens.of(seqio.ByteVocabulary()) == types.T5_TOKENS
  without = types.SpecialTokens.of(seqio.PassThroughVocabulary(9))
  assert without.eos == () and without.eos_id == -1
  ended = types.SpecialTokens.of(seqio.PassThroughVocabulary(9, eos_id=3))
  assert ended.eos == (3,) and ended.eos_id == 3


def features(name, converter, tokens=None, pack=False):
  task = seqio.get_mixture_or_task(name)
  convert = data.feature_converter(
    converter, pack, tokens or data.special_tokens(task)
  )
  dataset = task.get_dataset(LENGTHS, shuffle=False)
  converted = convert(dataset, LENGTHS)
  lengths = convert.get_model_feature_lengths(LENGTHS)
  rows = list(converted.as_numpy_iterator())
  stacked = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
  assert {k: x.shape[1] for k, x in stacked.items()} == lengths
  return {k: x.tolist() for k, x in stacked.items()}


# "?" is unknown: 0 in the vocabulary of SentencePiece's default ids.
EXAMPLES = [("a?", "?b"), ("?", "c??")]


def test_unknown_0_counts_as_a_token_of_the_data():
  token_layouts.task("zeros", "sentencepiece", EXAMPLES)
  assert features("zeros", "EncDecFeatureConverter") == {
    "encoder_input_tokens": [[6, 0, 2, 0], [0, 2, 0, 0]],
    "encoder_input_mask": [[1, 1, 1, 0], [1, 1, 0, 0]],
    "decoder_target_tokens": [[0, 7, 2, 0, 0], [8, 0, 0, 2, 0]],
    "decoder_input_tokens": [[0, 0, 7, 2, 0], [0, 8, 0, 0, 2]],
    "decoder_loss_weights": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
  }
  got = features("zeros", "DecoderFeatureConverter")
  assert got["decoder_target_tokens"] == [
    [6, 0, 2, 0, 7, 2, 0, 0, 0],
    [0, 2, 8, 0, 0, 2, 0, 0, 0],
  ]
  assert got["decoder_loss_weights"] == [
    [0, 0, 0, 1, 1, 1, 0, 0, 0],
    [0, 0, 1, 1, 1, 1, 0, 0, 0],
  ]
  assert got["decoder_causal_attention"] == [
    [1, 1, 1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0, 0],
  ]


@pytest.mark.parametrize("zero_is_padding", [True, False])
def test_a_decoder_reads_a_start_once_that_its_prompt_has(zero_is_padding):
  task = token_layouts.task(
    f"starts_{zero_is_padding}", "sentencepiece", [("ab", "b"), ("b", "aa")]
  )
  # As if "a" (6) were BOS.
  tokens = data.special_tokens(task)._replace(
    start=6, zero_is_padding=zero_is_padding
  )
  got = features(task.name, "DecoderFeatureConverter", tokens)
  assert got["decoder_input_tokens"] == [
    [6, 7, 2, 7, 2, 0, 0, 0, 0],
    [6, 7, 2, 6, 6, 2, 0, 0, 0],
  ]
  assert got["decoder_target_tokens"] == [
    [7, 2, 7, 2, 0, 0, 0, 0, 0],
    [7, 2, 6, 6, 2, 0, 0, 0, 0],
  ]
  assert got["decoder_causal_attention"] == [[1] * 3 + [0] * 6] * 2
  # An encoder reads all of it.
  got = features(task.name, "EncDecFeatureConverter", tokens)
  assert got["encoder_input_tokens"] == [[6, 7, 2, 0], [7, 2, 0, 0]]


def test_packed_rows_count_a_0():
  token_layouts.task("short_zeros", "sentencepiece", [("a", "?"), ("?", "b?")])
  got = features("short_zeros", "EncDecFeatureConverter", pack=True)
  assert got["encoder_input_tokens"] == [[6, 2, 0, 2]]
  assert got["encoder_segment_ids"] == [[1, 1, 2, 2]]
  assert got["decoder_target_tokens"] == [[0, 2, 7, 0, 2]]
  assert got["decoder_loss_weights"] == [[1, 1, 1, 1, 1]]
  assert got["decoder_input_tokens"] == [[0, 0, 0, 7, 0]]


@pytest.mark.parametrize("layout", ["t5", "bos_first"])
def test_decoders_read_the_start_token_first(layout):
  token_layouts.task("started", layout, [("a", "bc")])
  eos = token_layouts.LAYOUTS[layout]["eos"][0]
  tokens = token_layouts.special_tokens(layout, start=5)
  got = features("started", "EncDecFeatureConverter", tokens)
  assert got["decoder_input_tokens"] == [[5, 7, 8, eos, 0]]
  assert got["decoder_target_tokens"] == [[7, 8, eos, 0, 0]]
  got = features("started", "DecoderFeatureConverter", tokens)
  assert got["decoder_input_tokens"][0][:5] == [5, 6, eos, 7, 8]


def test_batches_of_t5_ids_are_seqios():
  token_layouts.task("plain", "t5", EXAMPLES)
  for name in ("EncDecFeatureConverter", "DecoderFeatureConverter"):
    task = seqio.get_mixture_or_task("plain")
    convert = getattr(seqio, name)(pack=False)
    dataset = convert(task.get_dataset(LENGTHS, shuffle=False), LENGTHS)
    rows = list(dataset.as_numpy_iterator())
    got = features("plain", name)
    assert got == {k: [r[k].tolist() for r in rows] for k in rows[0]}


def test_cut_inputs_cut_the_mask_too():
  batch = {
    "encoder_input_tokens": np.array([[6, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
    "encoder_input_mask": np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]),
  }
  cut = data.CutInputs(iter([batch]), (2, 3, 4), {"encoder_input_tokens": 5})
  got = next(cut)
  assert {k: x.shape for k, x in got.items()} == dict.fromkeys(batch, (2, 3))


def fitted(layout, stated=None, **settings):
  task = token_layouts.task("fitted", layout, EXAMPLES)
  model = toy_models.model(8, **settings)
  return data.fitted(model, task, stated or {})


def test_a_fitted_model_has_the_vocabulary_s_tokens_and_the_checkpoint_s_start():
  assert fitted("bos_first").special_tokens == types.SpecialTokens(
    (2,), 1, 0, False
  )


def test_a_checkpoint_adds_ids_that_end_sequences_and_says_what_starts_them():
  stated = {
    "INITIAL_CHECKPOINT_PATH": None,
    "TEACHER_CHECKPOINT_PATH": types.SpecialTokens((5, 2), 4, 3),
  }
  assert fitted("sentencepiece", stated).special_tokens == (
    types.SpecialTokens((2, 5), 4, 3, False)
  )


def test_both_models_of_a_pair_are_fitted():
  task = token_layouts.task("pair", "bos_first", EXAMPLES)
  model = models.GKDModel(
    toy_models.model(8), toy_models.model(12), output_buckets=(2,)
  )
  got = data.fitted(model, task, {})
  tokens = token_layouts.special_tokens("bos_first")
  assert got.student.special_tokens == got.teacher.special_tokens == tokens
  assert got.sampling["suppress_ids"] == (1,)
  # The one that was given is as before.
  assert model.student.special_tokens == types.T5_TOKENS
  assert model.sampling["suppress_ids"] == (0,)
  assert data.fitted(got, task, {}) is got


@pytest.mark.parametrize(
  ("layout", "stated", "settings", "message"),
  [
    (
      "t5",
      {},
      {"num_real_tokens": 13},
      "expected a vocabulary of at most 13 ids, the num_real_tokens of the"
      " model, got 14 for the inputs of fitted; set STUDENT, NUM_REAL_TOKENS or",
    ),
    (
      "t5",
      {"TEACHER_CHECKPOINT_PATH": types.SpecialTokens((2,), 1)},
      {},
      "expected the vocabulary of fitted to end sequences as the checkpoint says,"
      " by 2, got 1; set TEACHER_CHECKPOINT_PATH or MIXTURE_OR_TASK_NAME",
    ),
    (
      "t5",
      {
        "INITIAL_CHECKPOINT_PATH": types.SpecialTokens(start=2),
        "TEACHER_CHECKPOINT_PATH": types.SpecialTokens(),
      },
      {},
      r"one token first, got 2 \(INITIAL_CHECKPOINT_PATH\) and 0"
      r" \(TEACHER_CHECKPOINT_PATH\); set INITIAL_CHECKPOINT_PATH or TEACHER",
    ),
    (
      "t5",
      {"CHECKPOINT_PATH": types.SpecialTokens((1, 16))},
      {},
      "expected special tokens below 16, the vocab_size of the model, got 16",
    ),
  ],
)
def test_what_does_not_fit_is_refused(layout, stated, settings, message):
  with pytest.raises(ValueError, match=message):
    fitted(layout, stated, **settings)


def test_ids_that_round_a_vocabulary_up_need_no_rows():
  task = data.load_task("arithmetic_cot")  # 18 of 24 ids are in use
  assert vocabularies.check_size(toy_model(18), task) is None
  with pytest.raises(ValueError, match="at most 17 ids, the vocab_size"):
    vocabularies.check_size(toy_model(17), task)


def toy_model(vocab_size):
  import dataclasses

  from gkd_jax import network

  config = dataclasses.replace(
    toy_models.model(8).config, vocab_size=vocab_size
  )
  return models.EncoderDecoderModel(network.Transformer(config))
