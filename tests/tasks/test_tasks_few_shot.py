"""MMLU and BBH from files in their published forms; prompts worked by hand."""

import json

import pytest
import seqio

from gkd_jax import data
from gkd_jax.tasks import bbh, few_shot, mmlu

BYTES = seqio.ByteVocabulary()
# Lines as in the benchmark: quoted where there is a comma or a line break.
DEV = """What is 2 + 2?,1,2,3,4,D
"Which, of these, is prime?",4,6,7,8,C
"He said ""no"".",w,x,y,z,A
q4,a,b,c,d,B
q5,a,b,c,d,C
"""
TEST = 'Is it so?,yes,no,"both, in a way",neither,B\nlast,e,f,g,h,A\n'
SHOTS = (
  "What is 2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n",
  "Which, of these, is prime?\nA. 4\nB. 6\nC. 7\nD. 8\nAnswer: C\n\n",
  'He said "no".\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n',
  "q4\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n",
  "q5\nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\n",
)
HEADER = (
  "The following are multiple choice questions (with answers) about formal"
  " logic.\n\n"
)
QUESTION = "Is it so?\nA. yes\nB. no\nC. both, in a way\nD. neither\nAnswer:"


@pytest.fixture(name="mmlu_folder")
def _mmlu_folder(tmp_path, monkeypatch):
  for split in ("dev", "val", "test"):
    (tmp_path / split).mkdir()
    for subject in ("formal_logic", "virology"):
      text = DEV if split == "dev" else TEST
      (tmp_path / split / f"{subject}_{split}.csv").write_text(text)
  monkeypatch.setenv("MMLU_DIR", str(tmp_path))
  return tmp_path


@pytest.fixture(name="bbh_folder")
def _bbh_folder(tmp_path, monkeypatch):
  examples = [
    {"input": f"not True is ({i})\nOptions:\n(A) x", "target": f"({i})"}
    for i in range(5)
  ]
  for subtask in bbh.SUBTASKS:
    (tmp_path / f"{subtask}.json").write_text(
      json.dumps({"canary": "do not train on this", "examples": examples})
    )
  monkeypatch.setenv("BBH_DIR", str(tmp_path))
  return tmp_path


def rows(task, length=None, split="test"):
  lengths = None if length is None else {"inputs": length, "targets": 8}
  dataset = task.get_dataset(lengths, split=split, shuffle=False)
  found = []
  for e in dataset.as_numpy_iterator():
    assert e["inputs"][-1] == e["targets"][-1] == 1  # EOS was not cut off
    texts = (BYTES.decode(e[k][:-1].tolist()) for k in ("inputs", "targets"))
    found.append((*texts, e["group"].decode()))
  return found


def fresh(add, name, **options):
  """A task of a test's own, removed from the registry again."""
  seqio.TaskRegistry.remove(name)
  return add(name, vocabulary=BYTES, **options)


def test_an_mmlu_prompt(mmlu_folder):
  task = fresh(
    mmlu.add_mmlu_task, "mmlu_two", subjects=("formal_logic", "virology")
  )
  for split in ("test", "validation"):
    found = rows(task, split=split)
    assert len(found) == 4
    assert found[0] == (
      HEADER + "".join(SHOTS) + QUESTION,
      "B",
      "formal_logic",
    )
  assert [row[1:] for row in rows(task)] == [
    ("B", "formal_logic"),
    ("A", "formal_logic"),
    ("B", "virology"),
    ("A", "virology"),
  ]
  assert " about virology.\n\nWhat is 2" in rows(task)[2][0]


@pytest.mark.parametrize("shots", [0, 1, 2, 5])
def test_worked_examples_go_before_the_question_is_cut(mmlu_folder, shots):
  task = fresh(mmlu.add_mmlu_task, "mmlu_one", subjects=("formal_logic",))
  whole = HEADER + "".join(SHOTS[:shots]) + QUESTION
  # Bytes and EOS fit exactly; with one less, the last worked example goes.
  assert rows(task, len(whole) + 1)[0][0] == whole
  if shots:
    shorter = HEADER + "".join(SHOTS[: shots - 1]) + QUESTION
    assert rows(task, len(whole))[0][0] == shorter


