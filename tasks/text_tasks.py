"""Tasks whose inputs and targets are texts of one vocabulary."""

from collections.abc import Callable, Sequence
from typing import Any

import seqio

from gkd_jax.tasks import preprocessors, vocabularies


def add(
  name: str,
  source: seqio.DataSource,
  steps: Sequence[Callable],
  metric_fns: Sequence[Callable],
  *,
  vocabulary: seqio.Vocabulary | None = None,
  postprocess_fn: Callable[..., Any] = preprocessors.whole_target,
) -> seqio.Task:
  """Registers a task under a name; nothing is read yet.

  Args:
    name: The name of the task.
    source: Of its examples.
    steps: From these to texts of `inputs` and `targets`.
    metric_fns: Of the task.
    vocabulary: Of inputs and targets; None for T5's SentencePiece.
    postprocess_fn: What the metrics receive; see `seqio.Task`.

  Returns:
    The task.

  Raises:
    ValueError: If the name is taken.
  """
  feature = seqio.Feature(vocabulary or vocabularies.t5_vocabulary())
  return seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=[
      *steps,
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={"inputs": feature, "targets": feature},
    postprocess_fn=postprocess_fn,
    metric_fns=metric_fns,
  )
