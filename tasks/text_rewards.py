"""Rewards of decoded texts, for RL on the tasks here.

Functions `(inputs, outputs, examples) -> [B] float`, the higher the better:
`inputs` and `outputs` are decoded texts, `examples` mappings with `inputs` and
`targets`. A run names one in its gin file, as REWARD.
"""

from collections.abc import Callable, Mapping, Sequence

from gkd_jax.tasks import arithmetic, g2p, text_metrics

Examples = Sequence[Mapping[str, str]]


def chain_answer(
  inputs: Sequence[str], outputs: Sequence[str], examples: Examples
) -> list[float]:
  """1 where a chain of `arithmetic_cot` ends in the right answer, else 0.

  The answer is worked out from the expression, so no reference is needed. As
  in the task's `answer_accuracy`, it is the text after the last `#`.

  Args:
    inputs: Expressions.
    outputs: Generated chains.
    examples: Not read.

  Returns:
    One reward for each output.

  Example:
    >>> chain_answer(["1+2-4", "1+2"], ["1+2=3;3-4=-1;#-1", "#4"], [{}, {}])
    [1.0, 0.0]
  """
  del examples
  rewards = []
  for expression, output in zip(inputs, outputs, strict=True):
    _, mark, answer = output.rpartition("#")
    wanted = arithmetic.chain_of_thought(expression).rpartition("#")[2]
    rewards.append(float(bool(mark) and answer == wanted))
  return rewards


def negative_per(
  inputs: Sequence[str], outputs: Sequence[str], examples: Examples
) -> list[float]:
  """Minus the phoneme error rate of each word, as a share: 0 is the best.

  The nearest of the dictionary's pronunciations counts, as in the task's `per`,
  for unlabelled words too. An output far too long is below -1.

  Args:
    inputs: Words of the CMU dictionary.
    outputs: Generated pronunciations, phonemes separated by spaces.
    examples: Not read.

  Returns:
    One reward for each output.

  Raises:
    ValueError: If an input is not a word of the dictionary.
  """
  del examples
  known = g2p.pronunciations()
  rewards = []
  for word, output in zip(inputs, outputs, strict=True):
    if word not in known:
      raise ValueError(
        f"expected words of the CMU dictionary, got {word!r}; set"
        " TASK_FEATURE_LENGTHS long enough for the inputs, or REWARD"
      )
    rates = text_metrics.phoneme_error_rates([known[word]], [output])
    rewards.append(-rates["per"] / 100.0)
  return rewards


def of_metric(
  metric_fn: Callable[[Sequence, Sequence], Mapping[str, float]],
  name: str,
  scale: float = 0.01,
) -> Callable[[Sequence[str], Sequence[str], Examples], list[float]]:
  """The reward that is a metric of each output alone.

  Args:
    metric_fn: A metric `(targets, predictions)`, such as `text_metrics.rouge`,
      of texts as they are: the task's postprocessing is not applied.
    name: Which of its values.
    scale: Times the value; metrics here are percentages. Below 0 for an error.

  Returns:
    The reward.

  Example:
    >>> reward = of_metric(text_metrics.chain_accuracy, "valid_steps")
    >>> reward(["1+2"], ["1+2=3;3+1=5;#5"], [{"targets": "1+2=3;#3"}])
    [0.5]
  """

  def reward(inputs, outputs, examples):
    del inputs
    rewards = []
    for output, example in zip(outputs, examples, strict=True):
      values = metric_fn([example["targets"]], [output])
      if name not in values:
        raise ValueError(
          f"expected a metric of {', '.join(sorted(values))}, got {name!r};"
          " set text_rewards.of_metric.name"
        )
      rewards.append(scale * float(values[name]))
    return rewards

  return reward
