"""The command line, as a user starts it: runs, resumes, and errors.

`started` imports all that a user's command imports, `gkd` and `start` fork.
"""

import json
import signal

import jax
import numpy as np
import pytest
from command_line import (
  ROOT,
  gin,
  gkd,
  here,
  refused,
  save_toy_teacher,
  start,
  started,
)

from gkd_jax import checkpoints


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  return save_toy_teacher(tmp_path_factory.mktemp("smoke") / "teacher")


def smoke(teacher, folder, **macros):
  settings = {"MODEL_DIR": str(folder), "TEACHER_CHECKPOINT_PATH": str(teacher)}
  return [
    "train",
    "--gin_file=experiments/smoke.gin",
    *gin(**(settings | macros)),
  ]


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
  """The uninterrupted smoke run."""
  folder = tmp_path_factory.mktemp("smoke") / "student"
  done = started(*smoke(teacher, folder))
  # Neither JAX nor TensorFlow writes to a user's terminal.
  assert done.returncode == 0 and not done.stderr, done.stderr
  return folder, done.stdout


def assert_same_run(a, b):
  for x, y in zip(
    _leaves(checkpoints.load_params(a)),
    _leaves(checkpoints.load_params(b)),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)


def _lines(path):
  return [json.loads(x) for x in path.read_text().splitlines()]


def _leaves(tree):
  for key in sorted(tree):
    if isinstance(tree[key], dict):
      yield from _leaves(tree[key])
    else:
      yield np.asarray(tree[key])


def test_smoke_run_writes_what_it_says(whole):
  folder, printed = whole
  assert {p.name for p in folder.glob("checkpoint_*")} == {
    "checkpoint_10",
    "checkpoint_20",
  }
  assert "step 20/20" in printed and "step 20 evaluation" in printed
  assert "data's tokens: cross-entropy" in printed
  for whose in ("the data", "the student's samples"):
    assert printed.count(f"signal on {whose} at step ") == 1
  rows = _lines(folder / "metrics.jsonl")
  last = next(r for r in reversed(rows) if "loss" in r)
  assert last["step"] == 20
  for name in (
    "forward_kl",
    "reverse_kl",
    "teacher_entropy",
    "student_entropy",
    "top1_agreement",
    "gradient_norm",
    "learning_rate",
  ):
    assert np.isfinite(last[name]), name
  sampled = [r for r in rows if "sampled_length" in r]
  assert sampled
  for row in sampled:
    assert row["seconds_per_step"] > 0
  examples = _lines(folder / "examples.jsonl")
  assert len(examples) == 10
  assert set(examples[0]) == {
    "step",
    "input",
    "reference",
    "teacher",
    "student",
  }
  assert list(folder.glob("events.out.tfevents*"))
  assert "STUDENT_DATA_FRACTION = 0.5" in (folder / "config.gin").read_text()


# tests/training/test_teacher_check.py says when a teacher is remarked on.
@pytest.mark.nightly
def test_a_teacher_of_ten_steps_is_one(tmp_path):
  folder = tmp_path / "teacher"
  done = gkd(
    *("train", "--gin_file=experiments/smoke_teacher.gin"),
    *gin(MODEL_DIR=str(folder)),
  )
  assert done.returncode == 0, done.stderr
  done = gkd(*smoke(folder, tmp_path / "student"))
  assert done.returncode == 0, done.stderr
  assert "data's tokens: cross-entropy" in done.stdout
  assert "warning" not in done.stdout


# test_ctrl_c_saves_the_step_and_the_same_command_goes_on, in tests/test_train.py,
# and test_kill_in_the_middle_of_an_async_save, in tests/checkpoints, are shorter.
@pytest.mark.nightly
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_bit_for_bit(teacher, whole, tmp_path, how):
  folder = tmp_path / "student"
  # Another step in every run of the test; pytest shows it if it fails. From 7
  # on, since saving step 6 has waited until step 3 was whole on disk.
  step = int(np.random.default_rng().integers(7, 18))
  print(f"{how} at step {step}")
  # Without evaluations, which change nothing.
  settings = smoke(
    teacher, folder, LOG_PERIOD=1, CHECKPOINT_PERIOD=3, EVAL_SPLIT=None
  )
  process = start(*settings)
  for line in process.stdout:
    if line.startswith(f"step {step}/"):
      process.send_signal(how)
      break
  _, errors = process.communicate()
  assert process.returncode == (
    143 if how == signal.SIGTERM else -signal.SIGKILL
  ), errors
  steps = {int(p.name.split("_")[1]) for p in folder.glob("checkpoint_*[0-9]")}
  assert steps and max(steps) < 20
  done = gkd(*settings)
  assert done.returncode == 0, done.stderr
  assert "resumed" in done.stdout
  assert_same_run(folder, whole[0])


