"""The gin files of RL + GKD, RLEF* and MiniLLM, by the command line."""

import json

import command_line
import jax
import numpy as np
import pytest

from gkd_jax import checkpoints

RUN = """
from __gin__ import dynamic_registration

from gkd_jax import network
from gkd_jax.tasks import text_rewards

include 'models/toy.gin'
MIXTURE_OR_TASK_NAME = 'arithmetic_cot_1k'
TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 12}
STUDENT = %TOY_STUDENT
BATCH_SIZE = 8
TRAIN_STEPS = 2
EVAL_SPLIT = None
CHECKPOINT_PERIOD = 1
LOG_PERIOD = 1
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  folder = tmp_path_factory.mktemp("methods")
  return {
    "teacher": command_line.save_toy_teacher(folder / "teacher"),
    "start": command_line.save_toy(folder / "start", 16, 2, 32, seed=1),
    "scorer": command_line.save_toy(
      folder / "scorer", 32, 4, 64, vocab_size=384, seed=2
    ),
  }


def train(method, tmp_path, text="", files=(), **macros):
  """Runs a method's file; returns (MODEL_DIR, rows of metrics.jsonl)."""
  run = tmp_path / "run.gin"
  run.write_text(RUN + text)
  model_dir = tmp_path / "model"
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(tmp_path)
    command_line.here(
      "train",
      f"--gin_file=methods/{method}.gin",
      *(f"--gin_file={file}" for file in files),
      f"--gin_file={run}",
      *command_line.gin(**{"MODEL_DIR": str(model_dir)} | macros),
    )
  lines = (model_dir / "metrics.jsonl").read_text().splitlines()
  return model_dir, [r for r in map(json.loads, lines) if "loss" in r]


WITH_TEACHER = "TEACHER = %TOY_TEACHER\n"


def of_teacher(folders):
  return {
    "TEACHER_CHECKPOINT_PATH": folders["teacher"],
    "INITIAL_CHECKPOINT_PATH": folders["start"],
  }


def check_mix(row, alpha=0.1):
  np.testing.assert_allclose(
    row["loss"],
    (1 - alpha) * row["policy_gradient"] + alpha * row["divergence"],
    rtol=1e-4,
    atol=1e-6,
  )


def leaves(folder):
  return jax.tree.leaves(checkpoints.load_params(folder))


# test_rlef has such a mix, tests/evaluation/test_entailment.py the scorer.
@pytest.mark.nightly
def test_rl_gkd_with_the_entailment_scorer(folders, tmp_path):
  text = WITH_TEACHER + (
    "import seqio\n"
    "SCORER = @scorer/network.T5Config()\n"
    "scorer/network.T5Config.vocab_size = 384\n"
    "scorer/network.T5Config.mlp_activations = ('gelu', 'linear')\n"
    "scorer/network.T5Config.head_dim = 8\n"
    "scorer/network.T5Config.num_encoder_layers = 1\n"
    "scorer/network.T5Config.num_decoder_layers = 1\n"
    "scorer/network.T5Config.emb_dim = 32\n"
    "scorer/network.T5Config.num_heads = 4\n"
    "scorer/network.T5Config.mlp_dim = 64\n"
    "SCORER_VOCABULARY = @seqio.ByteVocabulary()\n"
    "SCORER_INPUT_LENGTH = 48\n"
  )
  folder, rows = train(
    "rl_gkd",
    tmp_path,
    text,
    files=("runs/entailment.gin",),
    SCORER_CHECKPOINT_PATH=folders["scorer"],
    **of_teacher(folders),
  )
  assert [r["step"] for r in rows] == [1, 2]
  for row in rows:
    assert 0 < row["reward"] < 1 and row["divergence"] > 0
    check_mix(row)
  assert "models.RLGKDModel" in (folder / "config.gin").read_text()


def test_rlef(folders, tmp_path):
  _, rows = train(
    "rlef",
    tmp_path,
    "REWARD = @text_rewards.chain_answer\n",
    INITIAL_CHECKPOINT_PATH=folders["start"],
  )
  # The student's own start is the teacher: nothing is between them yet.
  assert abs(rows[0]["divergence"]) < 1e-6
  assert rows[0]["top1_agreement"] == 1
  assert rows[0]["reward"] == rows[0]["policy_gradient"] == 0
  check_mix(rows[1])


# tests/losses/test_minillm.py has its loss, test_methods reads its macros.
@pytest.mark.nightly
def test_minillm(folders, tmp_path):
  folder, rows = train("minillm", tmp_path, WITH_TEACHER, **of_teacher(folders))
  for row in rows:
    assert np.isfinite(row["sequence_reverse_kl"]) and row["reverse_kl"] > 0
    assert 0.5 < row["importance_weight"] < 1.25  # each is below 1 / 0.8
  moved = [
    np.abs(a - b).max()
    for a, b in zip(leaves(folder), leaves(folders["start"]), strict=True)
  ]
  assert max(moved) > 1e-5


@pytest.mark.nightly
def test_rl_gkd_stopped_and_resumed(folders, tmp_path):
  settings = of_teacher(folders) | {
    "BASELINE": "running_mean",
    "CREDIT": "token",
    "DISCOUNT": 0.9,
    "SAMPLES_PER_PROMPT": 2,
  }
  rewards = (
    "def length(inputs, outputs, examples):\n"
    "  return [len(x) for x in outputs]\n"
  )
  text = f"import my_rewards\n{WITH_TEACHER}REWARD = @my_rewards.length\n"
  ends = []
  for name, stops in (("whole", (3,)), ("parts", (2, 3))):
    (tmp_path / name).mkdir()
    (tmp_path / name / "my_rewards.py").write_text(rewards)
    for stop in stops:
      folder, rows = train(
        "rl_gkd", tmp_path / name, text, TRAIN_STEPS=stop, **settings
      )
    ends.append((leaves(folder), rows))
  (a, whole), (b, parts) = ends
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)
  assert whole[-1]["reward"] == parts[-1]["reward"] > 0
