"""Instruction tuning in the manner of FLAN2021 (Wei et al. 2021), from TFDS.

A choice of FLAN2021's 62 datasets, over its clusters: inference, sentiment,
paraphrase, reading comprehension, common sense, closed-book questions and
summarization. Each has a few instructions of our own wording, of which an example
always has the same one, by a hash of its text, so that no state is needed. As in
FLAN2021 (section 2.1 there and its appendix), at most 30,000 training examples
of a dataset are used, and datasets are mixed in proportion to their sizes, of
which at most 3,000 count.

Tasks registered here: `flan_NAME` for the names in `SOURCES` with T5's
vocabulary and `flan_NAME_bytes` with bytes; the mixtures `flan` and `flan_bytes`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import seqio
import tensorflow as tf

from gkd_jax.tasks import text_metrics, text_tasks

MAX_TRAIN_EXAMPLES = 30_000
MAX_RATE = 3_000.0
_YES_NO = "\nOPTIONS:\n- yes\n- no"


@dataclasses.dataclass(frozen=True)
class Source:
  """A dataset, and how its examples become instructions.

  Attributes:
    data: Name and version in TFDS.
    fields: From an example to the texts that templates name.
    templates: Instructions with `{field}`; all have the target `{answer}`.
    large: Whether train has more than `MAX_TRAIN_EXAMPLES`.
    keep: Whether an example is used, None for all.
    summary: Whether ROUGE is its metric, not exact match.
  """

  data: str
  fields: Callable[[Mapping], dict[str, tf.Tensor]]
  templates: Sequence[str]
  large: bool = False
  keep: Callable[[Mapping], tf.Tensor] | None = None
  summary: bool = False


def fill(template: str, fields: Mapping[str, tf.Tensor]) -> tf.Tensor:
  """A template with the fields' texts in place of `{field}`.

  >>> fill("Is {x} so?", {"x": tf.constant("it")}).numpy()
  b'Is it so?'
  """
  parts = re.split(r"\{(\w+)\}", template)
  return tf.strings.join(
    [fields[part] if i % 2 else part for i, part in enumerate(parts)]
  )


def instruct(dataset: tf.data.Dataset, *, source: Source) -> tf.data.Dataset:
  """From a source's examples to `inputs`, an instruction, and `targets`."""
  if source.keep is not None:
    dataset = dataset.filter(source.keep)

  def convert(example):
    fields = source.fields(example)
    inputs = tf.stack([fill(t, fields) for t in source.templates])
    chosen = tf.strings.to_hash_bucket_fast(inputs[0], len(source.templates))
    return {"inputs": inputs[chosen], "targets": fields["answer"]}

  return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def _texts(answer: str, *names: str) -> Callable:
  """Fields as they are; `answer` is one of them."""
  return lambda e: {"answer": e[answer], **{n: e[n] for n in names}}


def _labelled(labels: Sequence[str], *names: str) -> Callable:
  """Fields as they are; the answer is the label's text."""
  return lambda e: {
    "answer": tf.gather(tf.constant(labels), e["label"]),
    **{n: e[n] for n in names},
  }


def _options(texts: tf.Tensor) -> tf.Tensor:
  lines = tf.strings.join(["\n- ", texts])
  return tf.strings.join(["\nOPTIONS:", tf.strings.reduce_join(lines)])


def _chosen(question: Callable, choices: Callable, index: Callable) -> Callable:
  """A question and its options; the answer is the text of one of them."""

  def fields(example):
    texts = choices(example)
    return {
      "question": question(example),
      "options": _options(texts),
      "answer": texts[index(example)],
    }

  return fields


def _copa_question(example):
  asked = tf.where(
    example["question"] == "cause", "What was the cause?", "What came of it?"
  )
  return tf.strings.join([example["premise"], " ", asked])


def _arc_index(example):
  # Choices are lettered in order, but not all questions have four.
  same = example["choices"]["label"] == example["answerKey"]
  return tf.argmax(tf.cast(same, tf.int32))


def _columns(*names: str) -> Callable:
  return lambda e: tf.stack([e[n] for n in names])


_label = lambda e: e["label"]
_NLI = (
  "{premise}\n\nMay one conclude that {hypothesis}\nOPTIONS:\n- yes\n- maybe\n- no",
  "Premise: {premise}\nHypothesis: {hypothesis}\nIs the hypothesis true, given the"
  " premise?\nOPTIONS:\n- yes\n- maybe\n- no",
  "Read this and say whether the sentence after it follows.\n{premise}\nSentence:"
  " {hypothesis}\nOPTIONS:\n- yes\n- maybe\n- no",
)
_CHOICE = (
  "{question}{options}",
  "Choose the best answer.\n\n{question}{options}\nAnswer:",
  "Here is a question: {question}\nWhich of these fits best?{options}",
)
_SAME = (
  "{sentence1}\n{sentence2}\nDo these sentences mean the same?" + _YES_NO,
  'Is "{sentence1}" a paraphrase of "{sentence2}"?' + _YES_NO,
  "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nCan either stand for the"
  " other?" + _YES_NO,
)

