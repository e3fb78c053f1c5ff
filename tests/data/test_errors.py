"""Errors of reading data: one sentence with what is wrong and what to set."""

import uuid

import pytest
import seqio
import tensorflow as tf

from gkd_jax import data, evaluation, partitioning
from gkd_jax.data import errors

LENGTHS = {"inputs": 8, "targets": 8}
FEATURE = seqio.Feature(seqio.ByteVocabulary())


def columns(rows):
  """Splits a line at its tab, as tasks of TSV files do."""

  def split(line):
    defaults = ["", ""]
    parts = tf.io.decode_csv(line, defaults, "\t", use_quote_delim=False)
    return dict(zip(("inputs", "targets"), parts, strict=True))

  return rows.map(split)


def task(path, *preprocessors, split="train"):
  """A task of a file's lines."""
  return seqio.TaskRegistry.add(
    f"lines_{uuid.uuid4().hex}",
    source=seqio.TextLineDataSource({split: str(path)}),
    preprocessors=[
      columns,
      *preprocessors,
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={"inputs": FEATURE, "targets": FEATURE},
    metric_fns=[],
  )


def refused(made, **options):
  """What is said when the first batch is drawn."""
  with pytest.raises(ValueError) as error:
    next(data.TrainIterator(made, LENGTHS, 2, seed=0, **options))
  said = str(error.value)
  assert said.startswith("expected ") and "\n" not in said
  assert "{{" not in said and "[[" not in said and "Op:" not in said
  assert made.name in said and "; set " in said
  return said


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "rows.tsv"
  path.write_text("".join(f"{n}\t{n}\n" for n in range(9)))
  return path


def test_a_file_that_is_not_there(tmp_path):
  said = refused(task(tmp_path / "nowhere.tsv"))
  assert "expected files that can be read" in said
  assert f"{tmp_path}/nowhere.tsv; No such file" in said


def test_a_row_with_too_few_columns(file):
  file.write_text("1\t1\n2\n")
  said = refused(task(file))
  assert "expected examples that can be read" in said
  assert "got 'Expect 2 fields but have 1 in record 0'" in said


def test_too_few_examples(file):
  said = refused(task(file, lambda rows: rows.take(0)))
  assert "expected enough examples for a batch in the split 'train'" in said
  file.write_text("")
  assert "got fewer or none; set MIXTURE" in refused(task(file))


def test_a_task_without_the_split(file):
  said = refused(task(file, split="test"))
  assert "a split 'train', got lines_" in said and "with ['test']; set" in said


def test_a_task_that_is_not_cached(file):
  said = refused(task(file), use_cached=True)
  assert "expected a cache of lines_" in said and "got none in " in said
  assert "USE_CACHED_TASKS = False or --seqio_additional_cache_dirs" in said


def test_a_data_set_of_tfds_that_is_not_prepared(tmp_path, monkeypatch):
  seqio.set_tfds_data_dir_override(str(tmp_path))
  try:
    said = refused(data.load_task("xsum"))
  finally:
    seqio.set_tfds_data_dir_override(None)
  assert f"the TFDS data set xsum:1.1.0 of xsum, got none in {tmp_path}" in said
  assert "set --tfds_data_dir" in said


def test_a_task_that_seqio_refuses(file):
  lacks = lambda rows: rows.map(lambda row: {"inputs": row["inputs"]})
  made = task(file, lacks)
  with pytest.raises(ValueError, match="missing expected output feature"):
    next(data.TrainIterator(made, LENGTHS, 2, seed=0))


def test_errors_of_a_tasks_own_code_keep_their_traceback(file):
  def divide(rows):
    return 1 / 0

  with pytest.raises(ZeroDivisionError):
    next(data.TrainIterator(task(file, divide), LENGTHS, 2, seed=0))
  with pytest.raises(ValueError, match="mine"), errors.explained("t", "train"):
    raise ValueError("mine")


def test_a_vocabulary_that_is_not_there(file, tmp_path):
  made = task(file)
  lost = seqio.SentencePieceVocabulary(f"{tmp_path}/lost.model")
  made.output_features["targets"] = seqio.Feature(lost)
  with pytest.raises(
    ValueError, match=r"the vocabulary of lines_.*lost\.model"
  ):
    data.special_tokens(made)


def test_an_evaluation_says_the_same(file, tmp_path):
  def evaluate(made, **options):
    evaluation.Evaluator(
      made, LENGTHS, 2, partitioning.make_mesh(), split="train", **options
    )

  file.write_text("1\t1\n2\n")
  seqio.set_tfds_data_dir_override(str(tmp_path))
  try:
    for made, options, message in (
      (task(tmp_path / "nowhere.tsv"), {}, "nowhere.tsv; No such file"),
      (task(file), {}, "'Expect 2 fields but have 1 in record 0'"),
      (task(file), {"use_cached": True}, "expected a cache of lines_"),
      (data.load_task("xsum"), {}, "the TFDS data set xsum:1.1.0 of xsum, got"),
    ):
      with pytest.raises(ValueError) as error:
        evaluate(made, **options)
      assert str(error.value).startswith("expected ")
      assert message in str(error.value)
  finally:
    seqio.set_tfds_data_dir_override(None)
