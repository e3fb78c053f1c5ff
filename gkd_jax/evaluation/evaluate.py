"""Decodes a split of a task and scores it with the task's metrics."""

import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import seqio

from gkd_jax import data, partitioning, types
from gkd_jax.data import errors, vocabularies
from gkd_jax.evaluation import metric_values
from gkd_jax.tasks import example_statistics

Predictions = metric_values.Predictions


class Evaluator:
  """Decodes and scores one split of a task or mixture.

  Tasks of a mixture that lack the split, and tasks without an example in it, are
  left out with a line each.

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
    self._mesh = mesh
    self._batch_size = batch_size
    self._tasks = {}
    errors.check_source(
      task, split, use_cached=use_cached, setting="EVAL_SPLIT"
    )
    if special_tokens is None:
      special_tokens = data.special_tokens(task)
    subtasks = data.tasks_with_split(task, split)
    self._is_mixture = len(seqio.get_subtasks(task)) > 1
    for sub in seqio.get_subtasks(task):
      if sub not in subtasks:
        _say(f"left out: {sub.name} has no split {split!r}")
        continue
      _check_metrics(sub)
      dataset = errors.read_split(sub, split, lengths, use_cached=use_cached)
      with errors.explained(sub.name, split):
        if num_examples is not None:
          dataset = dataset.take(num_examples)
        convert = data.feature_converter(converter, False, special_tokens)
        converted = convert(dataset, dict(lengths))
        examples = list(dataset.as_numpy_iterator())
      if not examples:
        _say(f"left out: {sub.name} has no example in {split!r}")
        continue
      where = f"{split!r} of {sub.name}"
      examples = [_in_utf8(e, i, where) for i, e in enumerate(examples)]
      with errors.explained(sub.name, split):
        features = list(converted.as_numpy_iterator())
      stacked = {k: np.stack([f[k] for f in features]) for k in features[0]}
      self._tasks[sub.name] = sub, examples, stacked

  def prefix(self, name: str) -> str:
    """Returns what stands before the names of a task's metrics."""
    return f"{name}/" if self._is_mixture else ""

  @property
  def num_examples(self) -> int:
    """The number of examples of all tasks."""
    return sum(len(examples) for _, examples, _ in self._tasks.values())

  def predict(
    self, model: Any, params: Any, **options: Any
  ) -> dict[str, Predictions]:
    """Decodes all tasks, greedily unless `decoder_params` differ.

    Args:
      model: see `decode`.
      params: see `decode`.
      **options: of `decode`.

    Returns:
      Task name to predictions.
    """
    return self.predictions(model, self.decode(model, params, **options))

  def decode(
    self,
    model: Any,
    params: Any,
    *,
    limit: int | None = None,
    seed: int = 0,
    sample_number: int = 0,
    decoder_params: Mapping[str, Any] | None = None,
  ) -> dict[str, list[np.ndarray]]:
    """Runs the programs of `predict`, in all processes together.

    Runs no code of a task, so that it fails in none of the processes or in all.

    The random numbers of an output depend only on seed, sample number and place
    of the example in its task's split, as those of `teacher_records`.

    Args:
      model: with T5X's protocol.
      params: its parameters, on the mesh.
      limit: number of examples of each task, from the first; None for all.
      seed: of sampling.
      sample_number: of several samples of each input.
      decoder_params: options of the model's `decode_fn`.

    Returns:
      Task name to tokens `[n, T]`, scores, lengths and whether they ended `[n]`,
      and, for metrics that need them, scores of the targets `[n]`.
    """
    options = tuple(sorted((decoder_params or {}).items()))
    decode = _compiled_predict(model, options, self._mesh)
    key = jax.random.fold_in(jax.random.key(seed), sample_number)
    results = {}
    for name, (task, examples, features) in self._tasks.items():
      count = len(examples) if limit is None else min(limit, len(examples))
      results[name] = self._run(decode, params, features, count, key)
      if task.score_metric_fns:
        score = _compiled_score(model, self._mesh)
        results[name] += self._run(score, params, features, count, None)
    return results

  def predictions(
    self, model: Any, decoded: Mapping[str, Sequence[np.ndarray]]
  ) -> dict[str, Predictions]:
    """Returns what a task's code makes of outputs, in this process alone.

    Args:
      model: that decoded them.
      decoded: from `decode`.

    Returns:
      Task name to predictions.
    """
    results = {}
    for name, (tokens, scores, lengths, ended, *more) in decoded.items():
      task, examples, _ = self._tasks[name]
      examples = examples[: len(tokens)]
      target_scores = more[0] if more else []
      inputs = task.output_features["inputs"].vocabulary
      targets = data.target_vocabulary(task)
      outputs = [
        vocabularies.text(targets, row[:length], model.special_tokens)
        for row, length in zip(tokens, lengths, strict=True)
      ]
      results[name] = Predictions(
        [vocabularies.prompt_text(inputs, e["inputs"]) for e in examples],
        outputs,
        [float(s) for s in scores],
        [_target(task, e) for e in examples],
        _predictions(task, outputs, examples),
        [float(s) for s in target_scores],
        [bool(e) for e in ended],
      )
    return results

  def _run(self, compiled, params, features, count, key):
    """Returns the results of `compiled` for the first `count` rows."""
    features = {k: v[:count] for k, v in features.items()}
    size = min(self._batch_size, count)
    parts = []
    for start, batch in batches(features, size, self._mesh):
      outputs = compiled(params, batch, key, start)
      parts.append(jax.tree.map(np.asarray, outputs))
    return [np.concatenate(x)[:count] for x in zip(*parts, strict=True)]

  def batches(self) -> Iterator[tuple[int, Mapping[str, jax.Array]]]:
    """Yields the batches of all tasks; see `batches`."""
    first = 0
    for _, examples, features in self._tasks.values():
      size = min(self._batch_size, len(examples))
      for start, batch in batches(features, size, self._mesh):
        yield first + start, batch
      first += len(examples)

  def values(
    self, results: Mapping[str, Predictions]
  ) -> metric_values.MetricValues:
    """Computes the metrics of all tasks; of a mixture, with the task as prefix.

    Args:
      results: from `predict`.

    Raises:
      ValueError: if two metric functions of a task return the same name.
    """
    values = metric_values.MetricValues({}, {}, {}, {})
    for name, result in results.items():
      of_task = metric_values.of_task(self._tasks[name][0], result)
      values = values.joined(of_task, self.prefix(name))
    return values

  def try_metrics(self, num_rows: int = 2) -> metric_values.MetricValues:
    """Computes the metrics of a few references as if they had been decoded.

    Decodes nothing, so that what is wrong with a metric is found in no time.

    Args:
      num_rows: of each task, from the first.

    Raises:
      ValueError: as `values`.
    """
    results = {}
    for name, (task, examples, _) in self._tasks.items():
      rows = examples[:num_rows]
      vocabulary = data.target_vocabulary(task)
      texts = [
        vocabulary.decode(e["targets"].tolist()) if "targets" in e else ""
        for e in rows
      ]
      results[name] = Predictions(
        texts,
        texts,
        [0.0] * len(rows),
        [_target(task, e) for e in rows],
        _predictions(task, texts, rows),
        [0.0] * len(rows),
      )
    return self.values(results)

  def score(self, results: Mapping[str, Predictions]) -> dict[str, float]:
    """Returns the metrics that are numbers; prints a line for each other one.

    Args:
      results: from `predict`.
    """
    values = self.values(results)
    for line in values.problems():
      _say(line)
    return values.numbers

  def example_statistics(
    self, results: Mapping[str, Predictions]
  ) -> list[dict[str, example_statistics.Statistics]]:
    """Returns the terms that each example adds to the tasks' metrics.

    Args:
      results: from `predict`.

    Returns:
      For each example, in the order of `results`, metric name (as in `score`) to
      `example_statistics.of_examples`, as far as the functions have these.
    """
    rows = []
    for name, result in results.items():
      prefix = self.prefix(name)
      parts: list[dict[str, Any]] = [{} for _ in result.inputs]
      for call in metric_values.calls(self._tasks[name][0], result):
        try:
          found = example_statistics.of_examples(*call)
        except Exception:
          continue  # it is undefined on one example
        for part, new in zip(parts, found, strict=True):
          part |= {prefix + key: value for key, value in new.items()}
      rows += parts
    return rows


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


