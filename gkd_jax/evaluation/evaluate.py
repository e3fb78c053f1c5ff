"""Decodes a split of a task and scores it with the task's metrics."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import seqio

from gkd_jax import data, partitioning, types
from gkd_jax.data import vocabularies
from gkd_jax.tasks import example_statistics


class Predictions(NamedTuple):
  """Examples and outputs of one task, in the order of the split.

  Attributes:
    inputs: decoded inputs.
    outputs: decoded outputs.
    scores: log-prob of each output in nats, summed over tokens.
    targets: targets for the metrics.
    predictions: postprocessed outputs, the predictions for the metrics.
    target_scores: log-prob of each target in nats, summed over tokens; empty
      unless a metric of the task needs it.
    ended: whether each output has EOS, or was cut.
  """

  inputs: list[str]
  outputs: list[str]
  scores: list[float]
  targets: list[Any]
  predictions: list[Any]
  target_scores: list[float]
  ended: Sequence[bool] = ()


class Evaluator:
  """Decodes and scores one split of a task or mixture.

  Args:
    task: from `data.load_task`.
    lengths: seqio feature to length.
    batch_size: rows decoded at a time.
    mesh: rows are sharded over its data axis.
    converter: the `FEATURE_CONVERTER_CLS` of the models to evaluate.
    special_tokens: of these models; by default those of the task's vocabulary.
    split: name of the split.
    num_examples: maximum number of examples of each task; None for all.
    use_cached: read seqio's cache.
  """

  def __init__(
    self,
    task: Any,
    lengths: Mapping[str, int],
    batch_size: int,
    mesh: Any,
    *,
    converter: Any = "EncDecFeatureConverter",
    special_tokens: types.SpecialTokens | None = None,
    split: str = "validation",
    num_examples: int | None = None,
    use_cached: bool = False,
  ):
    if special_tokens is None:
      special_tokens = data.special_tokens(task)
    self._mesh = mesh
    self._batch_size = batch_size
    self._tasks = {}
    for sub in seqio.get_subtasks(task):
      if split not in sub.splits:
        raise ValueError(
          f"expected a split of {sorted(sub.splits)} of {sub.name}, got"
          f" {split!r}; set EVAL_SPLIT"
        )
      _check_metrics(sub)
      dataset = sub.get_dataset(
        sequence_length=dict(lengths),
        split=split,
        shuffle=False,
        use_cached=use_cached,
      )
      if num_examples is not None:
        dataset = dataset.take(num_examples)
      convert = data.feature_converter(converter, False, special_tokens)
      converted = convert(dataset, dict(lengths))
      examples = list(dataset.as_numpy_iterator())
      features = list(converted.as_numpy_iterator())
      names = features[0] if features else ()
      stacked = {k: np.stack([f[k] for f in features]) for k in names}
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
    """Decodes all tasks, greedily unless `decoder_params` differ.

    Args:
      model: with T5X's protocol.
      params: its parameters, on the mesh.
      limit: number of examples of each task, from the first; None for all.
      seed: of sampling.
      decoder_params: options of the model's `decode_fn`.

    Returns:
      Task name to predictions.
    """
    options = tuple(sorted((decoder_params or {}).items()))
    decode = _compiled_predict(model, options, self._mesh)
    results = {}
    for name, (task, examples, features) in self._tasks.items():
      count = len(examples) if limit is None else min(limit, len(examples))
      examples = examples[:count]
      tokens, scores, lengths, ended = self._run(
        decode, params, features, count, seed
      )
      target_scores = []
      if task.score_metric_fns:
        (target_scores,) = self._run(
          _compiled_score(model, self._mesh), params, features, count, None
        )
      inputs, targets = (
        task.output_features[k].vocabulary for k in ("inputs", "targets")
      )
      outputs = [
        vocabularies.text(targets, row[:length], model.special_tokens)
        for row, length in zip(tokens, lengths, strict=True)
      ]
      results[name] = Predictions(
        [inputs.decode(e["inputs"].tolist()) for e in examples],
        outputs,
        [float(s) for s in scores],
        [_target(task, e) for e in examples],
        [
          _postprocess(task, text, e, False)
          for text, e in zip(outputs, examples, strict=True)
        ],
        [float(s) for s in target_scores],
        [bool(e) for e in ended],
      )
    return results

  def _run(self, compiled, params, features, count, seed):
    """Returns the results of `compiled` for the first `count` rows."""
    features = {k: v[:count] for k, v in features.items()}
    size = min(self._batch_size, count)
    parts = []
    for start, batch in batches(features, size, self._mesh):
      key = None
      if seed is not None:
        key = jax.random.fold_in(jax.random.key(seed), start)
      parts.append(jax.tree.map(np.asarray, compiled(params, batch, key)))
    return [np.concatenate(x)[:count] for x in zip(*parts, strict=True)]

  def batches(self) -> Iterator[tuple[int, Mapping[str, jax.Array]]]:
    """Yields the batches of all tasks; see `batches`."""
    first = 0
    for _, examples, features in self._tasks.values():
      if examples:
        size = min(self._batch_size, len(examples))
        for start, batch in batches(features, size, self._mesh):
          yield first + start, batch
        first += len(examples)

  def example_statistics(
    self, results: Mapping[str, Predictions]
  ) -> list[dict[str, list[float]]]:
    """Returns the terms that each example adds to the tasks' metrics.

    Args:
      results: from `predict`.

    Returns:
      For each example, in the order of `results`, metric name (as in `score`) to
      `example_statistics.of_example`.
    """
    rows = []
    for name, result in results.items():
      prefix = f"{name}/" if len(results) > 1 else ""
      functions = self._tasks[name][0].predict_metric_fns
      for pair in zip(result.targets, result.predictions, strict=True):
        parts: dict[str, list[float]] = {}
        for function in functions:
          parts |= example_statistics.of_example(function, *pair)
        rows.append({prefix + key: part for key, part in parts.items()})
    return rows

  def score(self, results: Mapping[str, Predictions]) -> dict[str, float]:
    """Computes the tasks' metrics; of several tasks, with the task as prefix."""
    metrics = {}
    for name, result in results.items():
      task = self._tasks[name][0]
      scored = [
        *(
          f(result.targets, result.predictions) for f in task.predict_metric_fns
        ),
        *(
          f(result.targets, result.target_scores) for f in task.score_metric_fns
        ),
        *(
          f(result.targets, result.predictions, {"scores": result.scores})
          for f in task.predict_with_aux_metric_fns
        ),
      ]
      prefix = f"{name}/" if len(results) > 1 else ""
      for values in scored:
        for key, value in values.items():
          metrics[prefix + key] = float(getattr(value, "value", value))
    return metrics


