"""Outputs that `gkd infer` writes, and what is trained on them: EOS where it ended.

Three outputs by hand, in vocabularies whose special tokens have other ids: two that
end, one of them with a token 0 inside where 0 is a token, and one that was cut.
"""

import dataclasses
import json

import nightly
import numpy as np
import pytest
import seqio
import tensorflow as tf
import token_layouts
import toy_models

from gkd_jax import checkpoints, data, evaluation, infer
from gkd_jax.tasks import distilled, teacher_outputs, teacher_shards

LENGTHS = {"inputs": 3, "targets": 5}
A, B, C = range(token_layouts.FIRST_LETTER, token_layouts.FIRST_LETTER + 3)
LAYOUTS = token_layouts.LAYOUTS
SHORT = [("sentencepiece",), ("two_eos",)]


@pytest.fixture(name="registry", autouse=True)
def _registry():
  before = set(seqio.TaskRegistry.names())
  yield
  for name in set(seqio.TaskRegistry.names()) - before:
    seqio.TaskRegistry.remove(name)


@pytest.fixture(scope="module", name="checkpoint")
def _checkpoint(tmp_path_factory):
  """Parameters of the network that the scripted model has and does not use."""
  folder = tmp_path_factory.mktemp("params")
  model = toy_models.model(8)
  fields = dataclasses.asdict(model.config)
  checkpoints.save_safetensors(folder, toy_models.params(model, 1), fields)
  return folder


def said(layout):
  """Scripts of the inputs a, b and c, and the outputs in them."""
  ids = LAYOUTS[layout]
  first, last = ids["eos"][0], ids["eos"][-1]
  zero = 0 if ids["unk"] == 0 else C
  scripts = {
    "a": [A, B, first, C, C],
    "b": [A, zero, B, last, C],
    "c": [A, A, A, A, A],
  }
  texts = ["ab", "a?b" if zero == 0 else "acb", "aaaaa"]
  return scripts, [[A, B, first], [A, zero, B, last], [A] * 5], texts


def settings(layout, checkpoint, **more):
  token_layouts.task("letters", layout, [("a", "b"), ("b", "b"), ("c", "b")])
  return infer.DecodeSettings(
    model=token_layouts.Scripted(said(layout)[0]),
    checkpoint_path=str(checkpoint),
    mixture_or_task_name="letters",
    task_feature_lengths=LENGTHS,
    batch_size=2,
    **more,
  )


def targets(task):
  """Targets of the task's train split, with room for an EOS after a cut output."""
  room = LENGTHS | {"targets": 9}
  dataset = task.get_dataset(room, split="train", shuffle=False)
  return [e["targets"].tolist() for e in dataset.as_numpy_iterator()]


@pytest.mark.parametrize("layout", nightly.besides(SHORT, LAYOUTS))
def test_lines_say_whether_an_output_ended_and_train_accordingly(
  layout, checkpoint, tmp_path
):
  path = tmp_path / "outputs.jsonl"
  infer.infer(settings(layout, checkpoint), output_path=str(path))
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  _, outputs, texts = said(layout)
  assert [(r["inputs"], r["prediction"], r["ended"]) for r in rows] == list(
    zip("abc", texts, [True, True, False], strict=True)
  )
  scores = [len(output) * np.log(0.5) for output in outputs]
  np.testing.assert_allclose([r["score"] for r in rows], scores, rtol=1e-5)
  task = teacher_outputs.register("taught", str(path), "letters")
  # Texts are tokenized anew, and end with the vocabulary's first EOS.
  eos = LAYOUTS[layout]["eos"][0]
  assert targets(task) == [
    [*outputs[0][:-1], eos],
    [*outputs[1][:-1], eos],
    [A] * 5,
  ]
  task = teacher_outputs.register("t2", str(path), "letters", drop_cut=True)
  assert len(targets(task)) == task.num_input_examples("train") == 2