def test_all_57_subjects_are_wanted(mmlu_folder):
  assert len(set(mmlu.SUBJECTS)) == 57
  task = data.load_task("mmlu_bytes")
  with pytest.raises(ValueError, match=r"abstract_algebra_dev.csv.*MMLU_DIR"):
    task.get_dataset(split="test")


def test_mmlu_lines_of_another_form(mmlu_folder):
  path = mmlu_folder / "test" / "virology_test.csv"
  task = fresh(mmlu.add_mmlu_task, "mmlu_bad", subjects=("virology",))
  for line in ("question,A,B,C,D,answer\n", "q,a,b,c,A\n"):
    path.write_text(TEST + line)
    with pytest.raises(ValueError, match=r"number 3 in .*virology_test"):
      task.get_dataset(split="test")
  (mmlu_folder / "dev" / "virology_dev.csv").write_text("q,a,b,c,d,A\n")
  with pytest.raises(ValueError, match="expected 5 worked examples"):
    task.get_dataset(split="test")


def test_bbh_prompts(bbh_folder):
  found = rows(data.load_task("bbh_bytes"))
  assert len(found) == 27 * 2
  question = "Q: not True is ({})\nOptions:\n(A) x\nA:"
  shots = "".join(f"{question.format(i)} ({i})\n\n" for i in range(3))
  assert found[:2] == [
    (shots + question.format(i), f"({i})", "boolean_expressions")
    for i in (3, 4)
  ]
  assert len({group for _, _, group in found}) == 23
  assert sum(group == "logical_deduction" for _, _, group in found) == 6


def test_bbh_files_of_another_form(bbh_folder):
  path = bbh_folder / "snarks.json"
  task = fresh(bbh.add_bbh_task, "bbh_bad", subtasks=("snarks",))
  for text in ('{"examples": [{"input": "x"}]}', "[]", '{"examples"'):
    path.write_text(text)
    with pytest.raises(ValueError, match=r"snarks.json .*BBH_DIR"):
      task.get_dataset(split="test")
  path.write_text('{"examples": [{"input": "x", "target": "y"}]}')
  with pytest.raises(ValueError, match="more than 3 examples, got 1"):
    task.get_dataset(split="test")
  path.unlink()
  with pytest.raises(ValueError, match=r"snarks.json.*no file"):
    task.get_dataset(split="test")


def test_the_mean_is_over_tasks_and_not_examples():
  targets = [("a", "(A)")] * 3 + [("b", "no")]
  found = few_shot.grouped_exact_match(targets, ["(A)", " (A) ", "(B)", "yes"])
  assert found == {
    "accuracy": pytest.approx(100 / 3),  # (2/3 + 0) / 2; 50 over examples
    "accuracy/a": pytest.approx(200 / 3),
    "accuracy/b": 0.0,
  }
  with pytest.raises(ValueError, match="4 targets and 3 predictions"):
    few_shot.grouped_exact_match(targets, ["x"] * 3)


def test_targets_carry_their_group_and_are_whole(mmlu_folder):
  task = fresh(mmlu.add_mmlu_task, "mmlu_three", subjects=("virology",))
  (example, *_) = task.get_dataset(
    {"inputs": 512, "targets": 1}, split="test", shuffle=False
  ).as_numpy_iterator()
  assert task.postprocess_fn("", example=example, is_target=True) == (
    "virology",
    "B",
  )
  assert task.postprocess_fn("B", example=example, is_target=False) == "B"


@pytest.mark.parametrize("name", ["mmlu", "bbh"])
def test_the_default_vocabulary_is_t5s(name):
  features = data.load_task(name).output_features
  assert features["inputs"].vocabulary.sentencepiece_model_file == (
    "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
  )
