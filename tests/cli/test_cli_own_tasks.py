"""The command line with a task that is a user's own file."""

from command_line import ROOT, gin, gkd, started

OWN_TASK = """
import seqio, tensorflow as tf

WORDS = [f"word {i}" for i in range(64)]

def lines(split, shuffle_files, seed=None):
  return tf.data.Dataset.from_tensor_slices(
    {"inputs": WORDS, "targets": TARGETS}
  )

feature = lambda: seqio.Feature(seqio.ByteVocabulary(), add_eos=EOS)
seqio.TaskRegistry.add(
  "my_task",
  source=seqio.FunctionDataSource(lines, splits=("train", "validation")),
  preprocessors=[
    seqio.preprocessors.tokenize, seqio.preprocessors.append_eos
  ],
  output_features={"inputs": feature(), "targets": feature()},
  metric_fns=[],
)
"""


def train_own_task(run, folder, targets, *, eos):
  """Two steps of SFT on a task in a file outside of the repository.

  Args:
    run: how to start it.
    folder: for the file, and the run below it.
    targets: Python expression for the 64 targets.
    eos: whether texts end in EOS.
  """
  text = OWN_TASK.replace("TARGETS", targets).replace("EOS)", f"{eos})")
  (folder / "my_file.py").write_text(text)
  return run(
    "train",
    "--gin_file=models/toy.gin",
    "--gin_file=runs/sft.gin",
    "--gin.STUDENT=%TOY_STUDENT",
    "--gin.toy/network.T5Config.vocab_size=384",
    *gin(
      MODEL_DIR=str(folder / "run"),
      MIXTURE_OR_TASK_NAME="my_task",
      MIXTURE_OR_TASK_MODULE="my_file",
      TASK_FEATURE_LENGTHS={"inputs": 12, "targets": 12},
      TRAIN_STEPS=2,
    ),
    cwd=folder,
    env={"PYTHONPATH": f"{ROOT}:{folder}"},
  )


def test_a_task_outside_of_the_repository(tmp_path):
  done = train_own_task(started, tmp_path, "WORDS", eos=True)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "run" / "checkpoint_2").is_dir()


def test_a_batch_without_a_target_token(tmp_path):
  done = train_own_task(gkd, tmp_path, '[""] * 64', eos=False)
  assert done.returncode == 2, done.stdout
  assert "got a batch without any at step 0" in done.stderr
  assert not list((tmp_path / "run").glob("checkpoint_*"))
