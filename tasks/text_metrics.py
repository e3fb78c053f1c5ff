"""Metrics of decoded texts; every value is a percentage from 0 to 100.

The functions have the signature of seqio's metrics, `(targets, predictions)`
in the same order of examples, and return a dictionary of floats.
"""

import re
from collections.abc import Sequence

from gkd_jax.tasks import example_statistics


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


def _phoneme_errors(references: Sequence[str], prediction: str):
  distance, length = count_phoneme_errors(references, prediction)
  return {
    "per": [100.0 * distance, float(length)],
    "wer": [100.0 * (distance > 0), 1.0],
  }


@example_statistics.declare(_phoneme_errors)
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
    distance, length = count_phoneme_errors(references, prediction)
    errors += distance
    phonemes += length
    wrong += distance > 0
  return {
    "per": 100.0 * errors / phonemes,
    "wer": 100.0 * wrong / len(predictions),
  }


def count_phoneme_errors(
  references: Sequence[str], prediction: str
) -> tuple[int, int]:
  """Edits to the nearest pronunciation, and its phonemes.

  Args:
    references: A word's pronunciations; see `phoneme_error_rates`.
    prediction: One pronunciation.

  Raises:
    ValueError: If the word has no pronunciation.

  Example:
    >>> count_phoneme_errors(["K AE T", "K AA T"], "K AA D")
    (1, 3)
  """
  spoken = [reference.split() for reference in references]
  if not spoken or not all(spoken):
    raise ValueError(
      f"expected at least one pronunciation of a word, got {references!r}; "
      "set the split to one with references"
    )
  distances = [edit_distance(s, prediction.split()) for s in spoken]
  best = min(range(len(distances)), key=distances.__getitem__)
  return distances[best], len(spoken[best])


def _check_pairs(targets: Sequence, predictions: Sequence) -> None:
  if len(targets) != len(predictions) or not predictions:
    raise ValueError(
      "expected as many predictions as targets and at least one, got "
      f"{len(targets)} targets and {len(predictions)} predictions; "
      "set the evaluation split"
    )


_STEP = re.compile(r"(-?\d+)([-+])(\d+)=(-?\d+)")


def _chain(target: str, prediction: str):
  is_right, valid, steps = check_chain(target, prediction)
  return {
    "answer_accuracy": [100.0 * is_right, 1.0],
    "valid_steps": [100.0 * valid, float(steps)],
  }


