"""From files of rows and folders of models to a student: nothing in Python."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_tokenizers
from command_line import gin, here

from gkd_jax import checkpoints

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "hf"
ROWS = [
  {"inputs": f"{a} {b}", "targets": f"{b} {a}"}
  for a in ("ab", "cd", "ef", "gh")
  for b in ("ij", "kl", "mn", "op")
]


def folder(name, path, make, **config):
  """A tiny model of Hugging Face's with a tokenizer of its ids."""
  path.mkdir()
  for file in ("config.json", "generation_config.json", "model.safetensors"):
    shutil.copyfile(GOLDEN / name / file, path / file)
  return make(path, **config)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def settings(rows, inputs):
  pathlib.Path("data.gin").write_text(
    f"TRAIN_FILES = {rows!r}\n"
    f"TASK_FEATURE_LENGTHS = {{'inputs': {inputs}, 'targets': 8}}\n"
    "VALIDATION_FRACTION = 0.25\n"
    "METRICS = ('exact', 'chrf')\n"
    "BATCH_SIZE = 8\n"
  )
  pathlib.Path("run.gin").write_text(
    "include 'runs/gkd.gin'\n"
    "include 'data.gin'\n"
    "TEACHER_CHECKPOINT_PATH = 'teacher'\n"
    "INITIAL_CHECKPOINT_PATH = 'student'\n"
    "MODEL_DIR = 'run'\n"
    "TRAIN_STEPS = 2\n"
    "EVAL_BATCH_SIZE = 8\n"
  )


def train():
  here("train", "--gin_file=run.gin")
  done = [r for r in lines(pathlib.Path("run/metrics.jsonl")) if "loss" in r]
  assert done[-1]["step"] == 2 and done[-1]["loss"] > 0


def decode():
  """Runs `gkd eval` and `gkd infer`, which decode as the run did."""
  run = pathlib.Path("run")
  given = ["--gin_file=data.gin", "--gin.CHECKPOINT_PATH='run'"]
  here(
    *("eval", "--gin_file=runs/eval.gin", *given),
    *gin(EVAL_OUTPUT_DIR="run/eval"),
  )
  here(
    *("infer", "--gin_file=runs/infer.gin", *given),
    *gin(EVAL_SPLIT="validation", OUTPUT_PATH="out.jsonl"),
  )
  scored = lines(run / "eval" / "predictions.jsonl")
  outputs = lines(pathlib.Path("out.jsonl"))
  assert len(scored) == len(outputs) == 4
  shown = [r for r in lines(run / "examples.jsonl") if r["step"] == 2]
  for a, b, c in zip(shown, scored, outputs, strict=True):
    assert a["student"] == b["prediction"] == c["prediction"]
    assert a["reference"] == b["target"]
  expected = {row["targets"] for row in ROWS}
  assert {row["target"] for row in scored} <= expected


def export():
  """Runs `gkd export`, and compares folders."""
  here(*("export", "--checkpoint_path=run", "--output_path=hf", "--format=hf"))
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (
      pathlib.Path("hf", name).read_bytes()
      == pathlib.Path("student", name).read_bytes()
    )
  exported = checkpoints.load_params("hf")
  trained = checkpoints.load_params("run")
  start = checkpoints.load_params("student")

  def embedding(params):
    of_decoder = params["decoder"].get("token_embedder")
    return (of_decoder or params["token_embedder"])["embedding"]

  np.testing.assert_array_equal(embedding(exported), embedding(trained))
  assert not np.array_equal(embedding(start), embedding(trained))
  assert checkpoints.load_special_tokens("hf") == (
    checkpoints.load_special_tokens("student")
  )


def test_rows_and_folders_of_t5gemma_make_a_student(tmp_path, capsys):
  folder("t5gemma", tmp_path / "teacher", tiny_tokenizers.unigram)
  folder("t5gemma_untied", tmp_path / "student", tiny_tokenizers.unigram)
  write(tmp_path / "rows.jsonl", ROWS)
  settings("rows.jsonl", 8)
  here("train", "--gin_file=run.gin", "--dry_run")
  said = capsys.readouterr().out
  assert "EOS 1, PAD 0, decoders read 2 first" in said
  assert "4 examples of 'validation', by exact, chrf" in said
  assert "TRAIN_FILES = 'rows.jsonl'" in said and "parameters" in said
  assert not (tmp_path / "run").exists()
  train()
  decode()
  export()


def test_conversations_and_folders_of_llama_make_a_student(tmp_path, capsys):
  for name in ("teacher", "student"):
    folder(
      "llama_pad_is_eos",
      tmp_path / name,
      tiny_tokenizers.letters,
      chat_template=tiny_tokenizers.TEMPLATE,
    )
  turn = lambda role, text: {"role": role, "content": text}
  write(
    tmp_path / "chat.jsonl",
    [
      {"messages": [turn("user", r["inputs"]), turn("assistant", r["targets"])]}
      for r in ROWS
    ],
  )
  settings("chat.jsonl", 48)
  with open("run.gin", "a") as file:  # the student's own start is its teacher's
    file.write("STUDENT_DATA_FRACTION = 0.0\nDIVERGENCE = 'reverse_kl'\n")
    file.write("HARD_LABEL_WEIGHT = 0.5\n")
  train()
  export()
  assert "EOS 2, PAD 2, decoders read 1 first" in capsys.readouterr().out
  (example, *_) = lines(tmp_path / "run" / "examples.jsonl")
  row = next(r for r in ROWS if r["targets"] == example["reference"])
  # All of it, though EOS ends the turns.
  assert example["input"] == (
    f"system\nhelp\nuser\n{row['inputs']}\nassistant\n"
  )
  # The same command goes on where the run was.
  here("train", "--gin_file=run.gin", "--gin.TRAIN_STEPS=3")
  assert "resumed" in capsys.readouterr().out
