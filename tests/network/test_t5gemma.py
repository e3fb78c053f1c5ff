"""T5Gemma against numbers that transformers computed."""

import golden_hf
import jax
import jax.numpy as jnp
import nightly
import numpy as np
import pytest
import toy_models

from gkd_jax import models, network

NAMES = [
  "t5gemma_wide",
  "t5gemma_untied",
  "t5gemma2",
  pytest.param("t5gemma", marks=pytest.mark.nightly),
]
each = pytest.mark.parametrize("name", NAMES)


def results(name):
  return golden_hf.encoder_decoder_results(name, network.T5Gemma)


@each
def test_logits_and_hidden_states_equal_transformers(name):
  got = results(name)
  expected = got.expected
  targets = expected["logits_mask"]
  for values, key, mask, atol in (
    (got.logits, "logits", targets, 5e-5),
    (got.hidden, "hidden", targets, 1e-4),
    (got.encoded, "encoder_hidden", expected["attention_mask"], 1e-4),
    (got.log_probs, "target_log_probs", expected["target_mask"], 5e-5),
  ):
    kept = mask > 0
    np.testing.assert_allclose(
      values[kept], expected[key][kept], rtol=0, atol=atol, err_msg=key
    )


@each
def test_hidden_states_of_all_layers_equal_transformers(name):
  golden_hf.check_layers_of_both_sides(results(name))


@each
def test_gradients_equal_transformers(name):
  golden_hf.check_gradients(results(name))


@each
def test_cached_greedy_tokens_and_log_probs_equal_transformers(name):
  golden_hf.check_greedy(results(name))


short = pytest.mark.parametrize(
  "name",
  nightly.of(
    ["t5gemma_wide", "t5gemma_untied", "t5gemma", "t5gemma2"],
    ["t5gemma_wide", "t5gemma2"],
  ),
)


@short
def test_greedy_outputs_end_where_those_of_transformers_do(name):
  assert golden_hf.check_ends(name, results(name)) > 0


@short
def test_beams_and_their_scores_equal_transformers(name):
  golden_hf.check_beams(results(name))


@pytest.mark.parametrize(
  "name", nightly.of(["t5gemma_wide", "t5gemma2"], ["t5gemma_wide"])
)
def test_rows_padded_on_either_side_equal_a_row_alone(name):
  golden_hf.check_padding(results(name))


def test_a_model_axis_divides_the_heads_of_both_sides():
  side = lambda heads: network.RotaryConfig(
    vocab_size=16, num_heads=heads, num_kv_heads=1
  )
  assert network.T5GemmaConfig(side(6), side(4)).num_heads == 2


def test_hidden_states_times_the_head_are_logits_before_the_cap():
  for name in ("t5gemma_wide", "t5gemma_untied"):
    got = results(name)
    head = got.model.output_head(got.model.decoder_params(got.params))
    cap = got.model.config.final_softcap
    np.testing.assert_allclose(
      cap * np.tanh(got.hidden @ head / cap), got.logits, atol=1e-5
    )


@pytest.mark.parametrize(
  "name", nightly.of(["t5gemma_wide", "t5gemma2"], ["t5gemma_wide"])
)
def test_scanned_layers_have_the_same_logits(name):
  got = results(name)
  model = models.EncoderDecoderModel(
    network.T5Gemma(got.model.config, scan_layers=True)
  )
  batch = {
    "encoder_input_tokens": jnp.array(got.expected["input_ids"]),
    "decoder_input_tokens": jnp.array(got.expected["decoder_input_ids"]),
    "decoder_target_tokens": jnp.array(got.expected["decoder_input_ids"]),
  }
  params = toy_models.stack_layers(got.params)
  logits = jax.jit(model.logits)(params, batch)
  np.testing.assert_allclose(logits, got.logits, rtol=0, atol=2e-5)