@pytest.mark.parametrize("layout", nightly.besides(SHORT, LAYOUTS))
def test_shards_have_the_very_tokens(layout, checkpoint, tmp_path):
  prefix = str(tmp_path / "out")
  shards = evaluation.Shards(num_shards=1)
  infer.infer(
    settings(layout, checkpoint, split="train"),
    output_path=prefix,
    shards=shards,
  )
  manifest, paths = teacher_shards.check_shards(prefix)
  records = list(
    tf.data.TFRecordDataset(list(paths))
    .map(teacher_shards.record_parser(manifest))
    .as_numpy_iterator()
  )
  _, outputs, texts = said(layout)
  assert [r["targets"].tolist() for r in records] == outputs
  assert [r["targets_pretokenized"].decode() for r in records] == texts
  assert [int(r["ended"]) for r in records] == [1, 1, 0]
  # Without PAD, which is 1 of the 15 tokens that share the other half.
  others = 0.5 / 15 * len(token_layouts.EXPECTED[layout][2])
  scores = [len(output) * np.log(0.5 / (1 - others)) for output in outputs]
  np.testing.assert_allclose([r["score"] for r in records], scores, rtol=1e-5)
  task = distilled.add_distilled_task("all", prefix, "letters")
  assert targets(task) == outputs
  name = data.distilled_task(prefix, "letters", name="ended", drop_cut=True)
  assert targets(seqio.get_mixture_or_task(name)) == outputs[:2]


def test_an_eos_that_only_the_checkpoint_knows_ends_outputs(
  checkpoint, tmp_path
):
  folder = tmp_path / "two"
  params = checkpoints.load_params(checkpoint)
  stated = dataclasses.asdict(toy_models.model(8).config) | {
    "special_tokens": {"eos": [1, B], "pad": 0, "start": 0},
  }
  checkpoints.save_safetensors(folder, params, stated)
  path = tmp_path / "outputs.jsonl"
  infer.infer(settings("t5", folder), output_path=str(path))
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  # The b of "ab" and "acb" is EOS here, and no text.
  np.testing.assert_allclose(
    [r["score"] for r in rows], np.log(0.5) * np.array([2, 3, 5]), rtol=1e-5
  )
  assert [r["ended"] for r in rows] == [True, True, False]
  assert [r["prediction"] for r in rows] == ["a", "ac", "aaaaa"]


def test_rows_of_a_mixture_name_their_task(checkpoint, tmp_path):
  of_one = settings("t5", checkpoint)
  token_layouts.task("more_letters", "t5", [("c", "b"), ("a", "b")])
  seqio.MixtureRegistry.add("mixed", ["letters", "more_letters"], 1.0)
  both = dataclasses.replace(of_one, mixture_or_task_name="mixed")
  path = tmp_path / "outputs.jsonl"
  infer.infer(both, output_path=str(path))
  seqio.MixtureRegistry.remove("mixed")
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert sorted((r["task"], r["inputs"], r["prediction"]) for r in rows) == [
    ("letters", "a", "ab"),
    ("letters", "b", "acb"),
    ("letters", "c", "aaaaa"),
    ("more_letters", "a", "ab"),
    ("more_letters", "c", "aaaaa"),
  ]


def test_files_and_shards_of_before_are_read_as_before(tmp_path):
  token_layouts.task("letters", "t5", [("a", "b")])
  path = tmp_path / "old.jsonl"
  path.write_text('{"inputs": "a", "prediction": "bc", "score": -1.0}\n')
  assert targets(teacher_outputs.register("old", str(path), "letters")) == [
    [B, C, 1]
  ]
  path.write_text('{"inputs": "a", "prediction": "bcb", "ended": "yes"}\n')
  with pytest.raises(ValueError, match=r"'ended' true or false, got .* line 1"):
    targets(seqio.TaskRegistry.get("old"))
  path.write_text('{"inputs": "a", "prediction": "b", "ended": false}\n')
  task = teacher_outputs.register("none", str(path), "letters", drop_cut=True)
  with pytest.raises(ValueError, match="got none of an output that ended"):
    targets(task)


def test_a_vocabulary_that_the_model_has_no_rows_for_is_refused(
  checkpoint, tmp_path
):
  token_layouts.task("letters", "t5", [("a", "b")])
  few = infer.DecodeSettings(
    model=toy_models.model(8, num_real_tokens=13),
    checkpoint_path=str(checkpoint),
    mixture_or_task_name="letters",
    task_feature_lengths=LENGTHS,
  )
  with pytest.raises(
    ValueError, match=r"at most 13 ids, .* got 14 for the inp"
  ):
    infer.infer(few, output_path=str(tmp_path / "o.jsonl"))
  with pytest.raises(ValueError, match="at most 13 ids"):
    infer.evaluate_checkpoint(few, eval_output_dir=str(tmp_path))
