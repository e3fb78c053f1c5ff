"""Metrics of decoded texts; every value is a percentage from 0 to 100.

The functions have the signature of seqio's metrics, `(targets, predictions)`
in the same order of examples, and return a dictionary of floats.
"""

from collections.abc import Sequence


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
  """The least number of insertions, deletions and substitutions, a to b.

  Args:
    a: A sequence of symbols.
    b: Another one.

  Returns:
    The Levenshtein distance.

  Example:
    >>> edit_distance("kitten", "sitting")
    3
  """
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, start=1):
    diagonal, row[0] = row[0], i
    for j, y in enumerate(b, start=1):
      diagonal, row[j] = (
        row[j],
        min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y)),
      )
  return row[-1]


def phoneme_error_rates(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Phoneme and word error rates against the nearest pronunciation.

  Of a word's pronunciations the one at the least edit distance counts, the
  first of them on a tie. The word is wrong if that distance is not 0.

  Args:
    targets: For each word its pronunciations, phonemes separated by spaces.
    predictions: For each word one pronunciation.

  Returns:
    `per`: the sum of edit distances per 100 phonemes of the nearest
    pronunciations, which exceeds 100 if predictions are far too long; `wer`:
    wrong words in percent.

  Raises:
    ValueError: If the two differ in length, are empty, or a word has no
      pronunciation.

  Example:
    >>> phoneme_error_rates([["K AE T", "K AA T"], ["D AO"]], ["K AA T", "D"])
    {'per': 20.0, 'wer': 50.0}
  """
  _check_pairs(targets, predictions)
  errors = phonemes = wrong = 0
  for references, prediction in zip(targets, predictions, strict=True):
    spoken = [reference.split() for reference in references]
    if not spoken or not all(spoken):
      raise ValueError(
        f"expected at least one pronunciation of a word, got {references!r}; "
        "set the split to one with references"
      )
    distances = [edit_distance(s, prediction.split()) for s in spoken]
    best = min(range(len(distances)), key=distances.__getitem__)
    errors += distances[best]
    phonemes += len(spoken[best])
    wrong += distances[best] > 0
  return {
    "per": 100.0 * errors / phonemes,
    "wer": 100.0 * wrong / len(predictions),
  }


def _check_pairs(targets: Sequence, predictions: Sequence) -> None:
  if len(targets) != len(predictions) or not predictions:
    raise ValueError(
      "expected as many predictions as targets and at least one, got "
      f"{len(targets)} targets and {len(predictions)} predictions; "
      "set the evaluation split"
    )
