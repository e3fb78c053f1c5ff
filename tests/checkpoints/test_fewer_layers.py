"""`gkd import --layers`: a student of some of its teacher's layers."""

import json
import shutil

import golden_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import message
from flax import traverse_util
from safetensors import numpy as library

from gkd_jax import checkpoints, network
from gkd_jax.checkpoints import export, fewer_layers

LEGACY = golden_hf.FOLDERS.parent / "t5x_orbax"
# Without these a layer adds nothing.
OUT = ("o_proj", "down_proj", "SelfAttention.o", "EncDecAttention.o", ".wo.")


@pytest.mark.parametrize(
  "text, depth, expected",
  [
    ("every:2", 30, range(0, 30, 2)),
    ("every:3", 7, [0, 3, 6]),
    ("every:1", 3, [0, 1, 2]),
    ("every:9", 4, [0]),
    ("0,3,7", 8, [0, 3, 7]),
    ("5", 6, [5]),
  ],
)
def test_layers_are_numbers_or_every_one_of_n(text, depth, expected):
  assert fewer_layers.choose(text, depth, "--layers") == tuple(expected)


@pytest.mark.parametrize("text", ["0,8", "3,0", "1,1", "", "0,-1", "every:0"])
def test_other_layers_are_refused(text):
  with pytest.raises(ValueError) as error:
    fewer_layers.choose(text, 8, "--layers")
  assert f"below 8, or every:N, got {text!r}; set --layers" in message(error)


def mute(folder, kept):
  """Makes the layers that are not kept add nothing to the residual stream.

  Args:
    folder: of Hugging Face's, changed.
    kept: part of a parameter's name, such as "decoder", to layers.
  """
  file = folder / "model.safetensors"
  tensors = library.load_file(file)
  for name, array in tensors.items():
    for side, layers in kept.items():
      words = name.replace("block.", "layers.").split(".")
      if side in name and any(part in name for part in OUT):
        number = int(words[words.index("layers") + 1])
        tensors[name] = array * (number in layers)
  library.save_file(tensors, file)


def logits(path):
  config, params = checkpoints.load_model(path)
  module = {
    network.RotaryConfig: network.CausalTransformer,
    network.T5GemmaConfig: network.T5Gemma,
    network.T5Config: network.Transformer,
  }[type(config)](config)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(3, 96, (2, 9)))
  inputs = (tokens,) * (2 if len(config.depths) == 1 else 3)
  apply = jax.jit(
    lambda params: module.apply(
      {"params": params}, *inputs, enable_dropout=False
    )
  )
  return apply(params)


# Windows of 4, two bases of rotation; sides of unequal depth; a bias per layer.
@pytest.mark.parametrize(
  "name, flags, kept",
  [
    ("gemma3_text", {"layers": "1,4,5"}, {"model": (1, 4, 5)}),
    (
      "t5gemma_wide",
      {"layers": "1", "encoder_layers": "0,3"},
      {"encoder": (0, 3), "decoder": (1,)},
    ),
    *(
      pytest.param(*case, marks=pytest.mark.nightly)
      for case in (
        ("gemma3_text", {"layers": "5"}, {"model": (5,)}),
        ("qwen2_window", {"layers": "1,3"}, {"model": (1, 3)}),
        ("umt5", {"layers": "every:2"}, {"encoder": (0,), "decoder": (0, 2)}),
      )
    ),
  ],
)
def test_a_student_computes_what_its_teacher_does_without_the_other_layers(
  name, flags, kept, tmp_path
):
  folder = shutil.copytree(golden_hf.FOLDERS / name, tmp_path / "teacher")
  mute(folder, kept)
  export.import_checkpoint(folder, tmp_path / "student", **flags)
  got = logits(tmp_path / "student")
  np.testing.assert_allclose(got, logits(folder), atol=2e-5)
  # In transformers' form, too.
  export.export_checkpoint(tmp_path / "student", tmp_path / "hf", format="hf")
  again, student = (
    checkpoints.load_model(tmp_path / name)[0] for name in ("hf", "student")
  )
  assert again == student


def test_the_configuration_of_windows_follows(tmp_path):
  given = golden_hf.FOLDERS / "gemma3_text"
  full, sliding = "full_attention", "sliding_attention"
  for layers, kinds in (("0,5", [sliding, full]), ("5", [full])):
    export.import_checkpoint(given, tmp_path / layers, layers=layers)
    hf = tmp_path / f"hf_{layers}"
    export.export_checkpoint(tmp_path / layers, hf, format="hf")
    text = json.loads((hf / "config.json").read_text())
    assert (text["layer_types"], text["num_hidden_layers"]) == (
      kinds,
      len(kinds),
    )
  theirs = library.load_file(given / "model.safetensors")
  ours = library.load_file(hf / "model.safetensors")
  moved = {k.replace("layers.5.", "layers.0."): k for k in theirs}
  for name, array in ours.items():
    source = moved[name] if "layers" in name else name
    np.testing.assert_array_equal(array, theirs[source])


def test_a_t5_keeps_its_shared_positions(tmp_path):
  before = traverse_util.flatten_dict(checkpoints.load_params(LEGACY), sep="/")
  config = export.import_checkpoint(
    LEGACY, tmp_path / "a", layers="1", encoder_layers="every:2"
  )
  assert (config.num_encoder_layers, config.num_decoder_layers) == (1, 1)
  after = traverse_util.flatten_dict(
    checkpoints.load_model(tmp_path / "a")[1], sep="/"
  )
  for name, array in after.items():
    source = name.replace("decoder/layers_0", "decoder/layers_1")
    np.testing.assert_array_equal(array, before[source])
  assert "encoder/relpos_bias/rel_embedding" in after


def test_a_decoder_has_no_encoder_s_layers(tmp_path):
  given = golden_hf.FOLDERS / "llama"
  for flags, text in (
    ({"layers": "0", "encoder_layers": "1"}, "got '1'; set --layers without"),
    ({"encoder_layers": "1"}, "expected --layers with --encoder_layers=1"),
    ({"layers": "0,9"}, "got '0,9'; set --layers"),
  ):
    with pytest.raises(ValueError) as error:
      export.import_checkpoint(given, tmp_path / "a", **flags)
    assert text in message(error)
  assert not (tmp_path / "a").exists()
