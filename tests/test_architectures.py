"""The model of a configuration, and of the folder that its parameters are in."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from command_line import save_toy

import gin
from gkd_jax import architectures, models, network
from gkd_jax.checkpoints import export, huggingface
from gkd_jax.command_line import gin_settings

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hf"
STUDENT = {"setting": "STUDENT", "path_setting": "INITIAL_CHECKPOINT_PATH"}
CAUSAL = models.DecoderOnlyModel, network.CausalTransformer
T5GEMMA = models.EncoderDecoderModel, network.T5Gemma
T5 = models.EncoderDecoderModel, network.Transformer
KINDS = {
  "gemma2": CAUSAL,
  "gemma3_text": CAUSAL,
  "llama3": CAUSAL,
  "mistral": CAUSAL,
  "qwen2_window": CAUSAL,
  "qwen3": CAUSAL,
  "t5gemma_wide": T5GEMMA,
  "umt5": T5,
}


def kind(model):
  return type(model), type(model.module)


@pytest.mark.parametrize("folder", KINDS)
def test_a_folder_says_what_it_is(folder):
  model = architectures.model(checkpoint_path=GOLDEN / folder, **STUDENT)
  assert kind(model) == KINDS[folder]
  expected = huggingface.read_config(GOLDEN / folder, setting="X")
  assert model.config == expected
  # The same sizes, given, agree; how they are computed is free.
  given = architectures._with(
    expected, dtype="bfloat16", dropout_rate=0.1, remat_policy="full"
  )
  again = architectures.model(given, GOLDEN / folder, **STUDENT)
  assert again.config == given
  architectures.check_equal(given, GOLDEN / folder, **STUDENT)


def test_a_folder_of_ours_says_it_too(tmp_path):
  export.import_checkpoint(str(GOLDEN / "llama3"), str(tmp_path / "ours"))
  model = architectures.model(
    checkpoint_path=tmp_path / "ours",
    dropout_rate=0.1,
    dtype="bfloat16",
    **STUDENT,
  )
  assert kind(model) == CAUSAL
  assert (model.config.dropout_rate, model.config.dtype) == (0.1, "bfloat16")
  folder = save_toy(tmp_path / "toy", 32, 4, 64)
  assert kind(architectures.model(None, folder, **STUDENT)) == T5


def test_sizes_that_differ_from_the_folder_are_refused():
  path = GOLDEN / "gemma3_text"
  config = huggingface.read_config(path, setting="X")
  for wrong, said in (
    # No array's shape tells these apart.
    (
      {"rope_theta": 500.0},
      "rope_theta .* as INITIAL.* got rope_theta 500.0; ",
    ),
    (
      {"window": 5},
      "expected window 4, as INITIAL_CHECKPOINT_PATH has it, got",
    ),
    ({"norm_unit_offset": False}, "norm_unit_offset True"),
    ({"window_pattern": (True, False)}, "window_pattern"),
  ):
    other = dataclasses.replace(config, **wrong)
    with pytest.raises(ValueError, match=said):
      architectures.check_equal(other, path, **STUDENT)
  same = dataclasses.replace(
    config, query_pre_attn_scalar=float(config.query_pre_attn_scalar or 8)
  )
  architectures.check_equal(same, path, **STUDENT)
  longer = dataclasses.replace(config, window_pattern=config.window_pattern * 2)
  architectures.check_equal(longer, path, **STUDENT)
  # Without windowed layers the width of windows decides nothing.
  full = huggingface.read_config(GOLDEN / "llama3", setting="X")
  unused = dataclasses.replace(
    full,
    window=4,
    local_rope_theta=1e4,
    query_pre_attn_scalar=full.head_dim,
  )
  architectures.check_equal(unused, GOLDEN / "llama3", **STUDENT)
  t5 = network.T5Config(vocab_size=8)
  with pytest.raises(
    ValueError, match=r"network.RotaryConfig, as .* got network.T5Config; set S"
  ):
    architectures.check_equal(t5, path, **STUDENT)
  t5gemma = huggingface.read_config(GOLDEN / "t5gemma_wide", setting="X")
  deep = dataclasses.replace(t5gemma.encoder, rope_theta=3.0)
  with pytest.raises(ValueError, match=r"encoder.rope_theta 1"):
    architectures.check_equal(
      dataclasses.replace(t5gemma, encoder=deep),
      GOLDEN / "t5gemma_wide",
      **STUDENT,
    )


def test_what_an_old_folder_does_not_say_may_be_anything(tmp_path):
  folder = save_toy(tmp_path / "toy", 32, 4, 64)
  old = {"format": "gkd_jax", "vocab_size": 24}
  (tmp_path / "toy" / "config.json").write_text(json.dumps(old))
  sizes = {"vocab_size": 24, "emb_dim": 32, "num_heads": 4, "mlp_dim": 64}
  for config in (network.T5Config(**sizes), network.TransformerConfig(**sizes)):
    architectures.check_equal(config, folder, **STUDENT)
  (tmp_path / "decoder").mkdir()
  of_decoder = dataclasses.asdict(network.TransformerConfig(**sizes))
  (tmp_path / "decoder" / "config.json").write_text(
    json.dumps({"format": "gkd_jax"} | of_decoder)
  )
  shutil.copy(tmp_path / "toy" / "model.safetensors", tmp_path / "decoder")
  rotary = network.RotaryConfig(**of_decoder, num_kv_heads=4)
  with pytest.raises(ValueError, match=r"expected network.Transformer"):
    architectures.check_equal(rotary, tmp_path / "decoder", **STUDENT)
  other = network.T5Config(**sizes | {"vocab_size": 32})
  with pytest.raises(ValueError) as error:
    architectures.check_equal(other, folder, **STUDENT)
  assert str(error.value) == (
    "expected vocab_size 24, as INITIAL_CHECKPOINT_PATH has it, got vocab_size"
    " 32; set STUDENT = None, or INITIAL_CHECKPOINT_PATH"
  )
  # A part of a side.
  t5gemma = huggingface.read_config(GOLDEN / "t5gemma_wide", setting="X")
  (tmp_path / "toy" / "config.json").write_text(
    json.dumps(
      {"format": "gkd_jax", "encoder": {"vocab_size": 96, "num_layers": 7}}
      | {"decoder": {"vocab_size": 96}}
    )
  )
  with pytest.raises(ValueError, match=r"expected encoder.num_layers 7, "):
    architectures.check_equal(t5gemma, folder, **STUDENT)


def test_the_public_sizes_agree_with_folders_of_them(tmp_path):
  for family, macro in (
    ("gemma", "GEMMA3_270M"),
    ("t5gemma", "T5GEMMA_2B_2B"),
    ("qwen", "QWEN2_5_0_5B"),
    ("llama", "LLAMA3_1B"),
  ):
    gin_settings.parse(
      ["runs/sft.gin", f"models/{family}.gin"], [f"STUDENT = %{macro}"], []
    )
    given = gin.query_parameter("%STUDENT_MODEL").scoped_configurable_fn()
    folder = tmp_path / macro
    folder.mkdir()
    (folder / "config.json").write_text(
      json.dumps(huggingface.write_config(given.config, "float32"))
    )
    shutil.copy(GOLDEN / "llama" / "model.safetensors", folder)
    architectures.check_equal(given.config, folder, **STUDENT)


def test_gin_s_bindings_hold_for_each_kind():
  for folder, (of_model, of_network) in KINDS.items():
    gin_settings.parse(
      ["runs/gkd.gin"],
      [
        f"INITIAL_CHECKPOINT_PATH = '{GOLDEN / folder}'",
        f"TEACHER_CHECKPOINT_PATH = '{GOLDEN / folder}'",
        "TEACHER_WEIGHTS = 'bfloat16'",
        "TEACHER_SCAN_LAYERS = True",
        "PREFIX_LM = True",
        "NUM_REAL_TOKENS = 90",
        f"student/network.{of_network.__name__}.scan_layers = True",
        "DECODER_PARAMS = {'top_k': 3}",
        "DROPOUT_RATE = 0.25",
        "REMAT_POLICY = 'full'",
      ],
      [],
    )
    model = gin.get_configurable(models.GKDModel)()
    student, teacher = model.student, model.teacher
    assert kind(student) == kind(teacher) == (of_model, of_network)
    assert student.module.scan_layers and teacher.module.scan_layers
    assert student.config.dropout_rate == 0.25
    policies = student.config.remat_policy, teacher.config.remat_policy
    assert policies == ("full", "none")
    assert teacher.module.weights == "bfloat16"
    assert student.module.weights == "float32"
    assert student.default_decoder_params == {"top_k": 3}
    assert student.num_real_tokens == teacher.num_real_tokens == 90
    if of_model is models.DecoderOnlyModel:
      assert student.inputs_bidirectional_attention
