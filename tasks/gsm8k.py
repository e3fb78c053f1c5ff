"""Grade-school word problems with a chain of thought.

Data: TFDS `gsm8k` (Cobbe et al. 2021). Every problem stands after the first
four worked examples of Wei et al. (2022), as in the paper (appendix A.5); the
target is the dataset's solution without its calculator annotations, ending in
`The answer is N.` The paper trains with at most 512 input and 320 output tokens
and scores exact match with an external calculator on the test split (appendix
table A.3). The dataset has no validation split: the last 6% of train serve.

Tasks registered here: `gsm8k_cot` with T5's vocabulary, `gsm8k_cot_bytes` with
bytes, which needs no vocabulary file.
"""

import seqio
import tensorflow as tf

from gkd_jax.tasks import calculator, text_tasks

# Question and worked answer of Wei et al. (2022), appendix G, the first four.
EXEMPLARS = (
  (
    "There are 15 trees in the grove. Grove workers will plant trees in the"
    " grove today. After they are done, there will be 21 trees. How many trees"
    " did the grove workers plant today?",
    "There are 15 trees originally. Then there were 21 trees after some more"
    " were planted. So there must have been 21 - 15 = 6. The answer is 6.",
  ),
  (
    "If there are 3 cars in the parking lot and 2 more cars arrive, how many"
    " cars are in the parking lot?",
    "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is"
    " 5.",
  ),
  (
    "Leah had 32 chocolates and her sister had 42. If they ate 35, how many"
    " pieces do they have left in total?",
    "Originally, Leah had 32 chocolates. Her sister had 42. So in total they"
    " had 32 + 42 = 74. After eating 35, they had 74 - 35 = 39. The answer is"
    " 39.",
  ),
  (
    "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12"
    " lollipops. How many lollipops did Jason give to Denny?",
    "Jason started with 20 lollipops. Then he had 12 after giving some to"
    " Denny. So he gave Denny 20 - 12 = 8. The answer is 8.",
  ),
)
PROMPT = "".join(f"Q: {q}\nA: {a}\n\n" for q, a in EXEMPLARS)


def chain_of_thought(
  dataset: tf.data.Dataset, *, prompt: str = PROMPT
) -> tf.data.Dataset:
  """From questions and annotated answers to prompted inputs and targets.

  A solution's lines are joined by spaces, because T5's vocabulary has no line
  break; a line without a final mark gets a full stop.

  Args:
    dataset: Examples with `question` and `answer`; an answer holds `<<...>>`
      annotations and ends in `#### N`.
    prompt: What stands before every question.

  Returns:
    A dataset of `inputs` and `targets`.
  """

  def convert(example):
    answer = tf.strings.regex_replace(example["answer"], r"<<[^>]*>>", "")
    thought = tf.strings.regex_replace(answer, r"\s*####(?s:.*)$", "\n")
    thought = tf.strings.regex_replace(thought, r"[ \t]*[\r\n]+\s*", "\n")
    thought = tf.strings.regex_replace(thought, r"([^.!?:;,\n])\n", "\\1.\n")
    thought = tf.strings.regex_replace(thought, r"\n", " ")
    number = tf.strings.regex_replace(answer, r"^(?s:.*)####\s*", "")
    number = tf.strings.regex_replace(tf.strings.strip(number), ",", "")
    question = tf.strings.strip(example["question"])
    return {
      "inputs": tf.strings.join([prompt, "Q: ", question, "\nA:"]),
      "targets": tf.strings.join([thought, "The answer is ", number, "."]),
    }

  return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def add_gsm8k_task(
  name: str, *, vocabulary: seqio.Vocabulary | None = None
) -> seqio.Task:
  """Registers the task under a name.

  Args:
    name: The name of the task.
    vocabulary: Of inputs and targets; None for T5's SentencePiece.

  Returns:
    The task. Its metrics are `accuracy` and `accuracy_with_calculator`, in
    percent.

  Raises:
    ValueError: If the name is taken.
  """
  source = seqio.TfdsDataSource(
    "gsm8k:1.0.0",
    splits={
      "train": "train[:94%]",
      "validation": "train[94%:]",
      "test": "test",
    },
  )
  return text_tasks.add(
    name,
    source,
    [chain_of_thought],
    [calculator.final_number_accuracy],
    vocabulary=vocabulary,
  )


add_gsm8k_task("gsm8k_cot")
add_gsm8k_task("gsm8k_cot_bytes", vocabulary=seqio.ByteVocabulary())