def random_streams(
  model: Any,
  row_ids: jax.Array,
  key: jax.Array,
  options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], jax.Array]:
  """Names the random streams of rows by their places in the split.

  An output then depends neither on the batch size nor on devices or processes.
  A `decode_fn` that does not take `row_ids` gets a key for each batch.

  Args:
    model: with T5X's protocol.
    row_ids: `[B]`, the rows' places in the split.
    key: of all rows.
    options: of `decode_fn`, over the model's own.

  Returns:
    Further options of `decode_fn`, and its key.
  """
  if "row_ids" not in inspect.signature(model.decode_fn).parameters:
    return {}, jax.random.fold_in(key, row_ids[0])
  # Each of several decodes, of which the best is kept, has its own stream.
  merged = {**model.default_decoder_params, **(options or {})}
  decodes = int(merged.get("num_decodes", 1))
  rows = row_ids[:, None] * decodes + jnp.arange(decodes)[None]
  return {"row_ids": rows.reshape(-1)}, key


@functools.lru_cache(maxsize=16)
def _compiled_predict(model, options: Sequence[tuple[str, Any]], mesh):
  def predict(params, batch, key, start):
    rows = start + jnp.arange(len(next(iter(batch.values()))))
    streams, key = random_streams(model, rows, key, dict(options))
    tokens, aux = model.predict_batch_with_aux(
      params, batch, key, decoder_params=dict(options) | streams
    )
    return tokens, aux["scores"], aux["lengths"], aux["ended"]

  # Replicated, so that every process can read all rows.
  return partitioning.jit(
    predict, mesh, out_shardings=partitioning.replicated(mesh)
  )


@functools.lru_cache(maxsize=4)
def _compiled_score(model, mesh):
  return partitioning.jit(
    lambda params, batch, key, start: (model.score_batch(params, batch),),
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


def _in_utf8(example, number, where):
  """Returns an example with U+FFFD in place of bytes that are not UTF-8."""
  fixed = {}
  for name, value in example.items():
    if isinstance(value, bytes):
      text = value.decode(errors="replace").encode()
      if text != value:
        fixed[name] = text
  if fixed:
    names = ", ".join(sorted(fixed))
    _say(f"not UTF-8, read with U+FFFD: {names} of row {number} in {where}")
  return example | fixed


def _say(line):
  if jax.process_index() == 0:
    print(line, flush=True)


def _predictions(task, outputs, examples):
  return [
    _postprocess(task, text, e, False)
    for text, e in zip(outputs, examples, strict=True)
  ]


def _target(task, example):
  """Returns the target for the metrics: as in seqio, the untokenized text.

  None if the example has none.
  """
  text = example.get("targets_pretokenized")
  if isinstance(text, bytes):
    text = text.decode()
  if text is None and "targets" not in example:
    return None
  if text is None:
    text = task.output_features["targets"].vocabulary.decode(
      example["targets"].tolist()
    )
  return _postprocess(task, text, example, True)


def _postprocess(task, decoded, example, is_target):
  if task.postprocess_fn is None:
    return decoded
  return task.postprocess_fn(decoded, example=example, is_target=is_target)
