"""Decoder-only families against numbers that transformers computed."""

import dataclasses

import golden_hf
import jax
import jax.numpy as jnp
import nightly
import numpy as np
import pytest
import toy_decoder_only as toy
import toy_models
from loss_batches import log_softmax64

from gkd_jax import models, network
from gkd_jax.decoding import sampling
from gkd_jax.network import rotary

# Each way to compute is in one of them.
SHORT = "llama3", "mistral_full", "qwen2_window", "qwen3", "gemma2"
SHORT += ("gemma3_text_linear",)
BFLOAT16 = "llama_bfloat16", "gemma2_bfloat16"
LONG = "llama", "llama_pad_is_eos", "mistral", "qwen2", "gemma3_text", *BFLOAT16
NAMES = [*SHORT, *(pytest.param(x, marks=pytest.mark.nightly) for x in LONG)]
each = pytest.mark.parametrize("name", NAMES)


def close(got, expected, mask, **tolerance):
  kept = np.asarray(mask) > 0
  np.testing.assert_allclose(got[kept], expected[kept], **tolerance)


@each
def test_logits_and_log_probs_equal_transformers(name):
  got = golden_hf.causal_results(name)
  expected = got.expected
  mask = expected["logits_mask"]
  close(got.logits, expected["logits"], mask, rtol=0, atol=5e-5)
  close(
    got.log_probs,
    expected["target_log_probs"],
    expected["target_mask"],
    rtol=0,
    atol=5e-5,
  )


@each
def test_hidden_states_of_all_layers_equal_transformers(name):
  got = golden_hf.causal_results(name)
  expected = got.expected
  close(
    got.hidden, expected["hidden"], expected["logits_mask"], rtol=0, atol=1e-4
  )
  golden_hf.check_layers(got.layers, "layers_row0", expected)


@each
def test_rows_padded_on_the_left_equal_rows_padded_on_the_right(name):
  got = golden_hf.causal_results(name)
  mask = got.expected["left_attention_mask"]
  close(got.left_logits, got.expected["left_logits"], mask, rtol=0, atol=5e-5)


@each
def test_gradients_equal_transformers(name):
  golden_hf.check_gradients(golden_hf.causal_results(name))


@each
def test_cached_greedy_tokens_and_log_probs_equal_transformers(name):
  golden_hf.check_greedy(golden_hf.causal_results(name))


@pytest.mark.parametrize(
  "name", nightly.of((*SHORT, *LONG), ["gemma3_text_linear"])
)
def test_greedy_outputs_end_where_those_of_transformers_do(name):
  assert golden_hf.check_ends(name, golden_hf.causal_results(name)) > 0


@pytest.mark.parametrize("name", nightly.of((*SHORT, *LONG), ["gemma2"]))
def test_beams_and_their_scores_equal_transformers(name):
  golden_hf.check_beams(golden_hf.causal_results(name))


@pytest.mark.nightly
@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_activations_stay_near_transformers(name):
  got = golden_hf.causal_results(name)
  config = dataclasses.replace(got.model.config, dtype="bfloat16")
  model = models.DecoderOnlyModel(network.CausalTransformer(config))
  tokens = got.expected["input_ids"]
  logits = jax.jit(model.logits)(
    got.params,
    {"decoder_input_tokens": tokens, "decoder_target_tokens": tokens},
  )
  mask, theirs = got.expected["logits_mask"], got.expected["logits_bfloat16"]
  close(logits, theirs, mask, rtol=0, atol=0.6)


def test_scanned_and_rematerialised_layers_have_the_same_logits_and_gradient():
  got = golden_hf.causal_results("gemma3_text_linear")
  config = dataclasses.replace(got.model.config, remat_policy="minimal")
  model = models.DecoderOnlyModel(
    network.CausalTransformer(config, scan_layers=True)
  )
  params = toy_models.stack_layers(got.params)
  tokens, mask = got.expected["input_ids"], got.expected["target_mask"]
  batch = {"decoder_input_tokens": tokens, "decoder_target_tokens": tokens}

  def loss(params):
    logits = model.logits(params, batch)
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(logits), got.expected["targets"][..., None], axis=2
    )
    return -jnp.sum(picked[..., 0] * mask) / jnp.sum(mask), logits

  gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
  close(logits, got.expected["logits"], got.expected["logits_mask"], atol=5e-5)
  name = "model.layers.1.self_attn.k_proj.weight"
  expected = got.expected[f"grad/{name}"]
  stack = gradient["decoder"]["layers"]["self_attention"]["key"]["kernel"]
  np.testing.assert_allclose(
    stack[1].T, expected, rtol=0, atol=1e-4 * np.abs(expected).max()
  )


