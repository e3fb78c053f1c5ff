"""Hugging Face folders without their library: names and errors."""

import json
import pathlib
import shutil

import golden_t5x
import numpy as np
import pytest
from checkpoint_states import assert_identical, folders, message
from flax import traverse_util
from safetensors import numpy as library

from gkd_jax import checkpoints, network
from gkd_jax.checkpoints import export, huggingface

# Every T5 of theirs says that it ties.
VERSION_5 = {"tie_word_embeddings": True, "transformers_version": "5.17.0"}
LEGACY = pathlib.Path(__file__).parents[1] / "golden" / "t5x_legacy"


@pytest.fixture(scope="module")
def params():
  return golden_t5x.params(golden_t5x.load("t5_1_1_tiny")[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hf") / "tiny"
  export.export_checkpoint(LEGACY, folder, format="hf")
  return folder


@pytest.fixture
def folder(exported, tmp_path):
  """A copy, to damage."""
  shutil.copytree(exported, tmp_path / "hf")
  return tmp_path / "hf"


def test_names_and_orientation(exported, params):
  stored = library.load_file(exported / "model.safetensors")
  assert len(stored) == len(traverse_util.flatten_dict(params))
  layer = params["decoder"]["layers_1"]
  for name, value in {
    "shared.weight": params["token_embedder"]["embedding"],
    "lm_head.weight": params["decoder"]["logits_dense"]["kernel"].T,
    "decoder.block.1.layer.0.SelfAttention.k.weight": (
      layer["self_attention"]["key"]["kernel"].T
    ),
    "decoder.block.1.layer.1.EncDecAttention.o.weight": (
      layer["encoder_decoder_attention"]["out"]["kernel"].T
    ),
    "decoder.block.1.layer.2.DenseReluDense.wi_1.weight": (
      layer["mlp"]["wi_1"]["kernel"].T
    ),
    "decoder.block.1.layer.2.layer_norm.weight": (
      layer["pre_mlp_layer_norm"]["scale"]
    ),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
      params["encoder"]["relpos_bias"]["rel_embedding"].T
    ),
    "encoder.final_layer_norm.weight": params["encoder"]["encoder_norm"][
      "scale"
    ],
  }.items():
    np.testing.assert_array_equal(stored[name], value)


def test_round_trip_and_configuration(exported, params):
  config, read = checkpoints.load_model(exported)
  assert_identical(read, params)
  expected = golden_t5x.load("t5_1_1_tiny")[1]["config"]
  for name, value in expected.items():
    got = getattr(config, name)
    assert got == (tuple(value) if isinstance(value, list) else value), name
  assert checkpoints.load_config(exported) == vars(config)
  # Our format keeps the configuration, too.
  ours = exported.parent / "ours"
  assert export.import_checkpoint(exported, ours) == config
  again, read = checkpoints.load_model(ours)
  assert again == config
  assert_identical(read, params)


@pytest.mark.parametrize(
  "kind, text, expected",
  [
    # Published configurations, shortened: what they leave out has a default.
    (
      "t5",
      {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
      dict(
        vocab_size=32128,
        emb_dim=768,
        mlp_dim=3072,
        head_dim=64,
        num_decoder_layers=12,
        mlp_activations=("relu",),
        logits_via_embedding=True,
      ),
    ),
    (
      "t5",
      {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
      dict(mlp_activations=("gelu", "linear"), logits_via_embedding=False),
    ),
    (
      "mt5",
      {},
      dict(
        vocab_size=250112,
        mlp_dim=1024,
        num_heads=6,
        num_encoder_layers=8,
        mlp_activations=("gelu", "linear"),
        logits_via_embedding=False,
      ),
    ),
    (
      "t5",
      {"num_layers": 12, "num_decoder_layers": 4, "vocab_size": 384},
      dict(num_encoder_layers=12, num_decoder_layers=4, vocab_size=384),
    ),
    # As transformers 5 writes T5 1.1, T5 1.0 and mT5.
    (
      "t5",
      VERSION_5 | {"scale_decoder_outputs": False},
      dict(logits_via_embedding=False),
    ),
    (
      "t5",
      VERSION_5 | {"scale_decoder_outputs": True},
      dict(logits_via_embedding=True),
    ),
    ("mt5", VERSION_5, dict(logits_via_embedding=False)),
    # An mT5 that was tied on purpose before, and so was divided.
    (
      "mt5",
      {"tie_word_embeddings": True, "transformers_version": "4.57.6"},
      dict(logits_via_embedding=True),
    ),
  ],
)
def test_configurations_of_the_families(tmp_path, kind, text, expected):
  from etils import epath

  (tmp_path / "config.json").write_text(
    json.dumps({"model_type": kind, **text})
  )
  config = huggingface.read_config(epath.Path(tmp_path), setting="X")
  assert {name: getattr(config, name) for name in expected} == expected


# --------------------------------------------------------------- what is odd


def rewrite(folder, change):
  """Changes the arrays of a folder's file."""
  file = folder / "model.safetensors"
  arrays = library.load_file(file)
  change(arrays)
  library.save_file(arrays, file)


def test_copies_of_the_embedding(folder, params):
  def change(arrays):
    arrays["encoder.embed_tokens.weight"] = arrays.pop("shared.weight")
    arrays["decoder.embed_tokens.weight"] = arrays[
      "encoder.embed_tokens.weight"
    ].copy()
    arrays[
      "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    ] = np.zeros((32, 2), np.float32)

  rewrite(folder, change)
  assert_identical(checkpoints.load_params(folder), params)

  def spoil(arrays):
    arrays["decoder.embed_tokens.weight"][63, 15] += 1

  rewrite(folder, spoil)
  with pytest.raises(ValueError) as error:
    checkpoints.load_params(folder)
  assert (
    "1 duplicated with other values: decoder.embed_tokens.weight"
  ) in message(error)


def test_a_head_as_transformers_5_writes_it(folder, params):
  file = folder / "config.json"
  text = json.loads(file.read_text())
  file.write_text(
    json.dumps(text | VERSION_5 | {"scale_decoder_outputs": False})
  )
  # One of its own, beside the embedding.
  assert_identical(checkpoints.load_params(folder), params)
  # The embedding, which our network divides if it is no head.
  rewrite(folder, lambda arrays: arrays.pop("lm_head.weight"))
  table = params["token_embedder"]["embedding"]
  read = checkpoints.load_params(folder)
  np.testing.assert_array_equal(
    read["decoder"]["logits_dense"]["kernel"], table.T
  )
  np.testing.assert_array_equal(read["token_embedder"]["embedding"], table)
  # Who does not say that it ties lacks a head.
  file.write_text(json.dumps(text))
  with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
    checkpoints.load_params(folder)


def test_all_that_is_wrong_is_listed(folder):
  def change(arrays):
    for i in range(3):
      arrays[f"adapter.{i}.weight"] = np.zeros(2, np.float32)
    del arrays["encoder.final_layer_norm.weight"]
    del arrays["decoder.block.0.layer.2.DenseReluDense.wo.weight"]
    name = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    arrays[name] = np.zeros((16, 32), np.float32)
    name = "decoder.block.0.layer.0.SelfAttention.q.weight"
    arrays[name] = np.round(arrays[name]).astype(np.int8)

  rewrite(folder, change)
  with pytest.raises(ValueError) as error:
    checkpoints.load_params(folder, setting="TEACHER_CHECKPOINT_PATH")
  text = message(error)
  for part in (
    "2 missing: encoder.final_layer_norm.weight,"
    " decoder.block.0.layer.2.DenseReluDense.wo.weight;",
    "3 unmapped: adapter.0.weight, adapter.1.weight, adapter.2.weight;",
    "1 quantized: decoder.block.0.layer.0.SelfAttention.q.weight of int8;",
    "1 wrong shape: encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    " (expected (32, 16), got (16, 32)) in",
  ):
    assert part in text
  assert "TEACHER_CHECKPOINT_PATH" in text


def _reconfigure(**fields):
  def damage(folder):
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text | fields))

  return damage


def _only_a_pickle(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-4])


def _longer(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes() + b"1234")


def _no_header(folder):
  (folder / "model.safetensors").write_bytes(b"\x80\x02}q\x00.")


def _shards(folder):
  """Two files and an index, as transformers writes large models."""
  arrays = library.load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  places = {}
  for i in (1, 2):
    name = f"model-0000{i}-of-00002.safetensors"
    part = {k: v for j, (k, v) in enumerate(arrays.items()) if j % 2 == i - 1}
    library.save_file(part, folder / name)
    places |= dict.fromkeys(part, name)
  index = {"metadata": {}, "weight_map": places}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _a_shard_is_missing(folder):
  _shards(folder)
  (folder / "model-00002-of-00002.safetensors").unlink()


def _an_array_in_two_shards(folder):
  _shards(folder)
  first, second = (
    folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
  )
  arrays = library.load_file(second)
  arrays["shared.weight"] = np.zeros(2, np.float32)
  library.save_file(arrays, second)
  arrays = library.load_file(first)
  arrays["shared.weight"] = np.zeros(2, np.float32)
  library.save_file(arrays, first)


def _an_index_of_what_is_not_there(folder):
  _shards(folder)
  index = folder / "model.safetensors.index.json"
  text = json.loads(index.read_text())
  text["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
  index.write_text(json.dumps(text))


def _an_index_to_elsewhere(folder):
  _shards(folder)
  index = folder / "model.safetensors.index.json"
  text = json.loads(index.read_text())
  text["weight_map"]["shared.weight"] = "../hf/model.safetensors"
  index.write_text(json.dumps(text))


def _an_index_without_a_map(folder):
  _shards(folder)
  (folder / "model.safetensors.index.json").write_text("{}")


def test_sharded_files(folder, params):
  _shards(folder)
  assert_identical(checkpoints.load_params(folder), params)


@pytest.mark.parametrize(
  "damage, text",
  [
    (_reconfigure(model_type="bart"), "got 'bart'"),
    (_reconfigure(model_type="bert"), "got 'bert'"),
    (_reconfigure(feed_forward_proj="gelu"), "got gelu"),
    (
      _reconfigure(relative_attention_num_buckets=64),
      "got {'relative_attention_num_buckets': 64}",
    ),
    (_reconfigure(num_layers=0), "num_encoder_layers"),
    (_only_a_pickle, "pytorch_model.bin is a pickle, which is never read"),
    (_truncated, "a whole safetensors file"),
    (_longer, "a whole safetensors file"),
    (_no_header, "a whole safetensors file"),
    (_a_shard_is_missing, "all but model-00002-of-00002.safetensors"),
    (_an_array_in_two_shards, "1 in several files: shared.weight"),
    (_an_index_of_what_is_not_there, "1 missing: lost.weight"),
    (_an_index_to_elsewhere, "all but ../hf/model.safetensors"),
    (_an_index_without_a_map, "expected a weight_map"),
  ],
)
def test_a_damaged_folder(folder, tmp_path, damage, text):
  damage(folder)
  with pytest.raises(ValueError) as error:
    export.import_checkpoint(folder, tmp_path / "out")
  assert text in message(error), message(error)
  assert folders(tmp_path) == ["hf"]


# ------------------------------------------------------------------- writing


def test_a_failed_export_leaves_what_was_there(folder, tmp_path):
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  broken = tmp_path / "broken"
  shutil.copytree(LEGACY, broken)
  shutil.rmtree(broken / "checkpoint_7" / "target.decoder.logits_dense.kernel")
  for options in (
    {"format": "hf"},
    {"format": "t5x"},
    {"format": "gkd"},
  ):
    with pytest.raises(ValueError, match="logits_dense"):
      export.export_checkpoint(broken, folder, **options)
    with pytest.raises(ValueError, match="logits_dense"):
      export.export_checkpoint(broken, tmp_path / "new", **options)
    assert folders(tmp_path) == ["broken", "hf"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize(
  "options, text",
  [
    ({"format": "onnx"}, "set --format"),
    ({"vocabulary_path": "x.model"}, "expected --format=hf with a vocabulary"),
    ({"format": "hf", "vocabulary_path": "/none.model"}, "--vocabulary_path"),
  ],
)
def test_wrong_options(tmp_path, options, text):
  with pytest.raises(ValueError) as error:
    export.export_checkpoint(LEGACY, tmp_path / "out", **options)
  assert text in message(error)
  assert folders(tmp_path) == []


def test_an_activation_that_they_do_not_have():
  config = network.T5Config(vocab_size=8, mlp_activations=("swish", "gelu"))
  with pytest.raises(ValueError) as error:
    huggingface.write_config(config, "float32")
  assert "('swish', 'gelu')" in message(error)
