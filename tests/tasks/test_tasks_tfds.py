"""The paper's tasks, unmodified, on data that TFDS itself wrote.

Two-sentence stand-ins for XSum and WMT14 under their real names, and real lines
of GSM8K (MIT; see golden/gsm8k.LICENSE). Nothing is downloaded.
"""

import json
import pathlib
import re

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from gkd_jax.tasks import gsm8k, wmt, xsum

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ARTICLES = {
  "train": [("Rain fell all day in Leeds.\nRoads closed.", "Rain shut roads.")],
  "validation": [
    ("The cup final ends in a draw after extra time.", "The final is a draw."),
    ("Ein Café öffnet.", "A café opens — at last."),
  ],
  "test": [("A train is late.", "Train late.")],
}
SENTENCES = {
  "train": [("A house.", "Ein Haus.")],
  "validation": [
    ("The river is wide and deep.", "Der Fluss ist breit und tief."),
    ("He says “yes” to me.", "Er sagt „ja“ zu mir."),
  ],
  "test": [("Good morning.", "Guten Morgen.")],
}


def problems(split):
  lines = (GOLDEN / f"gsm8k_{split}.jsonl").read_text().splitlines()
  for line in lines:
    row = json.loads(line)
    annotation, _, short_answer = row["answer"].partition("#### ")
    yield {**row, "annotation": annotation, "short_answer": short_answer}


def store(folder, name, version, features, rows, **kwargs):
  tfds.dataset_builders.store_as_tfds_dataset(
    name=name,
    version=version,
    data_dir=str(folder),
    features=features,
    split_datasets={
      split: tf.data.Dataset.from_tensor_slices(
        {key: [row[key] for row in members] for key in members[0]}
      )
      for split, members in rows.items()
    },
    **kwargs,
  )


@pytest.fixture(name="data", scope="module", autouse=True)
def _data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  text = tfds.features.Text()
  store(
    folder,
    "xsum",
    "1.1.0",
    tfds.features.FeaturesDict({"document": text, "summary": text}),
    {
      split: [{"document": d, "summary": s} for d, s in rows]
      for split, rows in ARTICLES.items()
    },
  )
  store(
    folder,
    "wmt_t2t_translate",
    "1.0.0",
    tfds.features.Translation(languages=("de", "en")),
    {
      split: [{"en": en, "de": de} for en, de in rows]
      for split, rows in SENTENCES.items()
    },
    config="de-en",
  )
  names = ("question", "answer", "annotation", "short_answer")
  store(
    folder,
    "gsm8k",
    "1.0.0",
    tfds.features.FeaturesDict(dict.fromkeys(names, text)),
    {split: list(problems(split)) for split in ("train", "test")},
  )
  seqio.set_tfds_data_dir_override(str(folder))
  yield folder
  seqio.set_tfds_data_dir_override(None)


def texts(task, split):
  """Decoded inputs and targets, by input."""
  features = seqio.TaskRegistry.get(task).output_features
  dataset = seqio.TaskRegistry.get(task).get_dataset(split=split, shuffle=False)
  found = {}
  for example in dataset.as_numpy_iterator():
    assert example["inputs"][-1] == example["targets"][-1] == 1
    inputs, targets = (
      features[key].vocabulary.decode(example[key][:-1].tolist())
      for key in ("inputs", "targets")
    )
    found[inputs] = targets
  return found


def evaluate(task, split, output_of, lengths):
  """The task's metrics by seqio; `output_of` maps an input to an output."""
  evaluator = seqio.Evaluator(
    task,
    feature_converter=seqio.EncDecFeatureConverter(pack=False),
    eval_split=split,
    sequence_length=lengths,
  )
  vocabulary = seqio.TaskRegistry.get(task).output_features["inputs"].vocabulary

  def predict(dataset):
    outputs = []
    for index, batch in dataset.as_numpy_iterator():
      inputs = vocabulary.decode(batch["encoder_input_tokens"].tolist())
      tokens = vocabulary.encode(output_of(inputs.rstrip("\x00")))
      outputs.append((index, np.pad(tokens, (0, 1024 - len(tokens)))))
    return outputs

  metrics, _ = evaluator.evaluate(
    compute_metrics=True, predict_fn=predict, step=0
  )
  evaluator.close()
  return metrics.result()[task]


