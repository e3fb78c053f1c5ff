"""Decoder-only families against numbers that transformers computed."""

import dataclasses

import golden_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_models

from gkd_jax import models, network

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
  # The last one is the norm's.
  of_layers = expected["layers_row0"][1:-1]
  got_layers = np.stack(got.layers)[: len(of_layers), 0]
  scale = np.abs(of_layers).max()
  np.testing.assert_allclose(got_layers, of_layers, rtol=0, atol=1e-5 * scale)


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