def decode(run, mode, checkpoint, env=None, **macros):
  settings = {"MIXTURE_OR_TASK_NAME": "arithmetic_cot"} | macros
  return run(
    mode,
    "--gin_file=models/toy.gin",
    f"--gin_file=runs/{mode}.gin",
    "--gin.STUDENT=%TOY_STUDENT",
    *gin(
      CHECKPOINT_PATH=str(checkpoint),
      TASK_FEATURE_LENGTHS={"inputs": 16, "targets": 48},
      EVAL_NUM_EXAMPLES=5,
      EVAL_SPLIT="test",
      **settings,
    ),
    env=env,
  )


# The chains of arithmetic_cot with a metric that is not 0 of a model that knows
# nothing.
LENGTHS_TASK = """
import seqio

from gkd_jax.tasks import arithmetic

def length_error(targets, predictions):
  pairs = zip(targets, predictions, strict=True)
  errors = [abs(len(t) - len(p)) for t, p in pairs]
  return {"length_error": sum(errors) / len(errors)}

base = seqio.TaskRegistry.get("arithmetic_cot")
seqio.TaskRegistry.add(
  "arithmetic_lengths",
  source=base.source,
  preprocessors=base.preprocessors,
  output_features=base.output_features,
  metric_fns=[length_error],
)
"""


# test_cli_files runs these commands one after the other, in process.
@pytest.mark.nightly
def test_export_infer_and_eval(whole, tmp_path):
  exported = tmp_path / "safetensors"
  done = gkd(
    "export", f"--checkpoint_path={whole[0]}", f"--output_path={exported}"
  )
  assert done.returncode == 0, done.stderr
  assert_same_run(exported, whole[0])
  output = tmp_path / "out.jsonl"
  done = decode(gkd, "infer", exported, OUTPUT_PATH=str(output))
  assert done.returncode == 0, done.stderr
  lines = _lines(output)
  assert len(lines) == 5
  keys = {"task", "inputs", "prediction", "score", "ended"}
  assert all(set(x) == keys for x in lines)
  assert all(x["score"] < 0 for x in lines)
  (tmp_path / "lengths.py").write_text(LENGTHS_TASK)
  done = decode(
    gkd,
    "eval",
    whole[0],
    env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    EVAL_OUTPUT_DIR=str(tmp_path / "eval"),
    MIXTURE_OR_TASK_NAME="arithmetic_lengths",
    MIXTURE_OR_TASK_MODULE="lengths",
  )
  assert done.returncode == 0, done.stderr
  (metrics,) = _lines(tmp_path / "eval" / "metrics.json")
  scored = _lines(tmp_path / "eval" / "predictions.jsonl")
  for a, b in zip(lines, scored, strict=True):
    assert (a["inputs"], a["prediction"]) == (b["inputs"], b["prediction"])
    # The reference is the task's own text for this input, not a decoding.
    assert b["target"].startswith(b["inputs"].split("+")[0].split("-")[0])
  # Worked out here from the two texts; tests/test_eval.py has a trained model.
  errors = [abs(len(x["target"]) - len(x["prediction"])) for x in scored]
  assert max(errors) > 0
  assert metrics["length_error"] == pytest.approx(np.mean(errors))


def test_export_of_another_dtype_feeds_a_float32_teacher(tmp_path):
  params = {"w": np.asarray([1 + 2**-8, -0.5], np.float32)}
  checkpoints.save_safetensors(tmp_path / "run", params, {"vocab_size": 9})
  here(
    "export",
    f"--checkpoint_path={tmp_path / 'run'}",
    f"--output_path={tmp_path / 'narrow'}",
    "--dtype=bfloat16",
  )
  stored = checkpoints.load_params(tmp_path / "narrow", dtype=None)
  assert stored["w"].dtype == "bfloat16"
  assert checkpoints.load_config(tmp_path / "narrow") == {"vocab_size": 9}
  placed = checkpoints.load_placed(
    str(tmp_path / "narrow"),
    {"w": jax.ShapeDtypeStruct((2,), np.float32)},
    {"w": jax.sharding.SingleDeviceSharding(jax.devices()[0])},
    setting="TEACHER_CHECKPOINT_PATH",
    of="teacher",
  )
  assert placed["w"].dtype == np.float32
  # bfloat16 keeps eight bits: 1 + 2^-8 is halfway and rounds to even.
  np.testing.assert_array_equal(placed["w"], [1.0, -0.5])