@example_statistics.declare(_chain)
def chain_accuracy(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Final answers and steps of chains such as `12+7=19;19-30=-11;#-11`.

  A step is valid if it has this form, its result is right, and from the second
  on it begins with the result that the step before wrote. A prediction without
  any step counts as one that is not valid.

  Args:
    targets: The reference chains.
    predictions: The generated chains.

  Returns:
    `answer_accuracy`: predictions whose text after the last `#` is the
    reference's, in percent; `valid_steps`: valid steps in percent of all steps
    of all predictions.

  Raises:
    ValueError: If the two differ in length, are empty, or a reference has no
      answer.

  Example:
    >>> chain_accuracy(["1+2=3;3-1=2;#2"], ["1+2=4;4-1=3;#2"])
    {'answer_accuracy': 100.0, 'valid_steps': 50.0}
  """
  _check_pairs(targets, predictions)
  right = valid = total = 0
  for target, prediction in zip(targets, predictions, strict=True):
    is_right, valid_steps, steps = check_chain(target, prediction)
    right += is_right
    valid += valid_steps
    total += steps
  return {
    "answer_accuracy": 100.0 * right / len(predictions),
    "valid_steps": 100.0 * valid / total,
  }


def check_chain(target: str, prediction: str) -> tuple[bool, int, int]:
  """Whether a chain's answer is right, its valid steps, and its steps.

  Args:
    target: The reference chain; see `chain_accuracy`.
    prediction: The generated chain.

  Raises:
    ValueError: If the reference has no answer.

  Example:
    >>> check_chain("1+2=3;3-1=2;#2", "1+2=4;4-1=3;#2")
    (True, 1, 2)
  """
  _, mark, wanted = target.rpartition("#")
  if not mark:
    raise ValueError(
      f"expected a reference with '#' before its answer, got {target!r}; "
      "set the task"
    )
  _, mark, answer = prediction.rpartition("#")
  steps = [s for s in prediction.partition("#")[0].split(";") if s]
  is_right = bool(mark) and answer == wanted
  return is_right, _count_valid_steps(steps), max(len(steps), 1)


def _count_valid_steps(steps: Sequence[str]) -> int:
  valid = 0
  previous = None
  for step in steps:
    match = _STEP.fullmatch(step)
    if match is None:
      previous = ""  # Nothing can follow on from a malformed step.
      continue
    first, sign, second, result = match.groups()
    change = int(second) if sign == "+" else -int(second)
    follows = previous is None or previous == first
    valid += follows and int(first) + change == int(result)
    previous = result
  return valid


def exact_match(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Outputs that are their targets but for white space around them.

  Args:
    targets: The references.
    predictions: The outputs.

  Returns:
    `exact`, in percent.

  Raises:
    ValueError: If the two differ in length or are empty.

  Example:
    >>> exact_match(["4", "5"], [" 4", "6"])
    {'exact': 50.0}
  """
  _check_pairs(targets, predictions)
  pairs = zip(targets, predictions, strict=True)
  right = sum(target.strip() == output.strip() for target, output in pairs)
  return {"exact": 100.0 * right / len(targets)}


def rouge(
  targets: Sequence[str],
  predictions: Sequence[str],
  *,
  use_stemmer: bool = False,
) -> dict[str, float]:
  """ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum, mean F-measures (Lin 2004).

  ROUGE-Lsum compares summaries sentence by sentence: a line break ends a
  sentence, and as in the T5 tasks so does a full stop between spaces.

  Args:
    targets: The reference summaries.
    predictions: The generated summaries.
    use_stemmer: Whether words are stemmed first. The T5 tasks do not stem;
      numbers with and without are not comparable.

  Returns:
    `rouge1`, `rouge2`, `rougeL` and `rougeLsum`, in percent.

  Raises:
    ValueError: If the two differ in length or are empty.
  """
  from rouge_score import rouge_scorer

  _check_pairs(targets, predictions)
  names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
  scorer = rouge_scorer.RougeScorer(names, use_stemmer=use_stemmer)
  scores = [
    scorer.score(_sentences(target), _sentences(prediction))
    for target, prediction in zip(targets, predictions, strict=True)
  ]
  return {
    name: 100.0 * sum(s[name].fmeasure for s in scores) / len(scores)
    for name in names
  }


def _sentences(summary: str) -> str:
  """One sentence in a line."""
  return summary.replace(" . ", " .\n")


@example_statistics.declare(example_statistics.bleu)
def bleu(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Corpus BLEU by sacrebleu, with the `intl` tokenizer as in the T5 tasks.

  Args:
    targets: One reference translation each.
    predictions: The generated translations.

  Returns:
    `bleu`, from 0 to 100.

  Raises:
    ValueError: If the two differ in length or are empty.
  """
  import sacrebleu

  _check_pairs(targets, predictions)
  score = sacrebleu.corpus_bleu(
    list(predictions), [list(targets)], tokenize="intl"
  )
  return {"bleu": score.score}


@example_statistics.declare(example_statistics.chrf)
def chrf(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Corpus chrF by sacrebleu: character 6-grams, no words, beta 2.

  Args:
    targets: One reference translation each.
    predictions: The generated translations.

  Returns:
    `chrf`, from 0 to 100.

  Raises:
    ValueError: If the two differ in length or are empty.
  """
  import sacrebleu

  _check_pairs(targets, predictions)
  score = sacrebleu.corpus_chrf(list(predictions), [list(targets)])
  return {"chrf": score.score}


def self_bleu(outputs: Sequence[Sequence[str]]) -> dict[str, float]:
  """How alike several outputs for one input are: 100 if all are equal.

  Self-BLEU of Zhu et al. (arXiv 1802.01886), among the outputs of each input, as
  the paper draws quality against diversity (its figure 4): sentence BLEU of each
  output with the other outputs of its input as references, mean over outputs,
  then over inputs. BLEU is sacrebleu's, of up to 4-grams (fewer in outputs of
  fewer tokens), tokenizer `intl`. Values depend on the number of outputs, since
  more references are easier to match: compare at one number.

  Args:
    outputs: For each input its outputs, at least two.

  Returns:
    `self_bleu`, from 0 to 100; less is more diverse.

  Raises:
    ValueError: If there are no inputs, or an input has fewer than two outputs.

  Example:
    >>> self_bleu([["a b", "a b"], ["c", "d"]])
    {'self_bleu': 50.0}
  """
  import sacrebleu

  if not outputs or min(map(len, outputs)) < 2:
    raise ValueError(
      "expected at least two outputs of each input, got "
      f"{min(map(len, outputs), default=0)}; set NUM_SAMPLES"
    )
  metric = sacrebleu.BLEU(
    tokenize="intl", effective_order=True, smooth_method="none"
  )
  total = 0.0
  for texts in outputs:
    of_text = {}  # Equal outputs have equal references, as far as BLEU goes.
    for i, text in enumerate(texts):
      if text not in of_text:
        others = [*texts[:i], *texts[i + 1 :]]
        # sacrebleu gives an empty text 0, even next to an empty reference.
        of_text[text] = (
          100.0 if text in others else metric.sentence_score(text, others).score
        )
    total += sum(of_text[text] for text in texts) / len(texts)
  return {"self_bleu": total / len(outputs)}
