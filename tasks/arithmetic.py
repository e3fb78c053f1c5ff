"""`arithmetic_cot`: sums and differences with the running result written out.

Generated, without a dependency and without chance: `12+7-30` becomes
`12+7=19;19-30=-11;#-11`. An expression's md5 decides its split.
"""

import functools
import hashlib
import random
import re
from collections.abc import Sequence

import seqio
import tensorflow as tf

from gkd_jax.tasks import vocabularies

VOCABULARY = vocabularies.TokenVocabulary([*"0123456789+-=;#"], separator="")
VOCABULARY_SIZE = 24
SIZES = {"train": 50_000, "validation": 1000, "test": 1000}
_STEP = re.compile(r"(-?\d+)([+-])(\d+)=(-?\d+)")


def chain_of_thought(expression: str) -> str:
  """The running results of an expression, and `#` with the last one.

  >>> chain_of_thought("12+7-30")
  '12+7=19;19-30=-11;#-11'
  """
  terms = re.findall(r"[+-]?\d+", expression)
  total, steps = int(terms[0]), []
  for term in terms[1:]:
    result = total + int(term)
    steps.append(f"{total}{term}={result}")
    total = result
  return ";".join([*steps, f"#{total}"])


@functools.cache
def expressions(split: str, seed: int = 0) -> tuple[str, ...]:
  """Distinct expressions of 2 to 5 terms from 0 to 20, disjoint by split."""
  rng = random.Random(f"{seed}-{split}")
  chosen: dict[str, None] = {}
  while len(chosen) < SIZES[split]:
    text = str(rng.randint(0, 20))
    for _ in range(rng.randint(1, 4)):
      text += rng.choice("+-") + str(rng.randint(0, 20))
    place = int(hashlib.md5(text.encode()).hexdigest(), 16) % 20
    if {0: "test", 1: "validation"}.get(place, "train") == split:
      chosen[text] = None
  return tuple(chosen)


def _dataset_fn(split, shuffle_files, seed=None):
  del shuffle_files, seed
  inputs = expressions(split)
  targets = [chain_of_thought(e) for e in inputs]
  return tf.data.Dataset.from_tensor_slices(
    {"inputs": tf.constant(inputs), "targets": tf.constant(targets)}
  )


def arithmetic_metrics(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Percent of right final answers, and of written steps that are right.

  A step is right if it is well formed, adds up, and starts from the result of
  the step before it. An output without a step counts as one wrong step.

  >>> arithmetic_metrics(["1+2=3;3-1=2;#2"], ["1+2=3;3-1=1;#1"])
  {'answer_accuracy': 0.0, 'valid_steps': 50.0}
  """
  right = steps = valid = 0
  for target, prediction in zip(targets, predictions, strict=True):
    right += prediction.rpartition("#")[2] == target.rpartition("#")[2]
    body, mark, _ = prediction.rpartition("#")
    written = [s for s in (body if mark else prediction).split(";") if s]
    steps += max(len(written), 1)
    before = None
    for text in written:
      match = _STEP.fullmatch(text)
      if match:
        a, sign, b, c = match.groups()
        adds_up = int(a) + int(sign + b) == int(c)
        valid += adds_up and before in (None, a)
        before = c
      else:
        before = ""
  return {
    "answer_accuracy": 100.0 * right / max(len(targets), 1),
    "valid_steps": 100.0 * valid / max(steps, 1),
  }


seqio.TaskRegistry.add(
  "arithmetic_cot",
  source=seqio.FunctionDataSource(
    _dataset_fn, splits=("train", "validation", "test")
  ),
  preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
  output_features={
    "inputs": seqio.Feature(VOCABULARY, add_eos=True),
    "targets": seqio.Feature(VOCABULARY, add_eos=True),
  },
  metric_fns=[arithmetic_metrics],
)