def test_import_and_export_between_formats(tmp_path, capsys):
  """T5X's golden checkpoint -> ours -> Hugging Face's -> T5X's."""
  source = ROOT / "tests" / "golden" / "t5x_legacy"
  for mode, a, b, options in (
    ("import", source, tmp_path / "gkd", []),
    ("export", tmp_path / "gkd", tmp_path / "hf", ["--format=hf"]),
    ("export", tmp_path / "hf", tmp_path / "t5x", ["--format=t5x"]),
  ):
    here(mode, f"--checkpoint_path={a}", f"--output_path={b}", *options)
    assert_same_run(b, source)
  assert (tmp_path / "t5x" / "checkpoint_0" / "state").is_dir()
  assert checkpoints.load_config(tmp_path / "gkd")["mlp_dim"] == 32
  lost = tmp_path / "nothing"
  said = refused(
    capsys, "import", f"--checkpoint_path={lost}", "--output_path=x"
  )
  assert "--checkpoint_path" in said and str(lost) in said


def test_a_wrong_setting_ends_the_process(teacher, tmp_path):
  done = gkd(*smoke(teacher, tmp_path / "student", DIVERGENCE="jds"))
  assert done.returncode == 2
  # Nothing before it, and nothing of gin's after it.
  assert done.stderr.startswith("gkd: expected ") and not done.stdout
  assert done.stderr.endswith("got 'jds'; set DIVERGENCE\n")
  assert done.stderr.count("\n") == 1


@pytest.mark.nightly
def test_losses_that_stay_not_finite_stop_the_run(teacher, tmp_path):
  folder = tmp_path / "student"
  done = gkd(
    *smoke(
      teacher,
      folder,
      # The first update leaves parameters whose squares overflow.
      LEARNING_RATE=1e30,
      LOG_PERIOD=1,
      CHECKPOINT_PERIOD=1,
    ),
    "--gin.MAX_SKIPPED_IN_ROW=3",
  )
  assert done.returncode == 2
  assert "got 3 non-finite ones in a row up to step 4" in done.stderr
  assert "set LEARNING_RATE" in done.stderr
  rows = [r for r in _lines(folder / "metrics.jsonl") if "loss" in r]
  assert [r["skipped_updates"] for r in rows] == [0, 1, 2, 3]
  assert (folder / "checkpoint_1").is_dir()


# test_cli_files trains a Llama by the command line.
@pytest.mark.nightly
def test_decoder_only_smoke_trains_and_is_scored(tmp_path):
  name = "--gin_file=experiments/smoke_decoder_only"
  teacher, student = tmp_path / "teacher", tmp_path / "student"
  done = gkd("train", f"{name}_teacher.gin", *gin(MODEL_DIR=str(teacher)))
  assert done.returncode == 0, done.stderr
  done = gkd(
    "train",
    f"{name}.gin",
    *gin(MODEL_DIR=str(student), TEACHER_CHECKPOINT_PATH=str(teacher)),
  )
  assert done.returncode == 0, done.stderr
  rows = [r for r in _lines(student / "metrics.jsonl") if "loss" in r]
  assert rows[-1]["step"] == 20 and np.isfinite(rows[-1]["loss"])
  assert any(r.get("sampled_length", 0) > 0 for r in rows)
  files = (
    "runs/eval.gin",
    "models/decoder_only_toy.gin",
  )
  done = gkd(
    "eval",
    *(f"--gin_file={file}" for file in files),
    "--gin.STUDENT=%DECODER_ONLY_TOY_STUDENT",
    *gin(
      PREFIX_LM=True,
      CHECKPOINT_PATH=str(student),
      MIXTURE_OR_TASK_NAME="arithmetic_cot",
      TASK_FEATURE_LENGTHS={"inputs": 16, "targets": 48},
      EVAL_NUM_EXAMPLES=32,
      EVAL_OUTPUT_DIR=str(tmp_path / "scores"),
    ),
  )
  assert done.returncode == 0, done.stderr
  # The same parameters on the same examples as the run's last evaluation.
  shown = [r for r in _lines(student / "examples.jsonl") if r["step"] == 20]
  scored = _lines(tmp_path / "scores" / "predictions.jsonl")
  assert len(scored) == 32
  for a, b in zip(shown, scored, strict=False):
    assert (a["input"], a["student"]) == (b["inputs"], b["prediction"])
