"""The command line with a task that is a user's own file."""

import json

import seqio
import tensorflow as tf
from command_line import (
  gin,
  here,
  refused,
  save_toy,
  save_toy_teacher,
)

from gkd_jax import data

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


def sft_of_own_task(folder, name, targets, *, eos):
  """Writes a task into a file of a folder; returns `gkd`'s arguments for SFT.

  Args:
    folder: for the file, and the run below it.
    name: of the task.
    targets: Python expression for the 64 targets.
    eos: whether texts end in EOS.
  """
  text = OWN_TASK.replace("TARGETS", targets).replace("EOS)", f"{eos})")
  (folder / f"{name}_file.py").write_text(text.replace("my_task", name))
  return [
    "train",
    "--gin_file=models/toy.gin",
    "--gin_file=runs/sft.gin",
    "--gin.STUDENT=%TOY_STUDENT",
    "--gin.toy/network.T5Config.vocab_size=384",
    *gin(
      MODEL_DIR=str(folder / "run"),
      MIXTURE_OR_TASK_NAME=name,
      MIXTURE_OR_TASK_MODULE=f"{name}_file",
      TASK_FEATURE_LENGTHS={"inputs": 12, "targets": 12},
      TRAIN_STEPS=2,
    ),
  ]


def test_a_task_outside_of_the_repository(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  here(*sft_of_own_task(tmp_path, "my_task", "WORDS", eos=True))
  assert (tmp_path / "run" / "checkpoint_2").is_dir()


def test_a_batch_without_a_target_token(tmp_path, capsys, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  said = refused(
    capsys, *sft_of_own_task(tmp_path, "empty", '[""] * 64', eos=False)
  )
  assert "got a batch without any at step 0" in said
  assert not list((tmp_path / "run").glob("checkpoint_*"))


def test_prompts_alone_are_read_for_training_and_decoded(
  tmp_path, capsys, monkeypatch
):
  # Neither references nor a validation split: only train has examples.
  text = OWN_TASK.replace(', "targets": TARGETS', "").replace("EOS)", "True)")
  text = text.replace(', "validation")', ",)").replace("my_task", "prompts")
  (tmp_path / "my_prompts.py").write_text(text)
  monkeypatch.syspath_prepend(tmp_path)
  task = {
    "MIXTURE_OR_TASK_NAME": "prompts",
    "MIXTURE_OR_TASK_MODULE": "my_prompts",
    "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4},
    "BATCH_SIZE": 8,
  }
  toy = [
    "--gin_file=models/toy.gin",
    "--gin.toy/network.T5Config.vocab_size=384",
    "--gin.STUDENT=%TOY_STUDENT",
  ]
  train = [
    "--gin_file=runs/gkd.gin",
    "--gin.TEACHER=%TOY_TEACHER",
    *gin(
      MODEL_DIR=str(tmp_path / "run"),
      TEACHER_CHECKPOINT_PATH=save_toy_teacher(tmp_path / "teacher", 384),
      TRAIN_STEPS=1,
      **task,
    ),
  ]
  here("train", "--dry_run", *toy, *train)
  said = capsys.readouterr().out
  assert (
    "no evaluation: prompts has no split 'validation'; set EVAL_SPLIT\n" in said
  )
  here(
    "infer",
    *toy,
    "--gin_file=runs/infer.gin",
    *gin(
      CHECKPOINT_PATH=save_toy(tmp_path / "student", 16, 2, 32, 384),
      OUTPUT_PATH=str(tmp_path / "out.jsonl"),
      EVAL_SPLIT="train",
      EVAL_NUM_EXAMPLES=8,
      **task,
    ),
  )
  lines = (tmp_path / "out.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["inputs"] for row in rows] == [f"word {i}" for i in range(8)]
  # A split that somebody asks for has to be there.
  for name in ("EVAL_SPLIT", "FINAL_EVAL_SPLIT"):
    assert f"got 'test'; set {name}" in refused(
      capsys, "train", *toy, *train, *gin(**{name: "test"})
    )


def add_cached_task(folder, ids):
  """A task of bytes without a source, and its cached train split of one row."""

  def unread(split, shuffle_files, seed=None):
    raise AssertionError("expected the cache to be read")

  seqio.TaskRegistry.add(
    "cached_words",
    source=seqio.FunctionDataSource(unread, splits=("train",)),
    preprocessors=[seqio.CacheDatasetPlaceholder()],
    output_features={
      name: seqio.Feature(seqio.ByteVocabulary()) for name in ids
    },
    metric_fns=[],
  )
  folder.mkdir(parents=True)
  spec = {"shape": [None], "dtype": "int32"}
  info = {"num_shards": 1, "features": {name: spec for name in ids}}
  info["seqio_version"] = "1.0.0"
  (folder / "info.train.json").write_text(json.dumps(info))
  (folder / "COMPLETED").touch()
  (folder / "stats.train.json").write_text('{"examples": 1}')
  features = {
    name: tf.train.Feature(int64_list=tf.train.Int64List(value=row))
    for name, row in ids.items()
  }
  row = tf.train.Example(features=tf.train.Features(feature=features))
  path = folder / "train.tfrecord-00000-of-00001"
  with tf.io.TFRecordWriter(str(path)) as writer:
    writer.write(row.SerializeToString())


def test_cached_tasks_are_looked_up_in_additional_folders(tmp_path):
  ids = {"inputs": [100, 1], "targets": [101, 102, 1]}
  add_cached_task(tmp_path / "cache" / "cached_words", ids)
  settings = [
    "--gin_file=models/toy.gin",
    "--gin.toy/network.T5Config.vocab_size=384",
    "--gin_file=runs/sft.gin",
    "--gin.STUDENT=%TOY_STUDENT",
    *gin(
      MODEL_DIR=str(tmp_path / "run"),
      MIXTURE_OR_TASK_NAME="cached_words",
      TASK_FEATURE_LENGTHS={"inputs": 4, "targets": 4},
      TRAIN_STEPS=1,
      USE_CACHED_TASKS=True,
    ),
  ]
  folders = f"--seqio_additional_cache_dirs={tmp_path / 'cache'}"
  here("train", "--dry_run", folders, *settings)
  iterator = data.TrainIterator(
    data.load_task("cached_words"),
    {"inputs": 4, "targets": 4},
    1,
    seed=0,
    use_cached=True,
  )
  assert next(iterator)["decoder_target_tokens"].tolist() == [[101, 102, 1, 0]]
