"""Training on a teacher's outputs: from JSONL to a seqio task."""

import json

import pytest
import seqio

from gkd_jax.tasks import arithmetic, g2p, teacher_outputs


@pytest.fixture(name="registry")
def _registry():
  before = set(seqio.TaskRegistry.names())
  yield seqio.TaskRegistry
  for name in set(seqio.TaskRegistry.names()) - before:
    seqio.TaskRegistry.remove(name)


def write(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


ROWS = (
  {"inputs": "1+2", "prediction": "1+2=4;#4", "score": -0.5},
  {"inputs": "7-8", "prediction": "", "score": -9.0},
)


def decoded(dataset, vocabulary=arithmetic.VOCABULARY):
  return [
    (vocabulary.decode(e["inputs"]), vocabulary.decode(e["targets"]))
    for e in dataset.as_numpy_iterator()
  ]


def test_train_is_the_file_and_the_rest_is_the_base_task(tmp_path, registry):
  path = write(tmp_path / "outputs.jsonl", *ROWS)
  task = teacher_outputs.register("taught", path, "arithmetic_cot")
  base = registry.get("arithmetic_cot")
  assert set(task.splits) == {"train", "validation", "test"}
  assert decoded(task.get_dataset(split="train", shuffle=False)) == [
    ("1+2", "1+2=4;#4"),
    ("7-8", ""),
  ]
  # EOS stands behind every output, the empty one too.
  targets = [
    e["targets"].tolist() for e in task.get_dataset().as_numpy_iterator()
  ]
  assert sorted(targets)[0] == [1] and all(t[-1] == 1 for t in targets)
  for split in ("validation", "test"):
    of_both = [
      decoded(t.get_dataset(split=split, shuffle=False).take(50))
      for t in (task, base)
    ]
    assert of_both[0] == of_both[1] and len(of_both[0]) == 50
  assert task.metric_fns == base.metric_fns
  assert task.num_input_examples("train") == 2
  assert task.num_input_examples("test") == 1000


def test_a_file_written_anew_is_read_anew(tmp_path, registry):
  path = tmp_path / "outputs.jsonl"
  write(path, *ROWS)
  task = teacher_outputs.register("taught", str(path), "arithmetic_cot")
  assert task.num_input_examples("train") == 2
  write(path, ROWS[0])
  assert task.num_input_examples("train") == 1


def test_the_metrics_of_the_base_task(tmp_path, registry):
  path = write(tmp_path / "o.jsonl", {"inputs": "ab", "prediction": "AE B"})
  task = teacher_outputs.register("taught", path, "g2p_cmudict_3k")
  example = next(
    task.get_dataset(split="test", shuffle=False).as_numpy_iterator()
  )
  word = g2p.INPUTS.decode(example["inputs"])
  target = task.postprocess_fn("", example=example, is_target=True)
  assert target == list(g2p.pronunciations()[word])
  assert task.metric_fns[0]([target], [target[-1]]) == {"per": 0.0, "wer": 0.0}


def test_variables_in_the_path(tmp_path, registry, monkeypatch):
  task = registry.get("g2p_cmudict_3k_teacher")
  monkeypatch.delenv("G2P_TEACHER_OUTPUTS", raising=False)
  with pytest.raises(ValueError, match=r"'\$G2P_TEACHER_OUTPUTS'.*is no file"):
    task.get_dataset(split="train")
  path = write(tmp_path / "o.jsonl", {"inputs": "ab", "prediction": "AE B"})
  monkeypatch.setenv("G2P_TEACHER_OUTPUTS", path)
  (example,) = task.get_dataset(split="train").as_numpy_iterator()
  assert g2p.TARGETS.decode(example["targets"]) == "AE B"


def test_registering_twice(tmp_path, registry):
  one, two = str(tmp_path / "one"), str(tmp_path / "two")
  task = teacher_outputs.register("taught", one, "arithmetic_cot")
  again = teacher_outputs.register("taught", one, "arithmetic_cot")
  assert again is task
  with pytest.raises(ValueError, match="expected a new name, got 'taught'"):
    teacher_outputs.register("taught", two, "arithmetic_cot")
  with pytest.raises(ValueError, match="set name"):
    teacher_outputs.register("arithmetic_cot", one, "g2p_cmudict")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("", "expected at least one line"),
    ("{}\n", "got '{}' in line 1"),
    ('{"inputs": "1+2", "prediction": "#3"}\nnot json\n', "line 2"),
    ('{"inputs": "1+2", "prediction": ["#3"]}\n', "line 1"),
    ("[]\n", "line 1"),
  ],
)
def test_files_that_are_something_else(tmp_path, registry, content, message):
  path = tmp_path / "outputs.jsonl"
  path.write_text(content)
  task = teacher_outputs.register("taught", str(path), "arithmetic_cot")
  with pytest.raises(ValueError, match=message):
    task.get_dataset(split="train")


def _swap(dataset):
  return dataset.map(lambda e: {"inputs": e["targets"], "targets": e["inputs"]})


def test_the_base_task_prepares_its_texts(tmp_path, registry):
  base = registry.get("arithmetic_cot")
  registry.add(
    "swapped",
    source=base.source,
    preprocessors=[
      _swap,
      seqio.CacheDatasetPlaceholder(),
      *base.preprocessors,
    ],
    output_features=base.output_features,
  )
  path = write(tmp_path / "outputs.jsonl", *ROWS)
  task = teacher_outputs.register("taught", path, "swapped")
  # The outputs are ready texts; the base task's steps are for its own rows.
  (first, _) = decoded(task.get_dataset(split="train", shuffle=False))
  assert first == ("1+2", "1+2=4;#4")
  inputs, targets = decoded(task.get_dataset(split="test", shuffle=False))[0]
  assert inputs == arithmetic.chain_of_thought(targets)


def test_the_base_task_must_tokenize(tmp_path, registry):
  base = registry.get("arithmetic_cot")
  registry.add(
    "untokenized",
    source=base.source,
    preprocessors=[_swap],
    output_features=base.output_features,
  )
  with pytest.raises(ValueError, match="got untokenized; set base_task"):
    teacher_outputs.register("taught", str(tmp_path), "untokenized")
