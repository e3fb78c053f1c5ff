"""MMLU (Hendrycks et al. 2021): 57 subjects of multiple choice, 5-shot.

Data: the benchmark's own files in the folder that the variable MMLU_DIR names,
`dev/SUBJECT_dev.csv`, `val/SUBJECT_val.csv` and `test/SUBJECT_test.csv`: lines of
question, A, B, C, D, answer, without a header. The five lines of `dev` are the
worked examples, in the benchmark's own form of prompt; the answer is a letter.
The paper's instruction tuning (arXiv 2306.13649, section A.2) scores exact match
as the unweighted mean over subjects; it does not say how many shots: five are
those of the benchmark and of FLAN (arXiv 2210.11416).

Tasks registered here: `mmlu` with T5's vocabulary, `mmlu_bytes` with bytes.
"""

import csv
import functools
import io
from collections.abc import Iterator, Sequence

import seqio

from gkd_jax.tasks import few_shot, sources

FOLDER = "$MMLU_DIR"
_SUBJECTS = """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge
college_biology college_chemistry college_computer_science college_mathematics
college_medicine college_physics computer_security conceptual_physics
econometrics electrical_engineering elementary_mathematics formal_logic
global_facts high_school_biology high_school_chemistry
high_school_computer_science high_school_european_history
high_school_geography high_school_government_and_politics
high_school_macroeconomics high_school_mathematics high_school_microeconomics
high_school_physics high_school_psychology high_school_statistics
high_school_us_history high_school_world_history human_aging human_sexuality
international_law jurisprudence logical_fallacies machine_learning management
marketing medical_genetics miscellaneous moral_disputes moral_scenarios
nutrition philosophy prehistory professional_accounting professional_law
professional_medicine professional_psychology public_relations
security_studies sociology us_foreign_policy virology world_religions
"""
SUBJECTS = tuple(_SUBJECTS.split())
NUM_SHOTS = 5
# seqio's names of the splits, and the benchmark's.
_FILES = {"validation": "val", "test": "test"}
_LETTERS = "ABCD"


def question(row: Sequence[str]) -> str:
  """The text of a line up to where the answer goes.

  Args:
    row: Question, four choices, answer.

  Example:
    >>> print(question(["1 + 1 = ?", "1", "2", "3", "4", "B"]))
    1 + 1 = ?
    A. 1
    B. 2
    C. 3
    D. 4
    Answer:
  """
  choices = (f"{x}. {c}" for x, c in zip(_LETTERS, row[1:5], strict=True))
  return "\n".join([row[0], *choices, "Answer:"])


def header(subject: str) -> str:
  """What stands before the worked examples of a subject."""
  return (
    "The following are multiple choice questions (with answers) about "
    f"{subject.replace('_', ' ')}.\n\n"
  )


def read(path: str) -> list[list[str]]:
  """The lines of a file: question, four choices, answer.

  Raises:
    ValueError: If a line has another form.
  """
  lines = io.StringIO(sources.read_text(path), newline="")
  rows = [row for row in csv.reader(lines) if row]
  for number, row in enumerate(rows, start=1):
    if len(row) != 6 or row[5] not in tuple(_LETTERS):
      raise ValueError(
        "expected question, four choices and an answer of A to D, got "
        f"{row} as number {number} in {path}; set the variable MMLU_DIR"
      )
  return rows


def load_questions(
  split: str, *, folder: str, subjects: Sequence[str], num_shots: int
) -> Iterator[few_shot.Question]:
  """The questions of a split, subject after subject.

  Raises:
    ValueError: If a subject's file is missing, a line has another form, or
      there are too few worked examples.
  """
  find = functools.partial(few_shot.find_file, folder, setting="MMLU_DIR")
  for subject in subjects:
    worked = read(find("dev", f"{subject}_dev.csv"))
    if len(worked) < num_shots:
      raise ValueError(
        f"expected {num_shots} worked examples of {subject}, got {len(worked)};"
        " set the variable MMLU_DIR or num_shots"
      )
    shots = [f"{question(row)} {row[5]}\n\n" for row in worked[:num_shots]]
    kind = _FILES[split]
    for row in read(find(kind, f"{subject}_{kind}.csv")):
      yield few_shot.Question(
        header=header(subject),
        question=question(row),
        targets=row[5],
        group=subject,
        shots=shots,
      )


def add_mmlu_task(
  name: str,
  *,
  folder: str = FOLDER,
  subjects: Sequence[str] = SUBJECTS,
  num_shots: int = NUM_SHOTS,
  vocabulary: seqio.Vocabulary | None = None,
) -> seqio.Task:
  """Registers the task; see `few_shot.add_task`.

  Args:
    name: The name of the task.
    folder: Of the benchmark; `~` and `$VARIABLE` are expanded when it is read.
    subjects: Those that are averaged; the file of each must be there.
    num_shots: Worked examples before each question.
    vocabulary: Of inputs and targets; None for T5's SentencePiece.
  """
  return few_shot.add_task(
    name,
    functools.partial(
      load_questions, folder=folder, subjects=subjects, num_shots=num_shots
    ),
    splits=tuple(_FILES),
    num_shots=num_shots,
    vocabulary=vocabulary,
  )


add_mmlu_task("mmlu")
add_mmlu_task("mmlu_bytes", vocabulary=seqio.ByteVocabulary())