def pool(samples: Sequence[Predictions]) -> Predictions:
  """Concatenates several outputs of each example."""
  return Predictions(
    *(list(itertools.chain(*lists)) for lists in zip(*samples, strict=True))
  )


def batches(
  features: Mapping[str, np.ndarray], batch_size: int, mesh: Any
) -> Iterator[tuple[int, Mapping[str, jax.Array]]]:
  """Yields rows in batches of one size, the last padded with zeros.

  Args:
    features: name to rows, equally many.
    batch_size: rounded up to a multiple of the data axis.
    mesh: see `partitioning.make_mesh`.

  Yields:
    The index of the batch's first row, and the batch on its devices.
  """
  sharding = partitioning.batch_sharding(mesh)
  parts = partitioning.row_shards(mesh)
  size = -(-batch_size // parts) * parts
  count = len(next(iter(features.values()), ()))
  for start in range(0, count, size):
    batch = {}
    for k, v in features.items():
      rows = v[start : start + size]
      fill = [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
      batch[k] = jax.device_put(np.pad(rows, fill), sharding)
    yield start, batch


@functools.lru_cache(maxsize=16)
def _compiled_predict(model, options: Sequence[tuple[str, Any]], mesh):
  def predict(params, batch, key):
    tokens, aux = model.predict_batch_with_aux(
      params, batch, key, decoder_params=dict(options)
    )
    return tokens, aux["scores"], aux["lengths"], aux["ended"]

  # Replicated, so that every process can read all rows.
  return partitioning.jit(
    predict, mesh, out_shardings=partitioning.replicated(mesh)
  )


@functools.lru_cache(maxsize=4)
def _compiled_score(model, mesh):
  return partitioning.jit(
    lambda params, batch, key: (model.score_batch(params, batch),),
    mesh,
    out_shardings=partitioning.replicated(mesh),
  )


def _check_metrics(task):
  # seqio appends an object for each function to the objects that were given.
  given = len(task.metric_objs) - len(task.metric_fns)
  if given:
    raise ValueError(
      f"expected metric functions, got {given} metric objects of {task.name};"
      " set metric_fns where the task is registered"
    )


def _target(task, example):
  """Returns the target for the metrics: as in seqio, the untokenized text."""
  text = example.get("targets_pretokenized")
  if isinstance(text, bytes):
    text = text.decode()
  if text is None:
    text = task.output_features["targets"].vocabulary.decode(
      example["targets"].tolist()
    )
  return _postprocess(task, text, example, True)


def _postprocess(task, decoded, example, is_target):
  if task.postprocess_fn is None:
    return decoded
  return task.postprocess_fn(decoded, example=example, is_target=is_target)
