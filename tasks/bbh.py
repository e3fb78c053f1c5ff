"""BIG-Bench Hard (Suzgun et al. 2022): 23 tasks, 3-shot, direct answers.

Data: the benchmark's own files in the folder that the variable BBH_DIR names,
`SUBTASK.json`, each an object whose `examples` have `input` and `target`. There
are 27 files: two tasks come with three, five and seven objects, and count once.
The paper's instruction tuning (arXiv 2306.13649, section A.2) scores exact match
as the unweighted mean over tasks; it does not say how many shots: three are those
of the benchmark and of FLAN (arXiv 2210.11416). The files have no training
split: the first three examples of each are the worked ones and are not scored,
which are not the exemplars of the benchmark's authors.

T5's vocabulary has no braces: `dyck_languages` cannot be answered in full with it.

Tasks registered here: `bbh` with T5's vocabulary, `bbh_bytes` with bytes.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence

import seqio

from gkd_jax.tasks import few_shot, sources

FOLDER = "$BBH_DIR"
_SUBTASKS = """
boolean_expressions causal_judgement date_understanding disambiguation_qa
dyck_languages formal_fallacies geometric_shapes hyperbaton
logical_deduction_three_objects logical_deduction_five_objects
logical_deduction_seven_objects movie_recommendation multistep_arithmetic_two
navigate object_counting penguins_in_a_table reasoning_about_colored_objects
ruin_names salient_translation_error_detection snarks sports_understanding
temporal_sequences tracking_shuffled_objects_three_objects
tracking_shuffled_objects_five_objects tracking_shuffled_objects_seven_objects
web_of_lies word_sorting
"""
SUBTASKS = tuple(_SUBTASKS.split())
NUM_SHOTS = 3


def task_of(subtask: str) -> str:
  """The task of the 23 that a file belongs to.

  >>> task_of("logical_deduction_five_objects"), task_of("snarks")
  ('logical_deduction', 'snarks')
  """
  return re.sub(r"_(three|five|seven)_objects$", "", subtask)


def read(path: str) -> list[dict[str, str]]:
  """The examples of a file.

  Raises:
    ValueError: If it has another form.
  """
  try:
    examples = json.loads(sources.read_text(path))["examples"]
    return [
      {k: str(e[k]).strip() for k in ("input", "target")} for e in examples
    ]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      "expected an object whose 'examples' have 'input' and 'target', got "
      f"another form in {path} ({error!r}); set the variable BBH_DIR"
    ) from error


def load_questions(
  split: str, *, folder: str, subtasks: Sequence[str], num_shots: int
) -> Iterator[few_shot.Question]:
  """The questions, subtask after subtask.

  Raises:
    ValueError: If a file is missing or has another form, or has no more
      examples than the worked ones.
  """
  del split  # There is one.
  for subtask in subtasks:
    path = few_shot.find_file(folder, f"{subtask}.json", setting="BBH_DIR")
    examples = read(path)
    if len(examples) <= num_shots:
      raise ValueError(
        f"expected more than {num_shots} examples, got {len(examples)} in "
        f"{path}; set the variable BBH_DIR or num_shots"
      )
    shots = [
      f"Q: {shot['input']}\nA: {shot['target']}\n\n"
      for shot in examples[:num_shots]
    ]
    for example in examples[num_shots:]:
      yield few_shot.Question(
        header="",
        question=f"Q: {example['input']}\nA:",
        targets=example["target"],
        group=task_of(subtask),
        shots=shots,
      )


def add_bbh_task(
  name: str,
  *,
  folder: str = FOLDER,
  subtasks: Sequence[str] = SUBTASKS,
  num_shots: int = NUM_SHOTS,
  vocabulary: seqio.Vocabulary | None = None,
) -> seqio.Task:
  """Registers the task; see `few_shot.add_task`.

  Args:
    name: The name of the task.
    folder: Of the benchmark; `~` and `$VARIABLE` are expanded when it is read.
    subtasks: Those that are averaged; the file of each must be there.
    num_shots: Worked examples before each question.
    vocabulary: Of inputs and targets; None for T5's SentencePiece.
  """
  return few_shot.add_task(
    name,
    functools.partial(
      load_questions, folder=folder, subtasks=subtasks, num_shots=num_shots
    ),
    splits=("test",),
    num_shots=num_shots,
    vocabulary=vocabulary,
  )


add_bbh_task("bbh")
add_bbh_task("bbh_bytes", vocabulary=seqio.ByteVocabulary())
