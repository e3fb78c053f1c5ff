"""umT5, a T5 with relative positions in each layer, against transformers."""

import golden_hf
import jax
import nightly
import numpy as np
import pytest
import toy_models

from gkd_jax import models, network

each = pytest.mark.parametrize("name", ["umt5", "umt5_tied"])


def results(name):
  return golden_hf.encoder_decoder_results(name, network.Transformer)


@pytest.mark.parametrize(
  "name", nightly.of(["umt5", "umt5_tied"], ["umt5_tied"])
)
def test_logits_and_hidden_states_equal_transformers(name):
  got = results(name)
  expected = got.expected
  hidden = got.hidden
  if got.model.config.logits_via_embedding:
    # Ours has the division by sqrt(D).
    hidden = hidden * np.sqrt(got.model.config.emb_dim)
  for values, key, mask in (
    (got.logits, "logits", "logits_mask"),
    (hidden, "hidden", "logits_mask"),
    (got.encoded, "encoder_hidden", "attention_mask"),
    (got.log_probs, "target_log_probs", "target_mask"),
  ):
    kept = expected[mask] > 0
    np.testing.assert_allclose(
      values[kept], expected[key][kept], rtol=0, atol=2e-4, err_msg=key
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
  "name", nightly.of(["umt5", "umt5_tied"], ["umt5_tied"])
)


@short
def test_greedy_outputs_end_where_those_of_transformers_do(name):
  assert golden_hf.check_ends(name, results(name)) > 0


# test_t5gemma has this too.
@pytest.mark.nightly
@each
def test_rows_padded_on_either_side_equal_a_row_alone(name):
  # transformers' own logits of umT5 are off by 4.8e-5 in float32.
  golden_hf.check_padding(results(name), 5e-5)


@short
def test_beams_and_their_scores_equal_transformers(name):
  golden_hf.check_beams(results(name))


def test_scanned_layers_have_the_same_logits():
  got = results("umt5_tied")
  model = models.EncoderDecoderModel(
    network.Transformer(got.model.config, scan_layers=True)
  )
  batch = {
    "encoder_input_tokens": got.expected["input_ids"],
    "decoder_input_tokens": got.expected["decoder_input_ids"],
    "decoder_target_tokens": np.maximum(got.expected["labels"], 0),
  }
  params = toy_models.stack_layers(got.params)
  logits = jax.jit(model.logits)(params, batch)
  kept = got.expected["logits_mask"] > 0
  np.testing.assert_allclose(logits[kept], got.logits[kept], atol=1e-4)
