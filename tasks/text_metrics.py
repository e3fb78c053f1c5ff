"""Metrics on decoded text; percentages, 0 to 100."""

from collections.abc import Sequence


def edit_distance(a: Sequence, b: Sequence) -> int:
  """Levenshtein distance: insertions, deletions and substitutions.

  >>> edit_distance("K AE T".split(), "K AA T S".split())
  2
  """
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    diagonal, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      diagonal, row[j] = (
        row[j],
        min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y)),
      )
  return row[-1]


def phoneme_error_rates(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Phoneme and word error rate against the nearest pronunciation.

  >>> phoneme_error_rates([["K AE T", "K AA T"], ["D AO G"]], ["K AA T", "D"])
  {'per': 33.333333333333336, 'wer': 50.0}

  Args:
    targets: for each word its pronunciations, phonemes apart by spaces.
    predictions: for each word one pronunciation.

  Returns:
    `per`: edits over phonemes of the nearest pronunciation, summed over words
    before dividing; `wer`: words unlike all their pronunciations. Percent.
  """
  edits = phonemes = wrong = 0
  for references, prediction in zip(targets, predictions, strict=True):
    spoken = prediction.split()
    scored = [(edit_distance(spoken, r.split()), len(r.split())) for r in references]
    distance, length = min(scored)
    edits += distance
    phonemes += length
    wrong += distance > 0
  return {
    "per": 100.0 * edits / max(phonemes, 1),
    "wer": 100.0 * wrong / max(len(targets), 1),
  }