def test_xsum_texts():
  for split, rows in ARTICLES.items():
    assert texts("xsum_bytes", split) == {
      f"summarize: {document}": summary for document, summary in rows
    }


def test_xsum_metrics_see_the_whole_reference():
  summaries = {f"summarize: {d}": s for d, s in ARTICLES["validation"]}
  # Targets are cut to 8 bytes for the model, but not for the metric.
  lengths = {"inputs": 256, "targets": 8}
  perfect = evaluate("xsum_bytes", "validation", summaries.get, lengths)
  names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
  assert perfect == dict.fromkeys(names, 100.0)
  half = evaluate(
    "xsum_bytes",
    "validation",
    # "final draw" against "the final is a draw": unigrams 2 of 2 and of 5,
    # no bigram, subsequence 2. The other example is missed.
    lambda text: "final draw" if "final" in text else "",
    lengths,
  )
  assert half["rouge1"] == pytest.approx(100 * (4 / 7) / 2)
  assert half["rouge2"] == 0.0
  assert half["rougeL"] == pytest.approx(100 * (4 / 7) / 2)


@pytest.mark.parametrize("task", ["xsum", "wmt14_en_de", "gsm8k_cot"])
def test_targets_are_scored_as_they_were_before_tokenization(task):
  # Also under an evaluator that, unlike seqio's, decodes the cut tokens.
  postprocess = seqio.TaskRegistry.get(task).postprocess_fn
  example = {"targets_pretokenized": "ganz und gär".encode()}
  assert postprocess("ga", example=example, is_target=True) == "ganz und gär"
  assert postprocess("ga", example=example, is_target=False) == "ga"
  assert postprocess("ga", example={}, is_target=True) == "ga"


def test_wmt_texts():
  for split, rows in SENTENCES.items():
    assert texts("wmt14_en_de_bytes", split) == {
      f"translate English to German: {en}": de for en, de in rows
    }


def test_wmt_metric():
  prefix = "translate English to German: "
  german = {prefix + en: de for en, de in SENTENCES["validation"]}
  lengths = {"inputs": 80, "targets": 8}
  name = "wmt14_en_de_bytes"
  assert evaluate(name, "validation", german.get, lengths) == {
    "bleu": pytest.approx(100.0),
    "chrf": pytest.approx(100.0),
  }
  one_wrong = {k: v.replace("tief", "lang") for k, v in german.items()}
  # 7 tokens and 8 tokens („ and “ are tokens): matches 14/15, 11/13, 9/11,
  # 7/9 of the n-grams.
  expected = 100 * (14 / 15 * 11 / 13 * 9 / 11 * 7 / 9) ** 0.25
  result = evaluate(name, "validation", one_wrong.get, lengths)
  assert result["bleu"] == pytest.approx(expected)


def test_gsm8k_splits_of_the_real_lines():
  found = {s: texts("gsm8k_cot_bytes", s) for s in ("train", "validation")}
  # 94% of 40 lines.
  assert {split: len(rows) for split, rows in found.items()} == {
    "train": 38,
    "validation": 2,
  }
  assert not set(found["train"]) & set(found["validation"])
  everything = {**found["train"], **found["validation"]}
  assert set(everything) == {
    f"{gsm8k.PROMPT}Q: {p['question'].strip()}\nA:" for p in problems("train")
  }


def test_gsm8k_prompt_is_four_worked_examples():
  assert gsm8k.PROMPT.count("Q: ") == gsm8k.PROMPT.count("\nA: ") == 4
  answers = re.findall(r"The answer is (\d+)\.\n\n", gsm8k.PROMPT)
  assert answers == ["6", "5", "39", "8"]
  for word in ("trees", "cars", "chocolates", "lollipops"):
    assert word in gsm8k.PROMPT


