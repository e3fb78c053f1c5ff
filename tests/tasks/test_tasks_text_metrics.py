"""Text metrics against cases worked by hand and published examples."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gkd_jax.tasks import calculator, example_statistics, text_metrics


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


def test_chrf_by_hand():
  # Character n-grams without spaces of "abcd" against "abce": 3 of 4, 2 of 3, 1
  # of 2, 0 of 1, and none longer; precision and recall are equal, so is F.
  result = text_metrics.chrf(["ab ce"], ["ab cd"])
  assert result["chrf"] == pytest.approx(100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)


def test_self_bleu_by_hand():
  # "a b c d" has a copy among its two references, and so has "".
  outputs = [["a b c d", "a b c d", "a b x"], ["", ""]]
  # "a b x" has 3 tokens: 2/3, 1/2, and no trigram, so BLEU without smoothing
  # is 0.
  expected = ((100 + 100 + 0) / 3 + 100) / 2
  assert text_metrics.self_bleu(outputs)["self_bleu"] == pytest.approx(expected)


def test_self_bleu_of_partly_equal_outputs_by_hand():
  # Both ways: 5/6, 4/5, 3/4, 2/3 of the n-grams, and the same length.
  pair = ["a b c d e f", "a b c d e g"]
  expected = 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
  result = text_metrics.self_bleu([pair])["self_bleu"]
  assert result == pytest.approx(expected)
  # The second reference holds what the first one lacks: each n-gram but the
  # last of every order is in one of the others.
  three = text_metrics.self_bleu([[*pair, "x b c d e f"]])["self_bleu"]
  assert three > expected


def test_self_bleu_needs_two_outputs():
  with pytest.raises(ValueError, match="got 1; set NUM_SAMPLES"):
    text_metrics.self_bleu([["a", "b"], ["a"]])
  with pytest.raises(ValueError, match="got 0"):
    text_metrics.self_bleu([])


PAIRS = {
  text_metrics.phoneme_error_rates: (
    [["T AH M EY", "T AH M AA T"], ["K AE T"], ["AH"]],
    ["T AH M AA T", "K T", "B AH B B"],
  ),
  text_metrics.chain_accuracy: (
    ["1+1=2;#2", "1+2=3;3+3=6;#6", "2+2=4;#4"],
    ["1+1=3;#2", "1+2=3;3+3=5;#5", ""],
  ),
  text_metrics.bleu: (
    ["ein Haus am See heute", "er sagt „ja“ zu mir", "gut"],
    ["ein Haus am See", "er sagt „ja“ zu dir und mir", "nein"],
  ),
  text_metrics.rouge: (["a b c", "d e f"], ["a b", "d x f"]),
  calculator.final_number_accuracy: (
    ["The answer is 14.", "The answer is 2.", "The answer is 5."],
    ["3 * 4 = 13. 13 + 2 = 15. The answer is 15.", "2", "6"],
  ),
}


@pytest.mark.parametrize("metric", PAIRS, ids=lambda f: f.__name__)
def test_summed_statistics_of_examples_are_the_metric(metric):
  targets, predictions = PAIRS[metric]
  whole = metric(targets, predictions)
  parts = [
    example_statistics.of_example(metric, t, p)
    for t, p in zip(targets, predictions, strict=True)
  ]
  for name, value in whole.items():
    assert 0 < value < 100, name
    stats = np.array([part[name] for part in parts])
    combine = example_statistics.metric_of(stats)
    assert combine(stats.sum(0)[None])[0] == pytest.approx(value), name
    # Examples of several outputs have mean statistics.
    assert combine(stats.sum(0)[None] / 3)[0] == pytest.approx(value), name
