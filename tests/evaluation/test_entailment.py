"""The entailment reward: its probability, its texts, its checkpoint."""

import dataclasses

import jax
import numpy as np
import pytest
import seqio
import toy_models

from gkd_jax import checkpoints, evaluation, models, network
from gkd_jax.evaluation import entailment

VOCABULARY = seqio.ByteVocabulary(extra_ids=0)  # bytes from id 3 on, EOS 1
ONE, ZERO = 3 + ord("1"), 3 + ord("0")
PAIRS = [("a cat sat", "a cat"), ("no", "it rains"), ("x", "y"), ("", "?")]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
  """(model, its parameters, the folder that holds them)."""
  config = network.T5Config(
    vocab_size=264,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.1,
  )
  model = models.EncoderDecoderModel(network.Transformer(config))
  shapes = {"encoder_input_tokens": (1, 2), "decoder_input_tokens": (1, 1)}
  params = toy_models.initial_params(model, 4, shapes)
  folder = tmp_path_factory.mktemp("scorer")
  checkpoints.save_safetensors(folder, params, dataclasses.asdict(config))
  return model, params, str(folder)


def by_hand(model, params, tokens, over):
  """The probability for one unpadded row of tokens, in float64."""
  run = lambda params, tokens: model.module.apply(
    {"params": params},
    tokens,
    np.zeros((1, 1), np.int32),
    np.ones((1, 1), np.int32),
    enable_dropout=False,
  )
  logits = jax.jit(run)(params, np.array([tokens]))
  e = np.exp(np.asarray(logits[0, 0], np.float64))
  return e[ONE] / (e.sum() if over == "vocabulary" else e[ONE] + e[ZERO])


@pytest.mark.parametrize(
  ("over", "partitions"),
  [("vocabulary", 2), pytest.param("answers", 1, marks=pytest.mark.nightly)],
)
def test_scores_equal_a_direct_computation(scorer, over, partitions):
  model, params, folder = scorer
  reward = evaluation.EntailmentReward(
    model,
    folder,
    VOCABULARY,
    input_length=48,
    batch_size=8,
    over=over,
    input_prefix="summarize: ",
    num_partitions=partitions,
  )
  kernel = reward._params["decoder"]["logits_dense"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (8, 264 // partitions)
  # Ten texts in batches of eight.
  inputs, outputs = zip(*(PAIRS * 3)[:10], strict=True)
  got = reward([f"summarize: {text}" for text in inputs], outputs, [{}] * 10)
  expected = [
    by_hand(
      model,
      params,
      [3 + b for b in f"premise: {a} hypothesis: {c}".encode()] + [1],
      over,
    )
    for a, c in PAIRS
  ]
  np.testing.assert_allclose(got, (expected * 3)[:10], rtol=1e-4)
  assert np.ptp(expected) > 1e-5


def test_a_long_premise_is_cut_before_the_hypothesis():
  text = lambda row: bytes(int(t) - 3 for t in row if t > 2).decode()
  encode = lambda length: entailment.encode_pair(
    "abcdef", "xyz", VOCABULARY, length
  )
  assert text(encode(40)) == "premise: abcdef hypothesis: xyz"
  whole = encode(32)
  assert text(whole) == "premise: abcdef hypothesis: xyz" and whole[-1] == 1
  assert text(encode(29)) == "premise: abc hypothesis: xyz"
  assert text(encode(8)) == " hypoth"
  for length in (40, 32, 29, 8):
    row = encode(length)
    assert row.shape == (length,) and np.sum(row == 1) == 1
    assert not np.any(row[np.argmax(row == 1) + 1 :])


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"batch_size": 12}, "a multiple of 8 .* 12; set SCORER_BATCH_SIZE"),
    ({"input_length": 1}, "set SCORER_INPUT_LENGTH"),
    ({"over": "tokens"}, "set SCORER_OVER"),
    ({"answers": ("yes", "yet")}, "set SCORER_ANSWERS"),
    ({"checkpoint_path": ""}, "set SCORER_CHECKPOINT_PATH"),
    ({"checkpoint_path": "/nowhere"}, "set SCORER_CHECKPOINT_PATH"),
  ],
)
def test_wrong_settings(scorer, settings, message):
  model, _, folder = scorer
  settings = {"checkpoint_path": folder, "batch_size": 8} | settings
  with pytest.raises(ValueError, match=message):
    evaluation.EntailmentReward(model, vocabulary=VOCABULARY, **settings)


def test_a_checkpoint_of_another_model(scorer):
  model, _, folder = scorer
  config = dataclasses.replace(model.config, mlp_dim=12)
  other = models.EncoderDecoderModel(network.Transformer(config))
  with pytest.raises(ValueError, match="set SCORER_CHECKPOINT_PATH"):
    evaluation.EntailmentReward(other, folder, VOCABULARY)
