"""Instructions made of TFDS examples, on data that TFDS itself wrote.

The features are those that TFDS declares for the datasets of these names; the
rows are ours. Nothing is downloaded.
"""

import re

import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from gkd_jax import data
from gkd_jax.tasks import flan

BYTES = seqio.ByteVocabulary()
# One example of each source, and fields and answer worked by hand.
EXAMPLES = {
  "anli_r1": (
    {"context": "It rained.", "hypothesis": "It was wet.", "label": 1},
    {"premise": "It rained.", "hypothesis": "It was wet."},
    "maybe",
  ),
  "snli": (
    {"premise": "A dog runs.", "hypothesis": "A cat sits.", "label": 2},
    {"premise": "A dog runs.", "hypothesis": "A cat sits."},
    "no",
  ),
  "rte": (
    {"sentence1": "All left.", "sentence2": "Ann left.", "label": 0},
    {"sentence1": "All left.", "sentence2": "Ann left."},
    "yes",
  ),
  "sst2": (
    {"sentence": "a joy", "label": 1},
    {"sentence": "a joy"},
    "positive",
  ),
  "mrpc": (
    {"sentence1": "He won.", "sentence2": "He came first.", "label": 1},
    {"sentence1": "He won.", "sentence2": "He came first."},
    "yes",
  ),
  "paws_wiki": (
    {"sentence1": "a to b", "sentence2": "b to a", "label": 0},
    {"sentence1": "a to b", "sentence2": "b to a"},
    "no",
  ),
  "boolq": (
    {"passage": "Ice floats.", "question": "does ice sink", "label": 0},
    {"passage": "Ice floats.", "question": "does ice sink"},
    "no",
  ),
  "squad": (
    {
      "context": "Oslo is in Norway.",
      "question": "Where is Oslo?",
      "answers": {"text": ["in Norway", "Norway"]},
    },
    {"context": "Oslo is in Norway.", "question": "Where is Oslo?"},
    "in Norway",
  ),
  "copa": (
    {
      "premise": "He fell.",
      "question": "cause",
      "choice1": "Ice.",
      "choice2": "Sun.",
      "label": 0,
    },
    {
      "question": "He fell. What was the cause?",
      "options": "\nOPTIONS:\n- Ice.\n- Sun.",
    },
    "Ice.",
  ),
  "piqa": (
    {"goal": "Boil water", "sol1": "use ice", "sol2": "heat it", "label": 1},
    {"question": "Boil water", "options": "\nOPTIONS:\n- use ice\n- heat it"},
    "heat it",
  ),
  "hellaswag": (
    {"context": "A man runs", "endings": ["a", "b", "c", "d"], "label": 2},
    {
      "question": "What comes next? A man runs",
      "options": "\nOPTIONS:\n- a\n- b\n- c\n- d",
    },
    "c",
  ),
  "arc_challenge": (
    {
      "question": "Which is hot?",
      "choices": {"text": ["ice", "sun", "fog"], "label": [0, 1, 2]},
      "answerKey": 1,
    },
    {
      "question": "Which is hot?",
      "options": "\nOPTIONS:\n- ice\n- sun\n- fog",
    },
    "sun",
  ),
  "xsum": (
    {"document": "Rain fell.", "summary": "Rain."},
    {"document": "Rain fell."},
    "Rain.",
  ),
  "samsum": (
    {"dialogue": "A: hi\nB: yo", "summary": "They greet."},
    {"dialogue": "A: hi\nB: yo"},
    "They greet.",
  ),
}
# Train examples of the published datasets, where FLAN2021's cap matters.
SIZES = {
  "snli": 550_152,
  "sst2": 67_349,
  "paws_wiki": 49_401,
  "squad": 87_599,
  "hellaswag": 39_905,
  "xsum": 204_045,
}


def instructed(name, *examples):
  """`inputs` and `targets` of raw examples; the first tells their types."""
  signature = {
    key: {k: tensor_spec(v) for k, v in value.items()}
    if isinstance(value, dict)
    else tensor_spec(value)
    for key, value in examples[0].items()
  }
  dataset = tf.data.Dataset.from_generator(
    lambda: iter(examples), output_signature=signature
  )
  made = flan.instruct(dataset, source=flan.SOURCES[name])
  return [
    (e["inputs"].decode(), e["targets"].decode())
    for e in made.as_numpy_iterator()
  ]


def tensor_spec(value):
  dtype = tf.convert_to_tensor(value).dtype
  return tf.TensorSpec((None,) if isinstance(value, list) else (), dtype)


def test_every_source_has_an_example_here():
  assert set(EXAMPLES) == set(flan.SOURCES)


@pytest.mark.parametrize("name", flan.SOURCES)
def test_an_instruction_of_each_source(name):
  example, fields, answer = EXAMPLES[name]
  templates = flan.SOURCES[name].templates
  assert len(set(templates)) >= 3
  filled = [t.format(**fields) for t in templates]
  # Every template shows everything that the answer depends on.
  for template in templates:
    assert set(re.findall(r"\{(\w+)\}", template)) == set(fields)
  ((inputs, targets),) = instructed(name, example)
  assert inputs in filled
  assert targets == answer
  # The same one every time.
  assert instructed(name, example) == [(inputs, targets)]


