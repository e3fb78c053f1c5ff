"""The paper's experiments as gin files: sizes, schedules and settings.

Nothing is allocated: networks, optimizers and whole training steps are traced
at full size. The numbers below are those of the paper's tables A.1 to A.4 and of
its section 4, written down apart from the gin files.
"""

import functools
import inspect
import pathlib
import re
import tempfile

import gin_probe
import jax
import numpy as np
import pytest

from gkd_jax import decoding, schedules, training

ROOT = pathlib.Path(__file__).parents[2] / "gin"
FOLDERS = ("xsum", "wmt14_en_de", "gsm8k", "flan")
SHARED = ("task", "sft", "distill")
FILES = [
  path.relative_to(ROOT).as_posix()
  for folder in FOLDERS
  for path in sorted((ROOT / "experiments" / folder).glob("*.gin"))
  if path.stem not in SHARED
]
# d_model, heads, layers of each side, d_ff: the published config.json of
# google/t5-v1_1-* and google/flan-t5-*, all with d_kv 64.
PUBLISHED = {
  "small": (512, 6, 8, 1024),
  "base": (768, 12, 12, 2048),
  "large": (1024, 16, 24, 2816),
  "xl": (2048, 32, 24, 5120),
}
# 77M, 250M, 800M and 3B in the paper's words.
COUNTS = {
  "small": 76_961_152,
  "base": 247_577_856,
  "large": 783_150_080,
  "xl": 2_849_757_184,
}
# steps, batch, peak rate, warm-up, start of cooldown, dropout, input and output
# lengths, temperature of the teacher, task.
TABLES = {
  "xsum": (40_000, 32, 3e-4, 2_000, 30_000, 0.0, 1024, 64, 1.0, "xsum"),
  "wmt14_en_de": (
    *(100_000, 32, 3e-4, 5_000, None, 0.0, 80, 80, 1.0),
    "wmt14_en_de",
  ),
  "gsm8k": (40_000, 32, 3e-4, 2_000, 30_000, 0.05, 512, 320, 0.1, "gsm8k_cot"),
  "flan": (50_000, 128, 1e-4, 0, None, 0.0, 2048, 256, 1.0, "flan"),
}
SFT_STEPS = {
  "xsum": {"small": 100_000, "base": 50_000, "large": 38_000, "xl": 8_000},
  "wmt14_en_de": {
    "small": 250_000,
    "base": 250_000,
    "large": 110_000,
    "xl": 50_000,
  },
  "gsm8k": dict.fromkeys(PUBLISHED, 10_000),
}
# Divergence, β, λ.
METHODS = {
  "supervised_kd": ("forward_kl", None, 0.0),
  "supervised_rkl": ("reverse_kl", None, 0.0),
  "imitkd": ("forward_kl", None, 0.5),
  "on_policy_fkl": ("forward_kl", None, 1.0),
  "on_policy_rkl": ("reverse_kl", None, 1.0),
  "on_policy_gkd": ("forward_kl", None, 1.0),
  "self_distillation": ("jsd", 0.9, 1.0),
}


def formula(size):
  """Parameters of a T5 1.1 by its published sizes."""
  d, heads, layers, ff = PUBLISHED[size]
  attention = 4 * d * heads * 64
  mlp = 3 * d * ff
  encoder = layers * (attention + mlp + 2 * d) + d + 32 * heads
  decoder = layers * (2 * attention + mlp + 3 * d) + d + 32 * heads
  return 2 * 32_128 * d + encoder + decoder


def names(file):
  """Folder, method, size of an experiment's file."""
  _, folder, stem = pathlib.PurePosixPath(file).with_suffix("").parts
  method, _, size = stem.rpartition("_")
  return (folder, stem, "base") if folder == "flan" else (folder, method, size)


@functools.cache
def built(file):
  """What a user's command makes; with those paths that it has to name."""
  # What the command in the header sets.
  command = (ROOT / file).read_text().partition("#   gkd train")[2]
  given = {
    name: "'somewhere'"
    for name in re.findall(r"^#     --gin\.([A-Z_]+)=", command, re.M)
  }
  assert "MODEL_DIR" in given
  with tempfile.TemporaryDirectory() as folder:
    return gin_probe.parts_of(file, pathlib.Path(folder), **given)


_COUNTED = {}


def count_of(model, lengths):
  """Parameters, traced at full size, once for each: nothing is allocated."""
  config = model.config
  key = tuple(getattr(config, f) for f in ("emb_dim", "mlp_dim", "num_heads"))
  if key not in _COUNTED:
    variables = jax.eval_shape(
      lambda: model.get_initial_variables(
        jax.random.key(0), shapes(lengths, rows=1)
      )
    )
    _COUNTED[key] = sum(x.size for x in jax.tree.leaves(variables["params"]))
  return _COUNTED[key]


def shapes(lengths, rows):
  return {
    "encoder_input_tokens": (rows, lengths["inputs"]),
    **dict.fromkeys(
      ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"),
      (rows, lengths["targets"]),
    ),
  }


