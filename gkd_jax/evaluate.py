"""Decoding a split of a task and scoring it with the task's metrics."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import seqio

from gkd_jax import data, partitioning


class Predictions(NamedTuple):
  """One task's examples and outputs, in the order of the split.

  Attributes:
    inputs: decoded inputs.
    targets: what the metrics take as targets.
    predictions: decoded, postprocessed outputs.
    scores: log-prob of each output, nats summed over tokens.
  """

  inputs: list[str]
  targets: list[Any]
  predictions: list[Any]
  scores: list[float]


class Evaluator:
  """Decodes and scores one split of a task or mixture.

  Args:
    task: from `data.load_task`.
    lengths: seqio feature to length.
    batch_size: rows decoded at a time.
    mesh: rows are split over its data axis.
    split: name of the split.
    num_examples: at most so many of each task; None for all.
    use_cached: read seqio's cache.
  """

  def __init__(
    self,
    task: Any,
    lengths: Mapping[str, int],
    batch_size: int,
    mesh: Any,
    *,
    split: str = "validation",
    num_examples: int | None = None,
    use_cached: bool = False,
  ):
    self._mesh = mesh
    self._batch_size = batch_size
    self._tasks = {}
    for sub in seqio.get_subtasks(task):
      if split not in sub.splits:
        raise ValueError(
          f"expected a split of {sorted(sub.splits)} of {sub.name}, got"
          f" {split!r}; set EVAL_SPLIT"
        )
      dataset = sub.get_dataset(
        sequence_length=dict(lengths),
        split=split,
        shuffle=False,
        use_cached=use_cached,
      )
      if num_examples is not None:
        dataset = dataset.take(num_examples)
      converted = data.FEATURE_CONVERTER(pack=False)(dataset, dict(lengths))
      examples = list(dataset.as_numpy_iterator())
      features = list(converted.as_numpy_iterator())
      stacked = {
        k: np.stack([f[k] for f in features])
        for k in ("encoder_input_tokens", "decoder_input_tokens")
      }
      self._tasks[sub.name] = sub, examples, stacked

  def predict(
    self,
    model: Any,
    params: Any,
    *,
    limit: int | None = None,
    seed: int = 0,
    decoder_params: Mapping[str, Any] | None = None,
  ) -> dict[str, Predictions]:
    """Task name to its predictions; greedy unless `decoder_params` differ."""
    options = tuple(sorted((decoder_params or {}).items()))
    decode = _compiled(model, options)
    results = {}
    for name, (task, examples, features) in self._tasks.items():
      count = len(examples) if limit is None else min(limit, len(examples))
      tokens, scores = self._decode(decode, params, features, count, seed)
      vocabularies = task.output_features
      post = functools.partial(_postprocess, task)
      results[name] = Predictions(
        [
          vocabularies["inputs"].vocabulary.decode(e["inputs"].tolist())
          for e in examples[:count]
        ],
        [
          post(
            vocabularies["targets"].vocabulary.decode(e["targets"].tolist()),
            e,
            True,
          )
          for e in examples[:count]
        ],
        [
          post(vocabularies["targets"].vocabulary.decode(t.tolist()), e, False)
          for t, e in zip(tokens, examples, strict=False)
        ],
        [float(s) for s in scores],
      )
    return results

  def _decode(self, decode, params, features, count, seed):
    """Tokens `[count, T]` and scores `[count]`, batch by batch."""
    sharding = partitioning.batch_sharding(self._mesh)
    data_axis = self._mesh.shape[partitioning.DATA_AXIS]
    size = -(-min(self._batch_size, count) // data_axis) * data_axis
    tokens, scores = [], []
    for start in range(0, count, size):
      batch = {}
      for k, v in features.items():
        rows = v[start : start + size]
        padded = np.pad(rows, ((0, size - len(rows)), (0, 0)))
        batch[k] = jax.device_put(padded, sharding)
      key = jax.random.fold_in(jax.random.key(seed), start)
      out, aux = decode(params, batch, key)
      tokens.append(np.asarray(out))
      scores.append(np.asarray(aux["scores"]))
    return np.concatenate(tokens)[:count], np.concatenate(scores)[:count]

  def score(self, results: Mapping[str, Predictions]) -> dict[str, float]:
    """The tasks' metrics; with several tasks, names start with the task's."""
    metrics = {}
    for name, result in results.items():
      task = self._tasks[name][0]
      for metric_fn in task.metric_fns:
        for key, value in metric_fn(result.targets, result.predictions).items():
          prefix = f"{name}/" if len(results) > 1 else ""
          metrics[prefix + key] = float(getattr(value, "value", value))
    return metrics


@functools.lru_cache(maxsize=16)
def _compiled(model, options: Sequence[tuple[str, Any]]):
  return jax.jit(
    functools.partial(
      model.predict_batch_with_aux, decoder_params=dict(options)
    )
  )


def _postprocess(task, decoded, example, is_target):
  if task.postprocess_fn is None:
    return decoded
  return task.postprocess_fn(decoded, example=example, is_target=is_target)
