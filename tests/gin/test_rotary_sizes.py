"""The model files of families with rotary positions: sizes of published models."""

import jax
import jax.numpy as jnp
import pytest

import gin
from gkd_jax import infer, models, network
from gkd_jax.checkpoints import huggingface, parameters
from gkd_jax.command_line import gin_settings

# Parameters of the published models.
SIZES = {
  "llama": {
    "LLAMA3_1B": 1_235_814_400,
    "LLAMA3_3B": 3_212_749_824,
    "LLAMA3_8B": 8_030_261_248,
    "LLAMA3_70B": 70_553_706_496,
    "SMOLLM2_135M": 134_515_008,
    "SMOLLM2_360M": 361_821_120,
    "SMOLLM2_1_7B": 1_711_376_384,
  },
  "mistral": {
    "MISTRAL_7B_V1": 7_241_732_096,
    "MISTRAL_7B_V3": 7_248_023_552,
    "MISTRAL_NEMO": 12_247_782_400,
  },
  "qwen": {
    "QWEN2_5_0_5B": 494_032_768,
    "QWEN2_5_1_5B": 1_543_714_304,
    "QWEN2_5_3B": 3_085_938_688,
    "QWEN2_5_7B": 7_615_616_512,
    "QWEN3_0_6B": 596_049_920,
    "QWEN3_1_7B": 1_720_574_976,
    "QWEN3_4B": 4_022_468_096,
    "QWEN3_8B": 8_190_735_360,
  },
  "gemma": {
    "GEMMA2_2B": 2_614_341_888,
    "GEMMA2_9B": 9_241_705_984,
    "GEMMA2_27B": 27_227_128_320,
    "GEMMA3_270M": 268_098_176,
    "GEMMA3_1B": 999_885_952,
    "GEMMA3_4B": 3_880_263_168,
  },
}
T5GEMMA = "2B_2B", "9B_9B", "9B_2B", "S", "B", "L", "XL"
IN_SHORT = "GEMMA3_270M", "LLAMA3_1B"


def config_of(macro, family, module, folder):
  file = folder / "run.gin"
  file.write_text(
    f"""
from __gin__ import dynamic_registration
from gkd_jax import network
include 'models/{family}.gin'
DROPOUT_RATE = 0.25
network.{module}.config = %{macro}
"""
  )
  gin_settings.parse([str(file)], [], [])
  return gin.get_configurable(getattr(network, module))().config


@pytest.mark.parametrize(
  "family, macro",
  [
    pytest.param(
      family,
      macro,
      marks=() if macro in IN_SHORT else pytest.mark.nightly,
    )
    for family, macros in SIZES.items()
    for macro in macros
  ],
)
def test_parameters_of_a_size(tmp_path, family, macro):
  config = config_of(macro, family, "CausalTransformer", tmp_path)
  # One layer is traced in place of up to 80.
  module = network.CausalTransformer(config, scan_layers=True)
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = jax.eval_shape(
    lambda: module.init(jax.random.key(0), tokens, tokens, enable_dropout=False)
  )["params"]
  assert parameters.count_array_elements(params) == SIZES[family][macro]
  assert config.dropout_rate == 0.25 and config.dtype == "bfloat16"
  wrote = huggingface.write_config(config, "bfloat16")
  assert wrote["model_type"] == config.family


@pytest.mark.parametrize("size", T5GEMMA)
def test_sides_of_a_t5gemma(tmp_path, size):
  config = config_of(f"T5GEMMA_{size}", "t5gemma", "T5Gemma", tmp_path)
  sides = config.encoder, config.decoder
  widths = {"2B": 2304, "9B": 3584, "S": 512, "B": 768, "L": 1024, "XL": 2048}
  named = size.split("_") * (1 if "_" in size else 2)
  assert [side.emb_dim for side in sides] == [widths[name] for name in named]
  assert [side.logits_via_embedding for side in sides] == [False, True]
  wrote = huggingface.write_config(config, "bfloat16")
  assert wrote["model_type"] == "t5gemma" and wrote["tie_word_embeddings"]


RUNS = {
  "causal": ("llama", "LLAMA3_1B", "LLAMA3_8B", "CausalTransformer"),
  "t5gemma": ("t5gemma", "T5GEMMA_2B_2B", "T5GEMMA_9B_2B", "T5Gemma"),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_s_student_and_teacher(run):
  family, student, teacher, module = RUNS[run]
  gin_settings.parse(
    ["runs/gkd.gin", f"models/{family}.gin"],
    [
      f"STUDENT = %{student}",
      f"TEACHER = %{teacher}",
      "LOSS_CHUNK_SIZE = None",
    ],
    [],
  )
  model = gin.get_configurable(models.GKDModel)()
  networks = model.student.module, model.teacher.module
  assert {type(of) for of in networks} == {getattr(network, module)}
  assert [of.weights for of in networks] == ["float32", "auto"]
  deep, wide = (of.config for of in networks)
  if run == "causal":
    assert (deep.num_layers, wide.num_layers) == (16, 32)
  else:
    assert deep.decoder == wide.decoder and deep.encoder != wide.encoder


@pytest.mark.parametrize("run", RUNS)
def test_what_is_decoded(run):
  family, student, _, module = RUNS[run]
  gin_settings.parse(
    [f"models/{family}.gin", "runs/eval.gin"],
    ["WEIGHTS = 'int8'", f"STUDENT = %{student}"],
    [],
  )
  assert gin.get_configurable(infer.evaluate_checkpoint) is not None
  model = gin.query_parameter("%STUDENT_MODEL").scoped_configurable_fn()
  assert type(model.module) is getattr(network, module)
  assert model.module.weights == "int8"