@each
def test_hidden_states_times_the_head_are_logits_before_the_cap(name):
  got = golden_hf.causal_results(name)
  product = got.hidden @ np.asarray(got.model.output_head(got.params))
  cap = got.model.config.final_softcap
  expected = product if cap is None else cap * np.tanh(product / cap)
  np.testing.assert_allclose(expected, got.logits, rtol=0, atol=5e-5)


# --- A windowed decoder with grouped heads -----------------------------------------


@pytest.fixture(scope="module")
def small():
  """A model, its parameters, and rows of prompts and outputs."""
  config = network.RotaryConfig(
    vocab_size=toy.VOCAB,
    emb_dim=8,
    num_heads=4,
    num_kv_heads=2,
    num_layers=2,
    head_dim=4,
    mlp_dim=8,
    window=3,
    window_pattern=[True, False],
    final_softcap=3.0,
  )
  model = models.DecoderOnlyModel(network.CausalTransformer(config))
  return model, toy.params(model, 3), toy.pairs(8)


def test_packed_rows_have_the_logits_of_unpacked_ones(small):
  model, params, pairs = small
  logits = lambda batch: np.asarray(jax.jit(model.logits)(params, batch))
  packed = logits(toy.packed([pairs[:4]], 40))[0]
  apart = logits(toy.rows(pairs[:4]))
  start = 0
  for i, (prompt, output) in enumerate(pairs[:4]):
    size = len(prompt) + len(output)
    here = packed[start : start + size]
    np.testing.assert_allclose(here, apart[i, :size], rtol=1e-5, atol=1e-5)
    start += size
  assert start > 20


# tests/decoding/test_loops.py samples in slots, its decoder-only toy too.
@pytest.mark.nightly
def test_samples_in_slots_are_those_of_all_rows_together(small):
  """Their log-probs are those of the full forward pass, its capped logits."""
  model, params, pairs = small
  batch = toy.rows(pairs)
  draw = jax.jit(
    lambda slots: model.sample(
      params, (), batch, jax.random.key(1), slots=slots
    ),
    static_argnums=0,
  )
  together, slots = draw(None), draw(3)
  np.testing.assert_array_equal(slots.tokens, together.tokens)
  np.testing.assert_allclose(slots.log_probs, together.log_probs, atol=1e-5)
  # Rows of several lengths, or the slots were not refilled.
  assert len(set(np.count_nonzero(np.asarray(slots.tokens), axis=1))) > 2
  weights = sampling.sequence_weights(together.tokens)
  rows = batch | model.output_features(batch, together.tokens, weights)
  picked = np.take_along_axis(
    log_softmax64(model.logits(params, rows)),
    np.asarray(rows["decoder_target_tokens"])[..., None],
    axis=-1,
  )[..., 0]
  for i, (prompt, _) in enumerate(pairs):
    count = min(int(weights[i].sum()), toy.WIDTH - len(prompt))
    np.testing.assert_allclose(
      together.log_probs[i, :count],
      picked[i, len(prompt) : len(prompt) + count],
      atol=1e-5,
    )


@pytest.mark.parametrize(
  "fields, said",
  [
    ({"num_kv_heads": 3}, "num_kv_heads that divides num_heads 8, got 3"),
    ({"head_dim": 5}, "an even head_dim, got 5"),
    ({"window_pattern": (True,)}, "a window of at least 1 for window_pattern"),
    ({"rope_bands": (1.0,)}, "rope_bands of low, high and length"),
    (
      {"num_layers": 0},
      "at least 1, got 0; set network.RotaryConfig.num_layers",
    ),
  ],
)
def test_configurations_that_cannot_be(fields, said):
  with pytest.raises(ValueError, match=said):
    network.RotaryConfig(vocab_size=8, **fields)


def test_frequencies_by_hand():
  # Of 8 channels and base 16: 1, 1/2, 1/4, 1/8 radians a token.
  plain = 1 / 2.0 ** np.arange(4)
  get = rotary.frequencies
  np.testing.assert_allclose(get(8, 16.0), plain, rtol=1e-6)
  np.testing.assert_allclose(get(8, 16.0, 4.0), plain / 4, rtol=1e-6)
  # In 16 pi tokens they turn 8, 4, 2 and 1 times: the first two are kept, the last
  # is divided by 4, and the third is a half between: (1/4 + 1/16) / 2.
  bands = (1.0, 3.0, 16 * np.pi)
  expected = [1, 1 / 2, 5 / 32, 1 / 32]
  np.testing.assert_allclose(get(8, 16.0, 4.0, bands), expected, rtol=1e-6)
