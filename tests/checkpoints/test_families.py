"""Folders of Hugging Face's families: configurations, tensors, both ways."""

import json
import shutil

import golden_hf
import numpy as np
import pytest
from checkpoint_states import assert_identical, message
from flax import traverse_util
from safetensors import numpy as library

from gkd_jax import checkpoints
from gkd_jax.checkpoints import export, huggingface

NAMES = sorted(
  path.name
  for path in golden_hf.FOLDERS.iterdir()
  if not path.name.endswith("_sharded")
)
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def folder(tmp_path):
  """A copy of a tied model, to change."""
  shutil.copytree(golden_hf.FOLDERS / "llama3", tmp_path / "hf")
  return tmp_path / "hf"


def rewrite(folder, **fields):
  file = folder / "config.json"
  text = json.loads(file.read_text()) | fields
  file.write_text(
    json.dumps({k: v for k, v in text.items() if v is not ...}, indent=1)
  )


def change_tensors(folder, **changes):
  """Sets tensors, whose dots are underscores twice; None deletes one."""
  file = folder / "model.safetensors"
  tensors = library.load_file(file)
  for name, value in changes.items():
    name = name.replace("__", ".")
    if value is None:
      del tensors[name]
    else:
      tensors[name] = value
  library.save_file(tensors, file)


def refusal(folder):
  with pytest.raises(ValueError) as error:
    checkpoints.load_params(folder)
  return message(error)


@each
def test_each_layout_of_a_configuration_is_the_same_model(name, tmp_path):
  given = golden_hf.FOLDERS / name
  config = checkpoints.load_config(given)
  layouts = [*given.glob("config_*.json")]
  has_one = "bfloat16" in name or name == "t5gemma2"
  assert len(layouts) == (0 if has_one else 2)
  for layout in layouts:
    shutil.copyfile(layout, tmp_path / "config.json")
    assert checkpoints.load_config(tmp_path) == config, layout.name


@each
def test_import_and_export_keep_every_bit(name, tmp_path):
  given = golden_hf.FOLDERS / name
  config = export.import_checkpoint(given, tmp_path / "ours")
  export.export_checkpoint(tmp_path / "ours", tmp_path / "hf", format="hf")
  again, read = checkpoints.load_model(tmp_path / "hf", dtype=None)
  assert again == config
  assert_identical(read, checkpoints.load_model(given, dtype=None)[1])
  stored = traverse_util.flatten_dict(read, sep="/")
  table = huggingface.name_table(config)
  if "bfloat16" in name:
    assert {str(x.dtype) for x in stored.values()} == {"bfloat16"}
    return
  theirs = library.load_file(given / "model.safetensors")
  ours = library.load_file(tmp_path / "hf" / "model.safetensors")
  kept = {name for name, _ in table.values()}
  images = {k for k in theirs if "vision_tower" in k or "multi_modal" in k}
  assert (len(images) > 0) == (name == "t5gemma2")
  assert ours.keys() == theirs.keys() - images == kept
  for key, value in ours.items():
    np.testing.assert_array_equal(value, theirs[key])


@each
def test_an_exported_configuration_says_what_the_given_one_says(name, tmp_path):
  export.export_checkpoint(golden_hf.FOLDERS / name, tmp_path, format="hf")
  wrote = json.loads((tmp_path / "config.json").read_text())
  given = golden_hf.config_json(name)
  same = {"architectures", "model_type", "head_dim", "rope_theta"}
  same |= {"rope_scaling", "hidden_size", "layer_types", "rms_norm_eps"}
  same |= {"rope_local_base_freq", "sliding_window", "query_pre_attn_scalar"}
  same |= {"attn_logit_softcapping", "final_logit_softcapping"}
  same |= {"num_key_value_heads", "use_sliding_window", "is_decoder"}
  same |= {"cross_attention_hidden_size", "is_encoder_decoder", "vocab_size"}
  same |= {"max_position_embeddings"}
  parts = [(wrote, given)]
  parts += [(wrote[k], given[k]) for k in ("encoder", "decoder") if k in given]
  for ours, theirs in parts:
    for field in same & theirs.keys() & ours.keys():
      assert ours[field] == theirs[field], field
  assert {"model_type", "vocab_size"} <= same & parts[-1][0].keys()


