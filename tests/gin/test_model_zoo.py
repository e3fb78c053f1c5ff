"""The model files: sizes of the published models, their checkpoints by name."""

import re

import pytest

import gin
from gkd_jax import files, network
from gkd_jax.checkpoints import parameters
from gkd_jax.command_line import gin_settings

# Parameters of the public checkpoints, as `transformers` counts them in models
# of their published configurations.
SIZES = {
  "t5_1_0": {
    "T5_1_0_SMALL": 60_506_624,
    "T5_1_0_BASE": 222_903_552,
    "T5_1_0_LARGE": 737_668_096,
    "T5_1_0_XL": 2_851_598_336,
    "T5_1_0_3B": 2_851_598_336,
    "T5_1_0_XXL": 11_307_321_344,
    "T5_1_0_11B": 11_307_321_344,
  },
  "t5_1_1": {
    "T5_1_1_SMALL": 76_961_152,
    "T5_1_1_BASE": 247_577_856,
    "T5_1_1_LARGE": 783_150_080,
    "T5_1_1_XL": 2_849_757_184,
    "T5_1_1_XXL": 11_135_332_352,
  },
  "flan_t5": {
    "FLAN_T5_SMALL": 76_961_152,
    "FLAN_T5_BASE": 247_577_856,
    "FLAN_T5_LARGE": 783_150_080,
    "FLAN_T5_XL": 2_849_757_184,
    "FLAN_T5_XXL": 11_135_332_352,
  },
  "mt5": {
    "MT5_SMALL": 300_176_768,
    "MT5_BASE": 582_401_280,
    "MT5_LARGE": 1_229_581_312,
    "MT5_XL": 3_742_619_648,
    "MT5_XXL": 12_921_057_280,
  },
  "byt5": {
    "BYT5_SMALL": 299_637_760,
    "BYT5_BASE": 581_653_248,
    "BYT5_LARGE": 1_228_183_552,
    "BYT5_XL": 3_737_801_728,
    "BYT5_XXL": 12_906_899_328,
  },
}


def parse(family, macro, folder):
  """A run's file that takes its network from one of the model files."""
  file = folder / "run.gin"
  file.write_text(
    f"""
from __gin__ import dynamic_registration
from gkd_jax import network
include 'models/{family}.gin'
DROPOUT_RATE = 0.25
network.Transformer.config = %{macro}
"""
  )
  gin_settings.parse([str(file)], [], [])


@pytest.mark.parametrize(
  ("family", "macro"),
  [
    # The others take a second each to trace.
    pytest.param(
      family,
      macro,
      marks=() if "SMALL" in macro else pytest.mark.nightly,
    )
    for family, macros in SIZES.items()
    for macro in macros
  ],
)
def test_parameters_of_a_size(tmp_path, family, macro):
  parse(family, macro, tmp_path)
  config = gin.get_configurable(network.Transformer)().config
  assert parameters.count(config) == SIZES[family][macro]
  assert config.dropout_rate == 0.25 and config.dtype == "bfloat16"
  assert config.logits_via_embedding == (family == "t5_1_0")
  assert config.vocab_size % 128 == 0


@pytest.mark.parametrize("family", SIZES)
def test_a_checkpoint_for_every_size(tmp_path, family):
  first = next(iter(SIZES[family]))
  parse(family, first, tmp_path)
  text = re.sub(r"\\\n\s*", "", gin.config_str())
  macros = dict(re.findall(r"^([A-Z][A-Z0-9_]*) = '(.*)'$", text, re.M))
  # 3B and 11B are other names.
  sizes = [m for m in SIZES[family] if not re.search(r"\d+B$", m)]
  assert len(sizes) == 5
  for macro in sizes:
    path = macros[f"{macro}_CHECKPOINT"]
    size = macro.rsplit("_", 1)[1].lower()
    size = {"t5_1_0xl": "3B", "t5_1_0xxl": "11B"}.get(family + size, size)
    assert re.fullmatch(
      rf"gs://t5-data/pretrained_models/t5x/\w+_{size}/checkpoint_\d+", path
    )
    # The path of a bucket is not turned into a local one.
    assert str(files.absolute(path)) == path
  lm = [m for m in macros if m.endswith("_LM_CHECKPOINT")]
  assert len(lm) == (5 if family in ("t5_1_1", "flan_t5", "mt5") else 0)
  vocabularies = [m for m in macros if m.endswith("VOCABULARY_PATH")]
  assert len(vocabularies) == (family != "byt5")
