"""Exports of the rotary families and umT5: transformers reads and generates the same."""

import os

import golden_hf
import numpy as np
import pytest

from gkd_jax import checkpoints, models, network
from gkd_jax.checkpoints import export

torch = pytest.importorskip(
  "torch", reason="torch is in the extra hf: pip install gkd_jax[hf]"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip(
  "transformers",
  reason="transformers is in the extra hf: pip install gkd_jax[hf]",
)
VERSION = int(transformers.__version__.split(".")[0])
NAMES = sorted(
  path.name
  for path in golden_hf.FOLDERS.iterdir()
  if (path / "golden.npz").exists()
  if VERSION > 4 or path.name != "t5gemma2"
)


def load(folder, given):
  """Their model, with the attention that has soft caps."""
  with_encoder = (
    "decoder_input_ids" in given and given["decoder_start_token_id"] >= 0
  )
  kind = (
    transformers.AutoModelForSeq2SeqLM
    if with_encoder
    else transformers.AutoModelForCausalLM
  )
  model, report = kind.from_pretrained(
    folder,
    attn_implementation="eager",
    torch_dtype=torch.float32,
    output_loading_info=True,
  )
  # An export of a T5Gemma 2 has no parameters for images.
  missing = {k for k in report.pop("missing_keys") if "encoder.vision" not in k}
  missing = {k for k in missing if "multi_modal" not in k}
  assert not missing and not any(report.values()), report
  return model.eval(), with_encoder


def run(folder, given):
  """Their logits, and what they generate greedily, ends included."""
  model, with_encoder = load(folder, given)
  of = lambda name: torch.tensor(given[name], dtype=torch.long)
  options = {
    "max_new_tokens": given["greedy"].shape[1],
    "do_sample": False,
    "top_k": None,
    "top_p": None,
  }
  if not with_encoder and (given["pad_token_id"] < 0):
    options["pad_token_id"] = 0
  if with_encoder:
    inputs = {
      "input_ids": of("input_ids"),
      "attention_mask": of("attention_mask"),
    }
    forward = inputs | {"decoder_input_ids": of("decoder_input_ids")}
    # The cache of version 4 loses encoder positions of windowed layers.
    options["use_cache"] = False
  else:
    forward = {
      "input_ids": of("input_ids"),
      "attention_mask": of("attention_mask"),
    }
    inputs = {
      "input_ids": of("left_input_ids"),
      "attention_mask": of("left_attention_mask"),
    }
  with torch.no_grad():
    logits = model(**forward).logits.numpy()
    tokens = model.generate(**inputs, **options).numpy()
  start = 1 if with_encoder else inputs["input_ids"].shape[1]
  return logits, tokens[:, start:]


def test_the_text_part_of_a_gemma_3_with_images(tmp_path):
  text = golden_hf.config_json("gemma3_text_linear")
  config = transformers.Gemma3Config(
    text_config=text,
    vision_config=dict(
      hidden_size=8,
      intermediate_size=8,
      num_hidden_layers=1,
      num_attention_heads=1,
      image_size=8,
      patch_size=4,
    ),
    eos_token_id=[1, 9],
  )
  torch.manual_seed(0)
  model = transformers.Gemma3ForConditionalGeneration(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn(parameter.shape))
  model.save_pretrained(tmp_path)
  tokens = golden_hf.numbers("gemma3_text_linear")["input_ids"]
  with torch.no_grad():
    expected = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  config, params = checkpoints.load_model(tmp_path)
  ours = models.DecoderOnlyModel(network.CausalTransformer(config))
  logits = ours.logits(
    params, {"decoder_input_tokens": tokens, "decoder_target_tokens": tokens}
  )
  assert expected.std() > 0.1
  np.testing.assert_allclose(logits[0], expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_and_generates_the_same_of_an_export(
  name, tmp_path
):
  folder, given = golden_hf.FOLDERS / name, golden_hf.numbers(name)
  export.import_checkpoint(folder, tmp_path / "ours")
  export.export_checkpoint(tmp_path / "ours", tmp_path / "back", format="hf")
  logits, tokens = run(tmp_path / "back", given)
  their_logits, their_tokens = run(folder, given)
  kept = given["logits_mask"] > 0
  np.testing.assert_allclose(
    logits[kept], their_logits[kept], rtol=0, atol=1e-6
  )
  np.testing.assert_array_equal(tokens, their_tokens)
  if name.startswith("t5gemma") and name != "t5gemma2" and VERSION > 4:
    return  # its encoder's windows are one wider there
  np.testing.assert_allclose(
    logits[kept], given["logits"][kept], rtol=0, atol=2e-4
  )
  for row, expected in zip(tokens, given["greedy"], strict=True):
    ends = np.isin(expected, given["eos_token_ids"])
    length = np.argmax(ends) + 1 if ends.any() else len(expected)
    np.testing.assert_array_equal(row[:length], expected[:length])