@pytest.mark.parametrize("name", ["llama3", "t5gemma_wide"])
def test_the_longest_row_of_a_folder_is_that_of_its_export(name, tmp_path):
  text = golden_hf.config_json(name)
  sides = [text[k] for k in ("encoder", "decoder") if k in text] or [text]
  for lengths in ([2048, 8192], [None, None]):
    for side, length in zip(sides, lengths, strict=False):
      side["max_position_embeddings"] = length
    shutil.copytree(
      golden_hf.FOLDERS / name, tmp_path / "hf", dirs_exist_ok=True
    )
    (tmp_path / "hf" / "config.json").write_text(json.dumps(text))
    export.import_checkpoint(tmp_path / "hf", tmp_path / "ours", layers="0")
    export.export_checkpoint(tmp_path / "ours", tmp_path / "out", format="hf")
    wrote = json.loads((tmp_path / "out" / "config.json").read_text())
    parts = [wrote[k] for k in ("encoder", "decoder") if k in wrote] or [wrote]
    # Where none is known, one that no row reaches.
    assert [part["max_position_embeddings"] for part in parts] == [
      length or 131072 for length in lengths[: len(parts)]
    ]


@each
def test_special_tokens_are_those_of_the_folder_and_of_its_export(
  name, tmp_path
):
  given = golden_hf.FOLDERS / name
  text = golden_hf.config_json(name)
  eos = np.atleast_1d(text["eos_token_id"]).tolist()
  start = text.get("decoder_start_token_id", text.get("bos_token_id"))
  tokens = checkpoints.load_special_tokens(given)
  assert tokens[:3] == (tuple(eos), text.get("pad_token_id"), start)
  export.export_checkpoint(given, tmp_path, format="hf")
  again = checkpoints.load_special_tokens(tmp_path)
  assert (again.eos, again.start) == (tokens.eos, start)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_"])
def test_the_text_part_of_a_model_of_texts_and_images(prefix, tmp_path):
  given = golden_hf.FOLDERS / "gemma3_text_linear"
  text = golden_hf.config_json("gemma3_text_linear")
  top = {k: text.pop(k) for k in ("architectures", "eos_token_id")}
  (tmp_path / "config.json").write_text(
    json.dumps(top | {"model_type": "gemma3", "text_config": text})
  )
  named = lambda name: name.replace("model.", prefix, 1)
  if prefix == "model.language_":
    named = lambda name: name.replace("model.", f"{prefix}model.", 1)
  tensors = library.load_file(given / "model.safetensors")
  images = prefix.replace("language_model.model.", "").replace("language_", "")
  library.save_file(
    {named(name): x for name, x in tensors.items()}
    | {f"{images}vision_tower.a.weight": np.zeros(3, np.float32)}
    | {f"{images}multi_modal_projector.b": np.zeros(3, np.float32)},
    tmp_path / "model.safetensors",
  )
  config, params = checkpoints.load_model(tmp_path)
  expected = checkpoints.load_model(given)
  assert config == expected[0] and config.family == "gemma3_text"
  assert_identical(params, expected[1])
  assert checkpoints.load_special_tokens(tmp_path).eos == (1, 9)
  # Anything else is not passed over.
  change_tensors(tmp_path, audio__weight=np.zeros(3, np.float32))
  assert "1 unmapped: audio.weight" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["llama", "t5gemma"])
def test_shards_are_the_whole_model(name):
  whole, shards = (golden_hf.FOLDERS / f"{name}{x}" for x in ("", "_sharded"))
  config, params = checkpoints.load_model(shards)
  expected = checkpoints.load_model(whole)
  assert config == expected[0]
  assert_identical(params, expected[1])


def test_a_whole_file_comes_before_a_stale_index(folder):
  index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  config, params = checkpoints.load_model(golden_hf.FOLDERS / "llama3")
  assert checkpoints.load_model(folder)[0] == config
  assert_identical(checkpoints.load_params(folder), params)


def test_a_missing_an_extra_and_a_misshaped_tensor_are_named(folder):
  change_tensors(
    folder,
    model__layers__1__mlp__up_proj__weight=None,
    model__layers__7__mlp__up_proj__weight=np.zeros((2, 3), np.float32),
    model__norm__weight=np.zeros(31, np.float32),
  )
  text = refusal(folder)
  assert "1 missing: model.layers.1.mlp.up_proj.weight" in text
  assert "1 unmapped: model.layers.7.mlp.up_proj.weight" in text
  assert "model.norm.weight (expected (32,), got (31,))" in text


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(folder):
  embedding = library.load_file(folder / "model.safetensors")[
    "model.embed_tokens.weight"
  ]
  expected = checkpoints.load_params(folder)
  change_tensors(
    folder,
    lm_head__weight=embedding,
    model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32),
  )
  assert_identical(checkpoints.load_params(folder), expected)
  change_tensors(folder, lm_head__weight=embedding + 1)
  assert "duplicated with other values: lm_head.weight" in refusal(folder)