def test_examples_are_spread_over_the_templates():
  templates = flan.SOURCES["samsum"].templates
  dialogues = [f"A: {i}" for i in range(150)]
  made = instructed(
    "samsum", *({"dialogue": d, "summary": "x"} for d in dialogues)
  )
  counts = [0] * len(templates)
  for dialogue, (inputs, _) in zip(dialogues, made, strict=True):
    counts[[t.format(dialogue=dialogue) for t in templates].index(inputs)] += 1
  # 50 each; a binomial's standard deviation is 5.8.
  assert all(25 < n < 75 for n in counts), counts


def test_the_answer_follows_the_label():
  example = EXAMPLES["anli_r1"][0]
  made = instructed("anli_r1", *(example | {"label": i} for i in range(3)))
  assert [answer for _, answer in made] == ["yes", "maybe", "no"]  # e, n, c
  copa = EXAMPLES["copa"][0] | {"question": "effect", "label": 1}
  ((inputs, answer),) = instructed("copa", copa)
  assert "He fell. What came of it?" in inputs and answer == "Sun."


def test_examples_without_an_answer_are_left_out():
  snli, squad = EXAMPLES["snli"][0], EXAMPLES["squad"][0]
  made = instructed("snli", snli | {"label": 0}, snli | {"label": -1})
  assert [answer for _, answer in made] == ["yes"]
  made = instructed("squad", squad, squad | {"answers": {"text": []}})
  assert [answer for _, answer in made] == ["in Norway"]


def test_caps_of_flan2021():
  for name, source in flan.SOURCES.items():
    assert source.large == (name in SIZES)
    task = data.load_task(f"flan_{name}")
    split = task.source.tfds_dataset._split_map["train"]
    assert split == ("train[:30000]" if name in SIZES else "train")


@pytest.fixture(name="stored")
def _stored(tmp_path):
  """RTE with 5 train examples and SST-2 with 7."""
  text, label = tfds.features.Text(), tfds.features.ClassLabel(num_classes=2)
  for config, size, names in (
    ("rte", 5, ("sentence1", "sentence2")),
    ("sst2", 7, ("sentence",)),
  ):
    rows = {n: [f"{n} {i}" for i in range(size)] for n in names}
    rows["label"] = [i % 2 for i in range(size)]
    tfds.dataset_builders.store_as_tfds_dataset(
      name="glue",
      version="2.0.0",
      config=config,
      data_dir=str(tmp_path),
      features=tfds.features.FeaturesDict(
        dict.fromkeys(names, text) | {"label": label}
      ),
      split_datasets=dict.fromkeys(
        ("train", "validation"), tf.data.Dataset.from_tensor_slices(rows)
      ),
    )
  seqio.set_tfds_data_dir_override(str(tmp_path))
  yield
  seqio.set_tfds_data_dir_override(None)


def test_tasks_and_mixing_of_stored_data(stored, monkeypatch):
  for name in ("rte", "sst2"):
    seqio.TaskRegistry.remove(f"flan_test_{name}")
    flan.add_flan_task(
      f"flan_test_{name}",
      flan.SOURCES[name],
      vocabulary=BYTES,
      max_train_examples=4,
    )
  rte, sst2 = (
    seqio.TaskRegistry.get(f"flan_test_{n}") for n in ("rte", "sst2")
  )
  assert flan.mixing_rate(rte) == 5.0  # small: all of it
  assert flan.mixing_rate(sst2) == 4.0  # large: cut
  monkeypatch.setattr(flan, "MAX_RATE", 3.0)
  assert flan.mixing_rate(rte) == flan.mixing_rate(sst2) == 3.0
  found = {}
  for split in ("train", "validation"):
    dataset = rte.get_dataset(split=split, shuffle=False)
    for e in dataset.as_numpy_iterator():
      assert e["inputs"][-1] == e["targets"][-1] == 1
      inputs, targets = (
        BYTES.decode(e[k][:-1].tolist()) for k in ("inputs", "targets")
      )
      i = int(re.search(r"sentence2 (\d)", inputs)[1])
      assert f"sentence1 {i}" in inputs
      found[split, i] = targets
  assert found == {
    (s, i): ("yes", "no")[i % 2]
    for s in ("train", "validation")
    for i in range(5)
  }


def test_the_mixture_has_all_tasks():
  for suffix in ("", "_bytes"):
    mixture = data.load_task(f"flan{suffix}")
    assert {t.name for t in mixture.tasks} == {
      f"flan_{name}{suffix}" for name in flan.SOURCES
    }
    for task in mixture.tasks:
      assert mixture._task_to_rate[task.name] is flan.mixing_rate
  for feature in data.load_task("flan").output_features.values():
    assert feature.vocabulary.sentencepiece_model_file == (
      "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
    )


def test_metrics():
  tasks = {n: data.load_task(f"flan_{n}_bytes") for n in ("boolq", "samsum")}
  (exact,), (rouge,) = (t.predict_metric_fns for t in tasks.values())
  assert exact(["yes", "no"], ["yes", "yes"]) == {"exact_match": 50.0}
  assert rouge(["a cat"], ["a cat"])["rouge2"] == 100.0