def test_all_numbers_of_figure_1_have_a_file():
  for folder in ("xsum", "wmt14_en_de", "gsm8k"):
    for method in ("sft", "supervised_kd", "seqkd", "on_policy_gkd"):
      for size in ("small", "base", "large"):
        assert f"experiments/{folder}/{method}_{size}.gin" in FILES
    assert f"experiments/{folder}/sft_xl.gin" in FILES
  assert len(FILES) == 3 * 13 + 1 + 5


@pytest.mark.parametrize("file", FILES)
def test_sizes_are_the_published_ones(file):
  _, _, size = names(file)
  parts = built(file)
  model = parts["model"]
  assert formula(size) == COUNTS[size]
  assert count_of(model.student, parts["lengths"]) == COUNTS[size]
  # T5's vocabulary is padded: nothing is ever sampled from the padding.
  assert model.student.num_real_tokens == 32_100
  if model.teacher is not None:
    of_teacher = "large" if "self_distillation" in file else "xl"
    counted = count_of(model.teacher, parts["lengths"])
    assert counted == COUNTS[of_teacher]
    assert model.teacher.num_real_tokens == 32_100


@pytest.mark.parametrize("file", FILES)
def test_settings_are_those_of_the_tables(file):
  folder, method, size = names(file)
  parts = built(file)
  steps, batch, peak, warmup, cooldown, dropout, inputs, targets, heat, task = (
    TABLES[folder]
  )
  model, rate = parts["model"], parts["optimizer"].learning_rate
  at = functools.partial(schedules.host_value, rate)
  assert parts["lengths"] == {"inputs": inputs, "targets": targets}
  assert parts["batch_size"] == batch
  assert parts["task"] == ("somewhere" if method == "seqkd" else task)
  if folder == "wmt14_en_de":
    decode_fn = inspect.unwrap(model.student.decode_fn)  # gin wraps it
    assert decode_fn is decoding.beam_search
    assert model.student.default_decoder_params == {
      "num_decodes": 4,
      "alpha": 0.6,
    }
  if method == "sft":
    assert parts["train_steps"] == SFT_STEPS[folder][size]
    assert model.teacher is None
    return
  assert parts["train_steps"] == steps
  assert model.student.config.dropout_rate == dropout
  if (folder, size) == ("xsum", "small"):
    peak = 1e-3
  assert at(max(warmup, 1)) == pytest.approx(peak)
  assert at(warmup // 2) == pytest.approx(peak / 2 if warmup else peak)
  assert at(0) == (0.0 if warmup else pytest.approx(peak))
  if cooldown is None:
    assert at(steps) == pytest.approx(peak)
  else:
    assert at(cooldown) == pytest.approx(peak)
    assert at((cooldown + steps) // 2) == pytest.approx(peak / 2)
    assert at(steps) == 0.0
  if method == "seqkd":
    assert model.teacher is None
    return
  expected = METHODS[method]
  if (folder, method) == ("wmt14_en_de", "on_policy_gkd"):
    expected = ("jsd", 0.1, 1.0)
  found = (model.divergence, model.beta, model.student_data_fraction)
  assert found == expected
  assert model.teacher_temperature == heat
  assert model.sampling["temperature"] == model.student_temperature == 1.0
  assert model.sampling["top_k"] == 0 and model.sampling["top_p"] == 1.0
  assert model.length_normalization == "sequence"


@pytest.mark.parametrize("file", FILES)
def test_header_says_how_to_run_it_and_what_to_expect(file):
  text = (ROOT / file).read_text()
  header = text.partition("from __gin__")[0]
  assert f"gkd train --gin_file={file} \\\n" in header
  assert "Expected" in header
  assert "[D]" in header or "[P]" in header
  assert re.search(r"TPU v3-8, about [\d.]+ hours? \(an estimate", header)
  # Whatever the command names is a macro that must or may be given.
  assert r"--gin.MODEL_DIR=\"RUNS/" in header


# The toys' steps are traced, and more, by tests/training/test_trainer.py.
@pytest.mark.nightly
@pytest.mark.parametrize("folder", ["xsum", "gsm8k"])  # with dropout: gsm8k
def test_a_step_of_the_small_student_traces_at_full_size(folder):
  parts = built(f"experiments/{folder}/on_policy_gkd_small.gin")
  model, optimizer, rows = (
    parts[k] for k in ("model", "optimizer", "batch_size")
  )
  batch = {
    k: jax.ShapeDtypeStruct(v, np.int32)
    for k, v in shapes(parts["lengths"], rows).items()
  }
  params, teacher_params = (
    jax.eval_shape(
      lambda m=m: m.get_initial_variables(
        jax.random.key(0), shapes(parts["lengths"], 1)
      )
    )["params"]
    for m in (model.student, model.teacher)
  )
  state = jax.eval_shape(
    lambda p: training.create(p, optimizer.transform), params
  )
  new, metrics = jax.eval_shape(
    functools.partial(
      training.train_step,
      model=model,
      optimizer=optimizer,
      seed=0,
      source="student",
    ),
    state,
    teacher_params,
    batch,
  )
  assert jax.tree.map(lambda x: x.shape, new) == jax.tree.map(
    lambda x: x.shape, state
  )
  assert metrics["sampled_length"][0].shape == ()
