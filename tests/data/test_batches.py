"""Batches of tasks whose examples have no targets, or not every split."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from gkd_jax import data

WORDS = ["ab", "c"]


def add_task(name, splits=("train",), **features):
  """Registers prompts without targets, in bytes; nothing is shuffled."""
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)

  def lines(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"inputs": WORDS})

  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(lines, splits=splits),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={"inputs": feature}
    | {key: feature for key in features.get("declared", ())},
    metric_fns=[],
  )


@pytest.fixture(scope="module", autouse=True)
def tasks():
  names = {
    "prompts_alone": {},
    "prompts_with_declared_targets": {"declared": ("targets",)},
  }
  for name, options in names.items():
    add_task(name, **options)
  yield
  for name in names:
    seqio.TaskRegistry.remove(name)


# Bytes are ids from 3 on, EOS is 1.
ROWS = [[97 + 3, 98 + 3, 1, 0], [99 + 3, 1, 0, 0]]


@pytest.mark.parametrize(
  "name", ["prompts_alone", "prompts_with_declared_targets"]
)
def test_prompts_without_targets_are_batches_without_weights(name):
  task = data.load_task(name)
  iterator = data.TrainIterator(task, {"inputs": 4, "targets": 3}, 2, seed=0)
  batch = next(iterator)
  order = np.argsort(batch["encoder_input_tokens"][:, 0])
  assert batch["encoder_input_tokens"][order].tolist() == ROWS
  for key in ("input_tokens", "target_tokens", "loss_weights"):
    assert batch[f"decoder_{key}"].tolist() == [[0] * 3] * 2
  assert isinstance(data.target_vocabulary(task), seqio.ByteVocabulary)


def test_prompts_without_targets_are_prefixes_of_decoder_only_rows():
  iterator = data.TrainIterator(
    data.load_task("prompts_alone"),
    {"inputs": 4, "targets": 3},
    2,
    seed=0,
    converter="PrefixLMFeatureConverter",
  )
  batch = next(iterator)
  order = np.argsort(batch["decoder_target_tokens"][:, 0])
  rows = [row + [0] * 3 for row in ROWS]
  assert batch["decoder_target_tokens"][order].tolist() == rows
  assert not batch["decoder_loss_weights"].any()


def test_a_split_of_some_tasks_of_a_mixture():
  add_task("prompts_with_validation", splits=("train", "validation"))
  seqio.MixtureRegistry.add(
    "prompts_mixed", ["prompts_alone", "prompts_with_validation"], 1.0
  )
  task = data.load_task("prompts_mixed")
  (found,) = data.tasks_with_split(task, "validation")
  assert found.name == "prompts_with_validation"
  assert data.has_split(task, "validation") and not data.has_split(task, "test")
  with pytest.raises(
    ValueError,
    match=r"split of \['train', 'validation'\] of prompts_mixed, got 'test'; set",
  ):
    data.tasks_with_split(task, "test")
