"""`arithmetic_cot`: what is generated, and its way through seqio."""

import re

import numpy as np
import pytest
import seqio

from gkd_jax.tasks import arithmetic

DATA = arithmetic.generate(seed=0, max_terms=5, max_operand=20)


def test_splits_have_their_sizes_and_share_no_expression():
  assert {split: len(columns["inputs"]) for split, columns in DATA.items()} == {
    "train": 50_000,
    "validation": 1_000,
    "test": 1_000,
  }
  everything = [e for columns in DATA.values() for e in columns["inputs"]]
  assert len(set(everything)) == 52_000


def test_expressions_have_two_to_five_terms_of_zero_to_twenty():
  counts, operands = set(), set()
  for columns in DATA.values():
    for expression in columns["inputs"]:
      assert re.fullmatch(r"\d+([-+]\d+){1,4}", expression)
      terms = re.findall(r"\d+", expression)
      counts.add(len(terms))
      operands.update(map(int, terms))
  assert counts == {2, 3, 4, 5}
  assert operands == set(range(21))


def test_chains_are_those_that_python_computes():
  for expression, chain in zip(
    DATA["validation"]["inputs"], DATA["validation"]["targets"], strict=True
  ):
    *steps, answer = chain.split(";")
    assert answer == f"#{eval(expression)}"
    assert len(steps) == len(re.findall(r"\d[-+]", expression))
    for step in steps:
      left, _, right = step.partition("=")
      assert eval(left) == int(right)
  assert arithmetic.chain_of_thought("0-20-20") == "0-20=-20;-20-20=-40;#-40"


def test_a_seed_gives_the_same_data_everywhere():
  # Of numpy's frozen RandomState; another result breaks stored comparisons.
  assert DATA["test"]["inputs"][:3] == ["9+20-3", "4-18", "0-12-9-8"]
  other = arithmetic.generate(seed=1, max_terms=5, max_operand=20)
  assert other["test"]["inputs"][:3] != DATA["test"]["inputs"][:3]


def test_too_few_expressions_are_an_error():
  with pytest.raises(ValueError, match="set max_terms or max_operand"):
    arithmetic.generate(seed=0, max_terms=2, max_operand=20)


def test_the_task_through_seqio():
  evaluator = seqio.Evaluator(
    "arithmetic_cot",
    feature_converter=seqio.EncDecFeatureConverter(pack=False),
    eval_split="test",
    sequence_length={"inputs": 16, "targets": 48},
    num_examples=40,
  )
  vocabulary = arithmetic.VOCABULARY

  def predict(dataset):
    outputs = []
    for index, batch in dataset.as_numpy_iterator():
      inputs = vocabulary.decode(batch["encoder_input_tokens"])
      chain = arithmetic.chain_of_thought(inputs)
      # The reference is reached within the lengths, EOS included.
      tokens = [*vocabulary.encode(chain), 1]
      padded = np.pad(tokens, (0, 48 - len(tokens)))
      np.testing.assert_array_equal(batch["decoder_target_tokens"], padded)
      if index < 10:
        padded = np.pad(vocabulary.encode("#1000"), (0, 43))
      outputs.append((index, padded))
    return outputs

  metrics, _ = evaluator.evaluate(
    compute_metrics=True, predict_fn=predict, step=0
  )
  evaluator.close()
  result = metrics.result()["arithmetic_cot"]
  assert result["answer_accuracy"] == 75.0
  steps = [c.count("=") for c in DATA["test"]["targets"][:40]]
  assert result["valid_steps"] == pytest.approx(
    100 * sum(steps[10:]) / (sum(steps[10:]) + 10)
  )


def test_labelled_parts_are_the_first_train_expressions():
  column = lambda name, split: [
    example["inputs_pretokenized"].decode()
    for example in seqio.get_mixture_or_task(name)
    .get_dataset({"inputs": 16, "targets": 48}, split, shuffle=False)
    .as_numpy_iterator()
  ]
  assert column("arithmetic_cot_1k", "train") == DATA["train"]["inputs"][:1000]
  assert column("arithmetic_cot_4k", "test") == DATA["test"]["inputs"]
  with pytest.raises(ValueError, match="got 50001; set num_labelled"):
    arithmetic._load_columns(
      "train", num_labelled=50_001, seed=0, max_terms=5, max_operand=20
    )
