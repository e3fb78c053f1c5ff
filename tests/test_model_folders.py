"""What a model's folder says of its tokenizer."""

import json

import golden_hf
import pytest
import tiny_tokenizers

from gkd_jax import checkpoints, data, model_folders
from gkd_jax.checkpoints import export
from gkd_jax.data import tokenizer_folders

# As model hubs have them, beside the weights.
FILES = {
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "tokenizer.model",
  "spiece.model",
  "sentencepiece.model",
}


def test_each_file_of_a_tokenizer_travels(tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  for file in (golden_hf.FOLDERS / "llama").iterdir():
    (source / file.name).write_bytes(file.read_bytes())
  for name in FILES:
    (source / name).write_text(f"this is {name}")
  export.import_checkpoint(source, tmp_path / "ours")
  export.export_checkpoint(tmp_path / "ours", tmp_path / "gkd")
  export.export_checkpoint(tmp_path / "ours", tmp_path / "hf", format="hf")
  assert tokenizer_folders.copy(source, tmp_path / "run")
  for folder in ("ours", "gkd", "hf", "run"):
    for name in FILES:
      text = (tmp_path / folder / name).read_text()
      assert text == f"this is {name}", (folder, name)


def test_a_tokenizer_of_another_name_is_found_in_a_run(tmp_path):
  source = tiny_tokenizers.byte_level(tmp_path / "source")
  (source / "mine.json").write_bytes((source / "tokenizer.json").read_bytes())
  (source / "tokenizer.json").write_text("another one")
  (source / "mine.model").write_text("pieces")
  for name, usual in (
    ("mine.json", "tokenizer.json"),
    ("mine.model", "spiece.model"),
  ):
    run = tmp_path / f"run of {name}"
    assert tokenizer_folders.copy(source / name, run)
    copied = (run / usual).read_bytes()
    assert copied == (source / name).read_bytes()
    assert not (run / name).exists()
  found = tokenizer_folders.find(tmp_path / "run of mine.json")
  expected = data.TokenizerVocabulary(source / "mine.json").encode("hello a")
  assert data.TokenizerVocabulary(found).encode("hello a") == expected


@pytest.mark.parametrize(
  ("config", "generation", "eos", "pad"),
  [
    ({}, None, (), None),
    ({"eos_token_id": 7, "pad_token_id": 3}, None, (7,), 3),
    ({"eos_token_id": [2, 7]}, {"eos_token_id": None}, (2, 7), None),
    ({"eos_token_id": 7, "pad_token_id": 3}, {"eos_token_id": [9]}, (9,), 3),
    ({"eos_token_id": 0, "pad_token_id": 0}, {"pad_token_id": 4}, (0,), 4),
  ],
)
def test_data_and_checkpoints_read_the_same_special_tokens(
  tmp_path, config, generation, eos, pad
):
  # Of a family that has no ids where its configuration is silent.
  text = {"model_type": "qwen2"} | config
  tiny_tokenizers.byte_level(tmp_path, eos_token=None)
  (tmp_path / "config.json").write_text(json.dumps(text))
  if generation is not None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(generation))
  assert data.TokenizerVocabulary(tmp_path).eos_ids == eos
  tokens = checkpoints.load_special_tokens(tmp_path)
  assert (tokens.eos, tokens.pad) == (eos, pad)


def test_a_folder_of_ours_states_them_too(tmp_path):
  ours = {"eos": [2, 7], "pad": None, "start": 3}
  (tmp_path / "config.json").write_text(json.dumps({"special_tokens": ours}))
  assert model_folders.stated_tokens(tmp_path) == {
    "eos_token_id": [2, 7],
    "decoder_start_token_id": 3,
  }