@pytest.mark.parametrize(
  "fields, said",
  [
    (
      {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
      "'default', 'linear' or 'llama3', got {'rope_type': 'yarn'",
    ),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    (
      {"hidden_act": "gelu"},
      "{'hidden_act': 'silu'}, got {'hidden_act': 'gelu'}",
    ),
    ({"attention_bias": True}, "got {'attention_bias': True}"),
    ({"mlp_bias": True}, "got {'mlp_bias': True}"),
    ({"model_type": "gemma3"}, "'gemma3_text', got 'gemma3'"),
    ({"layer_types": ["full_attention"]}, "expected {'layers': 3}, got"),
    (
      {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}
      | {"use_bidirectional_attention": True},
      "got {'use_bidirectional_attention': True}",
    ),
    ({"num_key_value_heads": 3}, "divides num_heads 4, got 3"),
  ],
)
def test_what_the_network_does_not_compute_is_refused(folder, fields, said):
  rewrite(folder, **fields)
  assert said in refusal(folder)


@pytest.mark.parametrize(
  "kind, fields, expected",
  [
    # Published configurations, shortened: what they leave out has a default.
    (
      "llama",
      {"hidden_size": 2048, "num_hidden_layers": 2},
      dict(
        num_kv_heads=32, head_dim=64, logits_via_embedding=False, window=None
      ),
    ),
    (
      "mistral",
      {"num_hidden_layers": 2},
      dict(num_kv_heads=8, head_dim=128, window=4096, window_pattern=(True,)),
    ),
    (
      "qwen2",
      {"num_attention_heads": 64, "max_window_layers": 1},
      dict(num_kv_heads=32, head_dim=64, qkv_bias=True, window=None),
    ),
    (
      "qwen2",
      {"use_sliding_window": True, "max_window_layers": 1}
      | {"num_hidden_layers": 3},
      dict(window=4096, window_pattern=(False, True, True)),
    ),
    ("qwen3", {}, dict(head_dim=128, qk_norm=True, norm_unit_offset=False)),
    (
      "gemma2",
      {},
      dict(attention_softcap=50.0, final_softcap=30.0, vocab_size=256000)
      | dict(window_pattern=(True, False), query_pre_attn_scalar=256),
    ),
    (
      "gemma3_text",
      {"num_hidden_layers": 12},
      dict(attention_softcap=None, final_softcap=None, qk_norm=True)
      | dict(rope_theta=1e6, local_rope_theta=1e4, logits_via_embedding=True)
      | dict(window_pattern=(True,) * 5 + (False,)),
    ),
  ],
)
def test_fields_that_a_configuration_leaves_out(
  kind, fields, expected, tmp_path
):
  text = {"model_type": kind, **fields}
  (tmp_path / "config.json").write_text(json.dumps(text))
  config = checkpoints.load_config(tmp_path)
  assert expected == {name: config[name] for name in expected}


def test_t5gemma_with_one_tie_alone_is_refused(tmp_path):
  shutil.copytree(golden_hf.FOLDERS / "t5gemma_untied", tmp_path / "hf")
  text = golden_hf.config_json("t5gemma_untied")
  del text["decoder"]["tie_word_embeddings"]
  (tmp_path / "hf" / "config.json").write_text(json.dumps(text))
  said = refusal(tmp_path / "hf")
  assert (
    "one tie_word_embeddings at the top and in 'decoder', got False" in said
  )


def test_the_vocabulary_size_at_the_top_is_that_of_both_sides_of_a_t5gemma(
  tmp_path,
):
  text = golden_hf.config_json("t5gemma")
  text["encoder"]["vocab_size"] = text["decoder"]["vocab_size"] = 7
  (tmp_path / "config.json").write_text(json.dumps(text))
  config = checkpoints.load_config(tmp_path)
  assert (
    config["encoder"]["vocab_size"] == config["decoder"]["vocab_size"] == 96
  )
