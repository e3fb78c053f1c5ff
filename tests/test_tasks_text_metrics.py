"""Text metrics against cases worked by hand and published examples."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from gkd_jax.tasks import text_metrics


@pytest.mark.parametrize(
  ("a", "b", "distance"),
  [
    ("", "", 0),
    ("abc", "", 3),
    ("", "ab", 2),
    ("intention", "execution", 5),  # Jurafsky and Martin, chapter 2
    ("ab", "ba", 2),
  ],
)
def test_edit_distance(a, b, distance):
  assert text_metrics.edit_distance(a, b) == distance


@hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
@hypothesis.given(*[st.text(alphabet="ab", max_size=4)] * 2)
def test_edit_distance_is_the_shortest_path_of_edits(a, b):
  reached, steps = {a}, 0
  while b not in reached:
    reached |= set(itertools.chain(*map(_neighbours, reached)))
    steps += 1
  assert text_metrics.edit_distance(a, b) == steps


def _neighbours(word):
  for i in range(len(word) + 1):
    for c in "ab":
      yield word[:i] + c + word[i:]
      yield word[:i] + c + word[i + 1 :]
    yield word[:i] + word[i + 1 :]


def test_phoneme_error_rates_take_the_nearest_pronunciation():
  targets = [
    ["T AH M EY T OW", "T AH M AA T OW"],  # equals the second: 0 of 6
    ["K AE T"],  # one deleted: 1 of 3
    ["R EH D", "R IY D IH NG"],  # one from the first, far off the other: 1 of 3
    ["AH"],  # three inserted: 3 of 1
  ]
  predictions = ["T AH M AA T OW", "K T", "R AE D", "B AH B B"]
  result = text_metrics.phoneme_error_rates(targets, predictions)
  assert result == {"per": pytest.approx(100 * 5 / 13), "wer": 75.0}


def test_phoneme_error_rates_of_nothing_said():
  result = text_metrics.phoneme_error_rates([["K AE T"]], [""])
  assert result == {"per": 100.0, "wer": 100.0}


def test_phoneme_error_rates_need_references():
  with pytest.raises(ValueError, match="at least one pronunciation"):
    text_metrics.phoneme_error_rates([[""]], ["K"])
  with pytest.raises(ValueError, match="1 targets and 0 predictions"):
    text_metrics.phoneme_error_rates([["K"]], [])


@pytest.mark.parametrize(
  ("prediction", "right", "valid", "steps"),
  [
    ("12+7=19;19-30=-11;#-11", True, 2, 2),
    ("12+7=18;18-30=-12;#-12", False, 1, 2),  # goes on rightly from a mistake
    ("12+7=19;20-30=-10;#-11", True, 1, 2),  # goes on from another number
    ("12+7=19;19-30;#-11", True, 1, 2),  # malformed
    ("12+7;19-30=-11;#-11", True, 0, 2),  # goes on from nothing
    ("12+7=19;19-30=-11;", False, 2, 2),  # no answer
    ("#-11", True, 0, 1),  # no step
    ("", False, 0, 1),
    ("-11", False, 0, 1),
    ("12+7=19;19-30=-11;#-11#3", False, 2, 2),
  ],
)
def test_chain_accuracy(prediction, right, valid, steps):
  target = "12+7=19;19-30=-11;#-11"
  result = text_metrics.chain_accuracy([target], [prediction])
  assert result == {
    "answer_accuracy": 100.0 * right,
    "valid_steps": pytest.approx(100.0 * valid / steps),
  }


def test_chain_accuracy_pools_the_steps_of_all_predictions():
  result = text_metrics.chain_accuracy(
    ["1+1=2;#2", "1+2=3;3+3=6;6+1=7;#7"],
    ["1+1=3;#3", "1+2=3;3+3=6;6+1=7;#7"],
  )
  assert result == {"answer_accuracy": 50.0, "valid_steps": 75.0}


def test_chain_accuracy_needs_an_answer_in_the_reference():
  with pytest.raises(ValueError, match="'#' before its answer"):
    text_metrics.chain_accuracy(["1+1=2"], ["#2"])


def test_rouge_by_hand():
  # Unigrams: 3 shared of 3 and 6, F = 2/3. Bigrams: "the cat" shared, of 2 and
  # 5, F = 2/7. Longest common subsequence: "the cat ... mat", F = 2/3.
  result = text_metrics.rouge(["the cat sat on the mat"], ["the cat mat"])
  assert result["rouge1"] == pytest.approx(100 * 2 / 3)
  assert result["rouge2"] == pytest.approx(100 * 2 / 7)
  assert result["rougeL"] == pytest.approx(100 * 2 / 3)


def test_rouge_is_a_mean_over_examples_and_stems_on_request():
  targets, predictions = ["cats sleep", "a b"], ["cat sleeps", "a b"]
  assert text_metrics.rouge(targets, predictions)["rouge1"] == 50.0
  stemmed = text_metrics.rouge(targets, predictions, use_stemmer=True)
  assert stemmed["rouge1"] == 100.0
  # The longest common subsequence minds the order, unigrams do not.
  swapped = text_metrics.rouge(["a b"], ["b a"])
  assert (swapped["rouge1"], swapped["rougeL"]) == (100.0, 50.0)


def test_bleu_by_hand():
  # Precisions 4/5, 3/4, 2/3, 1/2 and no brevity penalty.
  result = text_metrics.bleu(["ein Haus am See heute"], ["ein Haus am See da"])
  expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
  assert result["bleu"] == pytest.approx(expected)
  # All n-grams match, one word of five is missing: only the brevity penalty.
  short = text_metrics.bleu(["ein Haus am See heute"], ["ein Haus am See"])
  assert short["bleu"] == pytest.approx(100 * 2.718281828 ** (1 - 5 / 4))


def test_bleu_tokenizes_internationally():
  # `intl` parts the quotation marks „ and “ from the word, `13a` does not: only
  # then are there four-grams that match.
  result = text_metrics.bleu(["er sagt „ja“ zu mir"], ["er sagt „ja“ zu dir"])
  expected = 100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25
  assert result["bleu"] == pytest.approx(expected)
