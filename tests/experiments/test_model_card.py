"""The card beside a model that is exported to Hugging Face's format."""

import ast
import functools
import json
import re

import golden_t5x
import jax

import gkd_jax
from gkd_jax import checkpoints
from gkd_jax.checkpoints import export
from gkd_jax.experiments import model_card


def test_the_card_says_what_the_run_wrote(tmp_path):
  params = golden_t5x.params(golden_t5x.load("t5_1_1_tiny")[0])
  run = tmp_path / "run"
  with_config = dict(golden_t5x.load("t5_1_1_tiny")[1]["config"])
  checkpointer = checkpoints.Checkpointer(run)
  for step in (1000, 2000):
    checkpointer.save(step, {"params": params}, config=with_config)
  checkpointer.close()
  (run / "config.gin").write_text(
    """
# Macros:
STUDENT_DATA_FRACTION = 0.5
DIVERGENCE = 'jsd'
BETA = 0.1
MIXTURE_OR_TASK_NAME = \\
    'a_task'
TEACHER_CHECKPOINT_PATH = '/teachers/xl'
models.GKDModel.divergence = %DIVERGENCE
"""
  )
  rows = [
    {"step": 500, "eval/wer": 40.0},
    {"step": 1000, "eval/wer": 31.25, "eval/per": 9.0},
    {"step": 1000, "loss": 0.5},
    {"step": 2000, "eval/wer": 29.5, "eval/per": 8.0},
  ]
  (run / "metrics.jsonl").write_text(
    "\n".join([*map(json.dumps, rows), '{"st'])
  )
  final = {"greedy": {"wer": 28.125}, "split": "test", "params": 3}
  (run / "final.json").write_text(json.dumps(final))
  write = functools.partial(
    export.export_checkpoint, format="hf", card=model_card.write
  )
  write(run, tmp_path / "student")
  lines = (tmp_path / "student" / "README.md").read_text().splitlines()
  for line in (
    "# run on a_task",
    "| Teacher | xl |",
    "| Data | a_task |",
    "| λ, student-data fraction | 0.5 |",
    "| Divergence | jsd |",
    "| β | 0.1 |",
    "| Steps | 2,000 |",
    "| Learning rate | not recorded |",
    "| Validation at step 2,000 | Score |",
    "| wer | 29.5 |",
    "| Split test, after the last step | Score |",
    "| greedy wer | 28.12 |",
  ):
    assert line in lines, line
  # Of an earlier checkpoint: its scores, and not those of the end.
  write(run / "checkpoint_1000", tmp_path / "b")
  card = (tmp_path / "b" / "README.md").read_text()
  assert "| wer | 31.25 |" in card and "| Steps | 1,000 |" in card
  assert "28.12" not in card and "29.5" not in card
  # A card that somebody wrote stays.
  (tmp_path / "b" / "README.md").write_text("mine")
  write(run, tmp_path / "b")
  assert (tmp_path / "b" / "README.md").read_text() == "mine"


def card(tmp_path, config="", **more):
  run = tmp_path / "runs" / "g2p-student"
  run.mkdir(parents=True, exist_ok=True)
  (run / "config.gin").write_text(config)
  arguments = {"name": "hf", "num_parameters": 3, "model_dir": run, "step": 40}
  return model_card.write(**arguments | more)


def test_values_are_resolved_and_paths_of_the_machine_are_left_out(tmp_path):
  text = card(
    tmp_path,
    f"""
TEACHER_CHECKPOINT_PATH = @shipped.model_path()
shipped.model_path.name = 'g2p_teacher'
INITIAL_CHECKPOINT_PATH = '{tmp_path}/sft/checkpoint_1200'
MIXTURE_OR_TASK_NAME = 'a_task'
BATCH_SIZE = %HALF
HALF = 16
LEARNING_RATE = @schedules.linear()
schedules.linear.points = \\
    ((0, 0.0),
     (10, 0.5))
other.path = '{tmp_path}'
""",
  )
  for line in (
    "# g2p-student on a_task",
    "| Teacher | model_path(name='g2p_teacher') |",
    "| First parameters | sft/checkpoint_1200 |",
    "| Batch size | 16 |",
    "| Learning rate | linear(points=((0, 0.0), (10, 0.5))) |",
    "license: unknown",
  ):
    assert line in text.splitlines(), line
  assert str(tmp_path) not in text and "hf" not in text.split()
  assert f"gkd_jax {gkd_jax.__version__}, jax {jax.__version__}" in text


def test_paths_of_buckets_stay_and_those_of_disks_do_not(tmp_path):
  for path, shown in (
    ("gs://b/teacher", "gs://b/teacher"),
    ("~/t/teacher/", "teacher"),
    ("../x/teacher", "teacher"),
    ("file:///home/me/teacher", "teacher"),
  ):
    text = card(tmp_path, f"TEACHER_CHECKPOINT_PATH = '{path}'")
    assert f"| Teacher | {shown} |" in text.splitlines(), path
    assert "home" not in text


def test_the_snippet_is_python_that_fits_the_folder(tmp_path):
  for architecture, has_tokenizer, loader in (
    ("T5ForConditionalGeneration", True, "AutoModelForSeq2SeqLM"),
    ("LlamaForCausalLM", False, "AutoModelForCausalLM"),
  ):
    text = card(
      tmp_path, architecture=architecture, has_tokenizer=has_tokenizer
    )
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {
      node.attr for node in ast.walk(ast.parse(code)) if hasattr(node, "attr")
    }
    assert loader in names
    assert ("AutoTokenizer" in names) == has_tokenizer


def test_markup_in_a_setting_shows_as_text(tmp_path):
  text = card(tmp_path, "MIXTURE_OR_TASK_NAME = '<b>a</b>|*b*'")
  assert "| Data | &lt;b>a&lt;/b>\\|\\*b\\* |" in text.splitlines()