def test_gsm8k_targets_of_the_real_lines():
  found = texts("gsm8k_cot_bytes", "test")
  assert len(found) == 20
  for problem in problems("test"):
    target = found[f"{gsm8k.PROMPT}Q: {problem['question'].strip()}\nA:"]
    number = problem["short_answer"].replace(",", "")
    assert target.endswith(f". The answer is {number}.")
    assert not re.search(r"<<|>>|####|\n|  ", target)
    # Nothing but annotations, line breaks and full stops differs.
    words = re.sub(r"<<.*?>>", "", problem["annotation"]).split()
    assert [w.rstrip(".") for w in target.split()[:-4]] == [
      w.rstrip(".") for w in words
    ]


@pytest.mark.parametrize(
  ("answer", "target"),
  [
    (
      "He sold 48/2 = <<48/2=24>>24 clips.\nThat is 48+24 = <<48+24=72>>72 "
      "clips\n#### 72",
      "He sold 48/2 = 24 clips. That is 48+24 = 72 clips. The answer is 72.",
    ),
    ("So:\n2*600=$<<2*600=1200>>1,200 \r\n#### 1,200", None),
    ("2+3=<<2+3=5>>5\n\n#### -5", "2+3=5. The answer is -5."),
  ],
)
def test_gsm8k_chain_of_thought(answer, target):
  target = target or "So: 2*600=$1,200. The answer is 1200."
  dataset = tf.data.Dataset.from_tensors(
    {"question": " How many? ", "answer": answer}
  )
  (example,) = gsm8k.chain_of_thought(dataset, prompt="P ").as_numpy_iterator()
  assert example["inputs"] == b"P Q: How many?\nA:"
  assert example["targets"].decode() == target


def test_gsm8k_metric():
  solutions = texts("gsm8k_cot_bytes", "test")
  lengths = {"inputs": 2048, "targets": 16}
  everything_right = evaluate("gsm8k_cot_bytes", "test", solutions.get, lengths)
  assert everything_right == {
    "accuracy": 100.0,
    "accuracy_with_calculator": 100.0,
  }
  # Only the calculator can help these: the last equation has no right result.
  result = evaluate(
    "gsm8k_cot_bytes",
    "test",
    lambda text: (
      "2 * "
      + solutions[text].rpartition(" is ")[2][:-1]
      + " / 2 = 1. The answer is 1."
    ),
    lengths,
  )
  ones = sum(t.endswith(" is 1.") for t in solutions.values())
  assert result == {
    "accuracy": 100.0 * ones / 20,
    "accuracy_with_calculator": 100.0,
  }


@pytest.mark.parametrize(
  ("task", "add", "data"),
  [
    ("xsum", xsum.add_xsum_task, "xsum:1.1.0"),
    ("wmt14_en_de", wmt.add_wmt_task, "wmt_t2t_translate/de-en:1.0.0"),
    ("gsm8k_cot", gsm8k.add_gsm8k_task, "gsm8k:1.0.0"),
  ],
)
def test_the_default_vocabulary_is_t5s_and_only_it_differs(task, add, data):
  default, of_bytes = (
    seqio.TaskRegistry.get(name) for name in (task, f"{task}_bytes")
  )
  assert default.source.tfds_dataset.name == data
  for one, other in zip(
    default.preprocessors, of_bytes.preprocessors, strict=True
  ):
    assert getattr(one, "keywords", one) == getattr(other, "keywords", other)
  assert default.metric_fns == of_bytes.metric_fns
  assert default.postprocessor is of_bytes.postprocessor
  for feature in default.output_features.values():
    assert feature.add_eos
    assert feature.vocabulary.sentencepiece_model_file == (
      "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
    )
  with pytest.raises(ValueError, match="duplicate"):
    add(task)
