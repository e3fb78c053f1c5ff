"""Special tokens beside parameters: in checkpoints, exports and HF folders."""

import io
import json
import pathlib

import pytest
import sentencepiece
from checkpoint_states import CONFIG, make_state, opened

from gkd_jax import checkpoints, types
from gkd_jax.checkpoints import export, huggingface

LEGACY = pathlib.Path(__file__).parents[1] / "golden" / "t5x_legacy"
TOKENS = types.SpecialTokens((2, 7), None, 3)


def read(path):
  return json.loads(path.read_text())


def test_a_run_s_checkpoint_keeps_them(tmp_path):
  with opened(tmp_path / "run") as checkpointer:
    checkpointer.save(
      1, make_state(1, seed=1), config=CONFIG, special_tokens=TOKENS
    )
  assert checkpoints.load_special_tokens(tmp_path / "run") == TOKENS
  assert checkpoints.load_config(tmp_path / "run") == CONFIG
  export.export_checkpoint(tmp_path / "run", tmp_path / "ours", format="gkd")
  for path in (tmp_path / "ours", tmp_path / "ours" / "model.safetensors"):
    assert checkpoints.load_special_tokens(path) == TOKENS
    assert checkpoints.load_config(path) == CONFIG


def test_formats_without_them_say_nothing(tmp_path):
  assert checkpoints.load_special_tokens(LEGACY) is None
  with opened(tmp_path) as checkpointer:
    checkpointer.save(1, make_state(1, seed=1), config=CONFIG)
  assert checkpoints.load_special_tokens(tmp_path) is None


@pytest.mark.parametrize(
  ("config", "generation", "expected"),
  [
    ({}, None, ((1,), 0, 0)),  # transformers' defaults of T5
    ({"eos_token_id": 2, "pad_token_id": 1}, None, ((2,), 1, 1)),
    ({"decoder_start_token_id": 5}, None, ((1,), 0, 5)),
    (
      {"eos_token_id": 1, "decoder_start_token_id": 0},
      {"eos_token_id": [1, 106], "pad_token_id": 106},
      ((1, 106), 106, 0),
    ),
    ({"eos_token_id": 2}, {"eos_token_id": None}, ((2,), 0, 0)),
  ],
)
def test_a_folder_s_generation_config_comes_first(
  tmp_path, config, generation, expected
):
  (tmp_path / "config.json").write_text(
    json.dumps({"model_type": "t5"} | config)
  )
  if generation is not None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
  assert checkpoints.load_special_tokens(tmp_path) == types.SpecialTokens(
    *expected
  )


@pytest.mark.parametrize(
  ("tokens", "eos", "pad", "start"),
  [
    (types.T5_TOKENS, 1, 0, 0),
    (types.SpecialTokens((2,), None, 0, False), 2, 2, 0),  # no PAD: EOS
    (types.SpecialTokens((2,), 1, 0, False), 2, 1, 0),
    (types.SpecialTokens((2,), 2, 1, False), 2, 2, 1),
    (types.SpecialTokens((1, 4), 0, 0), [1, 4], 0, 0),
    (types.SpecialTokens((0,), 0, 0, False), 0, 0, 0),
    (types.SpecialTokens((), None, 0, False), None, None, 0),
  ],
)
def test_the_ids_of_an_export_by_hand(tokens, eos, pad, start):
  assert huggingface.generation_fields(tokens) == {
    "eos_token_id": eos,
    "pad_token_id": pad,
    "decoder_start_token_id": start,
  }


def test_an_export_has_the_run_s_special_tokens(tmp_path):
  export.import_checkpoint(LEGACY, tmp_path / "gkd")
  config = read(tmp_path / "gkd" / "config.json")
  assert "special_tokens" not in config  # T5X's checkpoints say nothing
  config["special_tokens"] = {"eos": [2, 7], "pad": None, "start": 3}
  (tmp_path / "gkd" / "config.json").write_text(json.dumps(config))
  export.export_checkpoint(tmp_path / "gkd", tmp_path / "hf", format="hf")
  expected = {
    "eos_token_id": [2, 7],
    "pad_token_id": 2,
    "decoder_start_token_id": 3,
  }
  assert read(tmp_path / "hf" / "generation_config.json") == expected
  written = read(tmp_path / "hf" / "config.json")
  assert {k: written[k] for k in expected} == expected
  # And back, PAD being EOS now.
  export.import_checkpoint(tmp_path / "hf", tmp_path / "back")
  assert checkpoints.load_special_tokens(tmp_path / "back") == (
    TOKENS._replace(pad=2)
  )


@pytest.fixture(scope="module")
def default_pieces(tmp_path_factory):
  """A SentencePiece model of default ids: unknown 0, BOS 1, EOS 2, no PAD."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["abcdefgh hgfedcba"] * 8),
    model_writer=model,
    model_type="char",
    vocab_size=12,
    minloglevel=2,
  )
  path = tmp_path_factory.mktemp("pieces") / "default.model"
  path.write_bytes(model.getvalue())
  return path


def test_an_export_with_a_vocabulary_has_its_special_tokens(
  tmp_path, default_pieces
):
  export.export_checkpoint(
    LEGACY, tmp_path, format="hf", vocabulary_path=default_pieces, extra_ids=0
  )
  assert read(tmp_path / "generation_config.json") == {
    "eos_token_id": 2,
    "pad_token_id": 2,
    "decoder_start_token_id": 0,
  }
  names = read(tmp_path / "special_tokens_map.json")
  assert names == {
    "eos_token": "</s>",
    "pad_token": "</s>",
    "unk_token": "<unk>",
    "additional_special_tokens": [],
  }


def test_a_vocabulary_with_another_eos_than_the_checkpoint_s_is_refused(
  tmp_path, default_pieces
):
  export.export_checkpoint(LEGACY, tmp_path / "t5", format="hf")
  with pytest.raises(ValueError, match=r"EOS is 1, .* got 2; set --vocabulary"):
    export.export_checkpoint(
      tmp_path / "t5",
      tmp_path / "other",
      format="hf",
      vocabulary_path=default_pieces,
    )
