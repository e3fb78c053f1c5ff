"""Prompts alone, mixed with rows that have targets; what is registered stays."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from gkd_jax import data

LENGTHS = {"inputs": 3, "targets": 3}
COLUMNS = {
  "alone": {"inputs": ["a", "b"]},
  "both": {"inputs": ["c"], "targets": ["d"]},
  "more": {"inputs": ["e"], "targets": ["f"]},
}
# Bytes are ids from 3 on, EOS is 1.
A, B, C, D, E, F = ([ord(letter) + 3, 1, 0] for letter in "abcdef")
NONE = [0, 0, 0]


@pytest.fixture(scope="module", autouse=True)
def registered():
  """Tasks, and a mixture that meets the task `both` on two ways."""
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)

  def add(name):
    seqio.TaskRegistry.add(
      f"optional_{name}",
      source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: (
          tf.data.Dataset.from_tensor_slices(COLUMNS[name])
        ),
        splits=("train",),
      ),
      preprocessors=[
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos,
      ],
      output_features={"inputs": feature, "targets": feature},
      metric_fns=[],
    )

  for name in COLUMNS:
    add(name)
  seqio.MixtureRegistry.add(
    "optional_inner", [("optional_alone", 1.0), ("optional_both", 3.0)]
  )
  seqio.MixtureRegistry.add(
    "optional_mixed",
    [("optional_inner", 2.0), ("optional_both", 0.5), ("optional_more", 1.0)],
  )
  yield
  for name in ("optional_inner", "optional_mixed"):
    seqio.MixtureRegistry.remove(name)
  for name in COLUMNS:
    seqio.TaskRegistry.remove(f"optional_{name}")


def state(provider):
  """What a task or mixture holds, but for what seqio computes when asked."""
  return {k: v for k, v in vars(provider).items() if k not in ("_stats",)}


def test_registered_tasks_and_mixtures_stay_as_they_are():
  names = [*(f"optional_{n}" for n in COLUMNS), "optional_inner"]
  names.append("optional_mixed")
  before = {n: dict(state(seqio.get_mixture_or_task(n))) for n in names}
  features = {
    n: dict(f["_output_features"])
    for n, f in before.items()
    if "_output_features" in f
  }
  for name in names:
    loaded = data.load_task(name)
    assert loaded is not seqio.get_mixture_or_task(name)
    assert not any(
      task.output_features["targets"].required
      for task in seqio.get_subtasks(loaded)
    )
  for name in names:
    assert state(seqio.get_mixture_or_task(name)) == before[name]
  for name, found in features.items():
    task = seqio.TaskRegistry.get(name)
    assert dict(task.output_features) == found
    assert task.output_features["targets"].required
  # seqio itself still refuses prompts alone.
  with pytest.raises(ValueError, match="missing expected output feature"):
    seqio.TaskRegistry.get("optional_alone").get_dataset(split="train")


def test_a_mixture_has_the_rates_that_were_registered():
  loaded = data.load_task("optional_mixed")
  # Of the inner mixture's 2.0, a quarter and three.
  rates = {task.name: loaded.get_rate(task) for task in loaded.tasks}
  assert rates == {
    "optional_alone": 0.5,
    "optional_both": 2.0,
    "optional_more": 1.0,
  }


@pytest.mark.parametrize(
  "converter", ["EncDecFeatureConverter", "PrefixLMFeatureConverter"]
)
def test_prompts_alone_are_mixed_with_rows_that_have_targets(converter):
  iterator = data.TrainIterator(
    data.load_task("optional_mixed"), LENGTHS, 32, seed=0, converter=converter
  )
  batch = next(iterator)
  rows = zip(
    batch.get("encoder_input_tokens", [[]] * 32),
    batch["decoder_target_tokens"],
    batch["decoder_loss_weights"],
    strict=True,
  )
  found = {tuple(np.concatenate(row).astype(int).tolist()) for row in rows}
  if converter == "EncDecFeatureConverter":
    weighed, alone = [1, 1, 0], [0, 0, 0]
    expected = [
      *(prompt + NONE + alone for prompt in (A, B)),
      *(C + D + weighed, E + F + weighed),
    ]
  else:  # prompt and target in one row
    expected = [
      *(prompt[:2] + [0] * 4 + [0] * 6 for prompt in (A, B)),
      *(
        prompt[:2] + target[:2] + [0, 0] + [0, 0, 1, 1, 0, 0]
        for prompt, target in ((C, D), (E, F))
      ),
    ]
  assert found == {*map(tuple, expected)}


def test_what_reads_targets_refuses_prompts_alone():
  check = lambda name: data.check_targets(
    data.load_task(name), "train", LENGTHS, otherwise="TARGETS = 'outputs'"
  )
  check("optional_both")
  for name in ("optional_alone", "optional_mixed"):
    with pytest.raises(
      ValueError,
      match=r"^expected examples with targets, got prompts alone from"
      " optional_alone; set TARGETS = 'outputs' or MIXTURE_OR_TASK_NAME$",
    ):
      check(name)