SOURCES = {
  "anli_r1": Source(
    "anli/r1:0.1.0",
    lambda e: (
      _labelled(("yes", "maybe", "no"), "hypothesis")(e)
      | {"premise": e["context"]}
    ),
    _NLI,
  ),
  "snli": Source(
    "snli:1.1.0",
    _labelled(("yes", "maybe", "no"), "premise", "hypothesis"),
    _NLI,
    large=True,
    keep=lambda e: e["label"] >= 0,  # -1: the annotators did not agree
  ),
  "rte": Source(
    "glue/rte:2.0.0",
    _labelled(("yes", "no"), "sentence1", "sentence2"),
    (
      "{sentence1}\n\nDoes this imply that {sentence2}" + _YES_NO,
      "Text: {sentence1}\nClaim: {sentence2}\nIs the claim supported by the"
      " text?" + _YES_NO,
      'Given that "{sentence1}", is it true that "{sentence2}"?' + _YES_NO,
    ),
  ),
  "sst2": Source(
    "glue/sst2:2.0.0",
    _labelled(("negative", "positive"), "sentence"),
    (
      "Review: {sentence}\nIs it positive or negative?",
      "What does the writer of this sentence feel about the film?\n{sentence}"
      "\nOPTIONS:\n- negative\n- positive",
      "{sentence}\n\nName the sentiment of the sentence above: negative or"
      " positive.",
    ),
    large=True,
  ),
  "mrpc": Source(
    "glue/mrpc:2.0.0",
    _labelled(("no", "yes"), "sentence1", "sentence2"),
    _SAME,
  ),
  "paws_wiki": Source(
    "paws_wiki/labeled_final_raw:1.1.0",
    _labelled(("no", "yes"), "sentence1", "sentence2"),
    _SAME,
    large=True,
  ),
  "boolq": Source(
    "super_glue/boolq:1.0.2",
    _labelled(("no", "yes"), "passage", "question"),
    (
      "{passage}\n\nQuestion: {question}?" + _YES_NO,
      "Answer by the text alone: {question}?\n\nText: {passage}" + _YES_NO,
      "{question}? Read the passage and say yes or no.\n{passage}",
    ),
  ),
  "squad": Source(
    "squad/v1.1:3.0.0",
    lambda e: (
      _texts("question", "context", "question")(e)
      | {"answer": e["answers"]["text"][0]}
    ),
    (
      "{context}\n\nAnswer from the text above: {question}",
      "Question: {question}\nThe answer is a part of this text: {context}",
      "Read the article and answer.\n\n{context}\n\nQ: {question}\nA:",
    ),
    large=True,
    keep=lambda e: tf.size(e["answers"]["text"]) > 0,
  ),
  "copa": Source(
    "super_glue/copa:1.0.2",
    _chosen(_copa_question, _columns("choice1", "choice2"), _label),
    _CHOICE,
  ),
  "piqa": Source(
    "piqa:1.0.0",
    _chosen(lambda e: e["goal"], _columns("sol1", "sol2"), _label),
    _CHOICE,
  ),
  "hellaswag": Source(
    "hellaswag:1.1.0",
    _chosen(
      lambda e: tf.strings.join(["What comes next? ", e["context"]]),
      lambda e: e["endings"],
      _label,
    ),
    _CHOICE,
    large=True,
  ),
  "arc_challenge": Source(
    "ai2_arc/ARC-Challenge:1.0.0",
    _chosen(
      lambda e: e["question"], lambda e: e["choices"]["text"], _arc_index
    ),
    _CHOICE,
  ),
  "xsum": Source(
    "xsum:1.1.0",
    _texts("summary", "document"),
    (
      "Summarize: {document}",
      "{document}\n\nIn one sentence, what is this article about?",
      "Write one sentence that sums up the following article.\n\n{document}",
    ),
    large=True,
    summary=True,
  ),
  "samsum": Source(
    "samsum:1.0.0",
    _texts("summary", "dialogue"),
    (
      "{dialogue}\n\nSummarize the conversation.",
      "What did these people talk about?\n\n{dialogue}",
      "Here is a chat:\n{dialogue}\nIn short:",
    ),
    summary=True,
  ),
}


def exact_match(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Predictions that are the target's text, in percent.

  >>> exact_match(["yes", "no"], ["yes ", "maybe"])
  {'exact_match': 50.0}
  """
  same = [
    t.strip() == p.strip() for t, p in zip(targets, predictions, strict=True)
  ]
  return {"exact_match": 100.0 * sum(same) / len(same)}


def add_flan_task(
  name: str,
  source: Source,
  *,
  vocabulary: seqio.Vocabulary | None = None,
  max_train_examples: int = MAX_TRAIN_EXAMPLES,
) -> seqio.Task:
  """Registers the task of a source.

  Args:
    name: The name of the task.
    source: Its data and templates.
    vocabulary: Of inputs and targets; None for T5's SentencePiece.
    max_train_examples: So many of a large source's train examples are used.

  Returns:
    The task, with splits train and validation.

  Raises:
    ValueError: If the name is taken.
  """
  train = f"train[:{max_train_examples}]" if source.large else "train"
  return text_tasks.add(
    name,
    seqio.TfdsDataSource(
      source.data, splits={"train": train, "validation": "validation"}
    ),
    [functools.partial(instruct, source=source)],
    [text_metrics.rouge if source.summary else exact_match],
    vocabulary=vocabulary,
  )


def mixing_rate(task: seqio.Task) -> float:
  """The weight of a task: its number of train examples, at most 3,000."""
  return min(float(task.num_input_examples("train")), MAX_RATE)


def _register(suffix: str, vocabulary: seqio.Vocabulary | None) -> None:
  names = []
  for name, source in SOURCES.items():
    names.append(f"flan_{name}{suffix}")
    add_flan_task(names[-1], source, vocabulary=vocabulary)
  seqio.MixtureRegistry.add(f"flan{suffix}", names, default_rate=mixing_rate)


_register("", None)
_register("_bytes", seqio.ByteVocabulary())
