"""The card beside a model that is exported to Hugging Face's format."""

import functools
import json

import golden_t5x

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
    "# student",
    "| Teacher | /teachers/xl |",
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
