"""Sums and differences with the running result as a chain of thought.

`12+7-30` becomes `12+7=19;19-30=-11;#-11`. The data are generated: nothing is
downloaded, the same seed gives the same examples everywhere, and md5 of the
expression decides on its split, so no expression is in two.

Tasks registered here, all with the same validation and test splits:
  arithmetic_cot: all train expressions.
  arithmetic_cot_1k, arithmetic_cot_4k, arithmetic_cot_16k: the first 1,000,
    4,000 and 16,000 of them, which is a random sample.
"""

import functools
import hashlib
import re
from collections.abc import Mapping

import numpy as np
import seqio

from gkd_jax.tasks import sources, text_metrics, vocabularies

VOCABULARY = vocabularies.TokenVocabulary("0123456789+-=;#", separator="")
SPLIT_SIZES = {"train": 50_000, "validation": 1_000, "test": 1_000}

_NUM_BUCKETS = 40
# Draws per expression wanted: many draws of two terms are duplicates, and
# only one bucket in forty is test.
_OVERSAMPLING = 1.6


def chain_of_thought(expression: str) -> str:
  """The steps of an expression of sums and differences, and its result.

  Args:
    expression: Numbers with `+` or `-` between them, without spaces.

  Returns:
    One step per operator, and `#` with the result.

  Example:
    >>> chain_of_thought("12+7-30")
    '12+7=19;19-30=-11;#-11'
  """
  first, *rest = re.findall(r"[-+]?\d+", expression)
  total = int(first)
  steps = []
  for term in rest:
    result = total + int(term)
    steps.append(f"{total}{term}={result};")
    total = result
  return "".join(steps) + f"#{total}"


def _split_of(expression: str) -> str:
  # Not for security: a split that is the same on every machine.
  digest = hashlib.md5(expression.encode(), usedforsecurity=False)
  bucket = int.from_bytes(digest.digest()) % _NUM_BUCKETS
  return {0: "test", 1: "validation"}.get(bucket, "train")


@functools.lru_cache(maxsize=4)
def generate(
  *, seed: int, max_terms: int, max_operand: int
) -> Mapping[str, sources.Columns]:
  """Draws distinct expressions and deals them to the splits.

  Args:
    seed: The seed of the draws.
    max_terms: Each expression has 2 to this many terms, drawn evenly before
      duplicates go.
    max_operand: Operands are drawn from 0 to this number.

  Returns:
    For each split the columns `inputs` and `targets`, of the sizes
    `SPLIT_SIZES`.

  Raises:
    ValueError: If there are too few distinct expressions.
  """
  num_draws = int(_OVERSAMPLING * sum(SPLIT_SIZES.values()))
  # RandomState's streams are frozen for good; those of Generator are not.
  random = np.random.RandomState(seed)
  counts = random.randint(2, max_terms + 1, num_draws)
  operands = random.randint(0, max_operand + 1, (num_draws, max_terms))
  minus = random.randint(0, 2, (num_draws, max_terms))
  signs = np.where(minus == 1, "-", "+")
  terms = np.char.add(signs, operands.astype(str))
  expressions = dict.fromkeys(
    "".join(row[:count])[1:]
    for row, count in zip(terms.tolist(), counts.tolist(), strict=True)
  )
  members = {split: [] for split in SPLIT_SIZES}
  for expression in expressions:
    members[_split_of(expression)].append(expression)
  for split, size in SPLIT_SIZES.items():
    if len(members[split]) < size:
      raise ValueError(
        f"expected {size} distinct expressions for {split}, got "
        f"{len(members[split])}; set max_terms or max_operand higher"
      )
    del members[split][size:]
  return {
    split: {"inputs": m, "targets": [chain_of_thought(e) for e in m]}
    for split, m in members.items()
  }


def _load_columns(
  split: str, *, num_labelled: int | None, **options: int
) -> sources.Columns:
  columns = generate(**options)[split]
  if split != "train" or num_labelled is None:
    return columns
  number = len(columns["inputs"])
  if not 1 <= num_labelled <= number:
    raise ValueError(
      f"expected between 1 and {number} labelled expressions, got "
      f"{num_labelled}; set num_labelled"
    )
  return {name: texts[:num_labelled] for name, texts in columns.items()}


def add_arithmetic_task(
  name: str,
  *,
  num_labelled: int | None = None,
  seed: int = 0,
  max_terms: int = 5,
  max_operand: int = 20,
) -> seqio.Task:
  """Registers the task with its own expressions.

  Args:
    name: The name of the task.
    num_labelled: How many of the train expressions it has; None for all.
    seed: See `generate`.
    max_terms: See `generate`.
    max_operand: See `generate`.

  Returns:
    The task. Its metrics are `answer_accuracy` and `valid_steps`, in percent.

  Raises:
    ValueError: If the name is taken.
  """
  feature = seqio.Feature(VOCABULARY, add_eos=True)
  return seqio.TaskRegistry.add(
    name,
    source=sources.ColumnsDataSource(
      functools.partial(
        _load_columns,
        num_labelled=num_labelled,
        seed=seed,
        max_terms=max_terms,
        max_operand=max_operand,
      ),
      splits=tuple(SPLIT_SIZES),
    ),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={"inputs": feature, "targets": feature},
    metric_fns=[text_metrics.chain_accuracy],
  )


add_arithmetic_task("arithmetic_cot")
for _thousands in (1, 4, 16):
  add_arithmetic_task(
    f"arithmetic_cot_{_thousands}k", num_labelled=1000 * _thousands
  )
