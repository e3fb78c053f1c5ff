"""Decodes and evaluates from a checkpoint: `gkd infer` and `gkd eval`."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax

from gkd_jax import (
  architectures,
  checkpoints,
  checks,
  data,
  evaluation,
  files,
  partitioning,
)
from gkd_jax.evaluation import (
  evaluate,
  measurements,
  teacher_data,
  teacher_records,
)
from gkd_jax.tasks import example_statistics, text_metrics


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
  """What to decode: a split of a task, with the model of a checkpoint.

  Attributes:
    model: the model, or a `GKDModel`, whose student decodes.
    checkpoint_path: see `checkpoints.load_params`.
    mixture_or_task_name: seqio task or mixture.
    task_feature_lengths: seqio feature to length in tokens.
    mixture_or_task_module: Python module that registers the task.
    split: name of the split.
    batch_size: rows decoded at a time.
    num_examples: maximum number of examples of each task, None for all.
    temperature: 0 decodes greedily, or with the model's `decode_fn`.
    use_cached_tasks: read seqio's cache.
    seed: of sampling.
  """

  model: Any
  checkpoint_path: str
  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  mixture_or_task_module: str | None = None
  split: str = "test"
  batch_size: int = 256
  num_examples: int | None = None
  temperature: float = 0.0
  use_cached_tasks: bool = False
  seed: int = 0

  def __post_init__(self):
    checks.path(self.checkpoint_path, "CHECKPOINT_PATH")
    checks.text(self.mixture_or_task_name, "MIXTURE_OR_TASK_NAME")
    checks.text(
      self.mixture_or_task_module, "MIXTURE_OR_TASK_MODULE", none=True
    )
    checks.lengths(self.task_feature_lengths, "TASK_FEATURE_LENGTHS")
    checks.text(self.split, "EVAL_SPLIT")
    checks.whole(self.batch_size, "BATCH_SIZE")
    checks.whole(self.num_examples, "EVAL_NUM_EXAMPLES", none=True)
    checks.number(
      self.temperature, "SAMPLING_TEMPERATURE", least=0, what="a temperature"
    )
    checks.boolean(self.use_cached_tasks, "USE_CACHED_TASKS")
    checks.whole(self.seed, "SEED", least=0)

  def load_task(self) -> Any:
    """Returns the seqio task or mixture."""
    return data.load_task(
      self.mixture_or_task_name, self.mixture_or_task_module
    )

  def fitted(self, teacher_path: str | None = None) -> "DecodeSettings":
    """Returns these settings with a model that has the task's special tokens.

    Args:
      teacher_path: the teacher's checkpoint, if there is one.

    Raises:
      ValueError: see `data.fitted`.
    """
    paths = {
      "CHECKPOINT_PATH": self.checkpoint_path,
      "TEACHER_CHECKPOINT_PATH": teacher_path,
    }
    stated = {
      name: checkpoints.load_special_tokens(path, setting=name)
      for name, path in paths.items()
      if path
    }
    for path_setting, path in paths.items():
      of_teacher = path_setting.startswith("TEACHER")
      part = self.model.teacher if of_teacher else self.model.student
      if path:
        architectures.check_equal(
          part.config,
          path,
          setting="TEACHER" if of_teacher else "STUDENT",
          path_setting=path_setting,
        )
    model = data.fitted(self.model, self.load_task(), stated)
    return dataclasses.replace(self, model=model)

  def load_params(self) -> Any:
    """Reads the parameters into host memory, in the network's dtypes."""
    return checkpoints.load_params(
      self.checkpoint_path,
      setting="CHECKPOINT_PATH",
      like=partitioning.host_params(self.model.student),
    )


def infer(
  settings: DecodeSettings,
  *,
  output_path: str,
  shards: evaluation.Shards | None = None,
) -> None:
  """Decodes a split of a task and writes the outputs, without scoring them.

  Args:
    settings: what to decode.
    output_path: file of JSON lines
      `{"task", "inputs", "prediction", "score", "ended"}`: the task's name, texts
      decoded by the vocabulary, the log-prob of the output in nats, summed over
      its tokens, and whether it has EOS or was cut. With `shards`, the prefix of
      their paths.
    shards: write TFRecord shards to train on instead (see `teacher_data`); an
      interrupted call is continued by the next.

  Raises:
    ValueError: if a setting is wrong.
  """
  checks.path(output_path, "OUTPUT_PATH")
  output_path = os.fspath(files.absolute(output_path))
  files.check_folder(os.path.dirname(output_path), "OUTPUT_PATH")
  if shards is not None and output_path.endswith(".jsonl"):
    raise ValueError(
      f"expected a prefix of shards, got the name of a file {output_path!r};"
      " set OUTPUT_PATH, or use runs/infer.gin for JSONL"
    )
  settings = settings.fitted()
  if shards is not None:
    total = teacher_data.write(
      settings.model.student,
      settings.load_params(),
      settings.load_task(),
      settings.task_feature_lengths,
      output_path,
      shards,
      split=settings.split,
      batch_size=settings.batch_size,
      num_examples=settings.num_examples,
      temperature=settings.temperature,
      use_cached=settings.use_cached_tasks,
      seed=settings.seed,
    )
    print(f"outputs for {total:,} examples are in {output_path}", flush=True)
    return
  rows = [
    {
      "task": name,
      "inputs": text,
      "prediction": output,
      "score": score,
      "ended": ended,
    }
    for name, result in _Decoder(settings).predict().items()
    for text, output, score, ended in zip(
      result.inputs, result.outputs, result.scores, result.ended, strict=True
    )
  ]
  if jax.process_index() == 0:
    files.write_json_lines(output_path, rows)
  print(f"wrote {len(rows):,} outputs to {output_path}", flush=True)


def evaluate_checkpoint(
  settings: DecodeSettings,
  *,
  eval_output_dir: str,
  num_samples: int = 1,
  instruments: bool = False,
  teacher_checkpoint_path: str | None = None,
) -> Mapping[str, float]:
  """Decodes a split and scores it with the task's metrics.

  Writes into `eval_output_dir`:
    predictions.jsonl: for each example its task, input, target and prediction as
      the metrics receive them, the log-prob of the prediction in nats, and
      `statistics`, the terms that the example adds to each metric (read by
      `compare`). With several samples the first one is the prediction,
      `samples` has all, and the statistics are their means, so that runs with
      different numbers of samples can be compared.
    evaluation.json: what was evaluated.
    metrics.json: the returned metrics; null for what is not finite.
    by_position.json: with `instruments`, see `measurements.measure`.

  The predictions are written before anything is computed from them. A metric
  that raises costs its own value.

  Args:
    settings: what to decode.
    eval_output_dir: folder for the results.
    num_samples: independent samples for each input. The metrics are computed
      over all samples, and `self_bleu` measures how similar the samples of an
      input are (`text_metrics.self_bleu`).
    instruments: measure calibration, and with a `GKDModel` the divergence from
      its teacher; see `measurements.measure`.
    teacher_checkpoint_path: the teacher's parameters for these; see
      `checkpoints.load_params`.

  Returns:
    Name to value: the task's metrics, and the other measurements asked for.

  Raises:
    ValueError: if a setting is wrong, or, when all else is written, if a metric
      function raised.
  """
  checks.path(eval_output_dir, "EVAL_OUTPUT_DIR")
  files.check_folder(eval_output_dir, "EVAL_OUTPUT_DIR")
  checks.whole(num_samples, "NUM_SAMPLES")
  checks.boolean(instruments, "infer.evaluate_checkpoint.instruments")
  checks.path(teacher_checkpoint_path, "TEACHER_CHECKPOINT_PATH", none=True)
  settings = settings.fitted(teacher_checkpoint_path if instruments else None)
  teacher_records.check_num_samples(
    settings.model.student, num_samples, settings.temperature
  )
  folder = files.absolute(eval_output_dir)
  decoder = _Decoder(settings)
  samples = [decoder.predict(number) for number in range(num_samples)]
  rows = _rows(samples)
  _write(folder / "predictions.jsonl", rows)
  values, scores = _scores(decoder.evaluator, samples)
  about = {
    "mixture_or_task_name": settings.mixture_or_task_name,
    "mixture_or_task_module": settings.mixture_or_task_module,
    "split": settings.split,
    "metrics": list(values.numbers),
  }
  _write(folder / "evaluation.json", about)
  _write(folder / "metrics.json", scores)
  _add_statistics(rows, decoder.evaluator, samples)
  _write(folder / "predictions.jsonl", rows)
  if instruments:
    measured, tables = _measure(decoder, settings, teacher_checkpoint_path)
    scores |= measured
    examples = tables.pop("examples", {})
    for number, statistics in examples.items():
      rows[number]["statistics"] |= statistics
    if examples:
      about["metrics"] += [*next(iter(examples.values()))]
      _write(folder / "evaluation.json", about)
      _write(folder / "predictions.jsonl", rows)
    _write(folder / "by_position.json", tables)
    _write(folder / "metrics.json", scores)
  for line in values.problems():
    print(line, flush=True)
  shown = " ".join(f"{k} {v:.2f}" for k, v in scores.items()) or "no scores"
  shown += f"; outputs and scores are in {eval_output_dir}"
  print(f"{len(rows):,} examples of {settings.split}: {shown}", flush=True)
  if values.failed:
    raise ValueError(
      f"expected values of all metrics, got none of {', '.join(values.failed)};"
      f" set metric_fns of {settings.mixture_or_task_name} (outputs and other"
      f" metrics are in {folder})"
    )
  return scores


def _write(path, value):
  """Writes JSON, or a line for each of several values, from one process."""
  if jax.process_index():
    return
  if path.suffix == ".jsonl":
    files.write_json_lines(path, map(_finite, value))
  else:
    files.write_json(path, _finite(value), indent=None)


def _finite(values):
  """Returns a dictionary with None for numbers that JSON does not know."""
  is_bad = lambda x: isinstance(x, float) and not math.isfinite(x)
  return {k: None if is_bad(v) else v for k, v in values.items()}


def _measure(decoder, settings, teacher_checkpoint_path):
  model, teacher_params = settings.model, None
  if model.teacher is not None:
    teacher_params = measurements.load_teacher(
      model, teacher_checkpoint_path, decoder.mesh
    )
  return measurements.measure(
    decoder.evaluator,
    decoder.mesh,
    model,
    decoder.params,
    teacher_params,
    seed=settings.seed,
  )


class _Decoder:
  """The evaluator of a split, and the parameters on its mesh."""

  def __init__(self, settings: DecodeSettings):
    self._settings = settings
    self.mesh = partitioning.make_mesh()
    self.evaluator = evaluation.Evaluator(
      settings.load_task(),
      settings.task_feature_lengths,
      settings.batch_size,
      self.mesh,
      converter=settings.model.student.FEATURE_CONVERTER_CLS,
      special_tokens=settings.model.student.special_tokens,
      split=settings.split,
      num_examples=settings.num_examples,
      use_cached=settings.use_cached_tasks,
    )
    self.params = jax.device_put(
      settings.load_params(), partitioning.replicated(self.mesh)
    )

    if not self.evaluator.num_examples:
      raise ValueError(
        f"expected examples in the split {settings.split!r} of"
        f" {settings.mixture_or_task_name}, got none; set EVAL_SPLIT"
      )

  def predict(
    self, sample_number: int = 0
  ) -> Mapping[str, evaluate.Predictions]:
    temperature = self._settings.temperature
    return self.evaluator.predict(
      self._settings.model.student,
      self.params,
      seed=self._settings.seed,
      sample_number=sample_number,
      decoder_params={"temperature": temperature} if temperature else None,
    )


def _rows(samples):
  """Returns the rows of `predictions.jsonl`, without statistics."""
  rows = []
  for name, first in samples[0].items():
    of_task = [sample[name] for sample in samples]
    for i, text in enumerate(first.inputs):
      row = {
        "task": name,
        "inputs": text,
        "target": first.targets[i],
        "prediction": first.predictions[i],
        "score": first.scores[i],
      }
      if first.target_scores:
        row["target_score"] = first.target_scores[i]
      if len(samples) > 1:
        row["samples"] = [s.predictions[i] for s in of_task]
      rows.append(row)
  return rows


def _scores(evaluator, samples):
  """Returns `MetricValues` over all samples, and their numbers with Self-BLEU."""
  pooled = {
    name: evaluate.pool([sample[name] for sample in samples])
    for name in samples[0]
  }
  values = evaluator.values(pooled)
  scores = dict(values.numbers)
  if len(samples) > 1:
    for name in pooled:
      outputs = zip(*(sample[name].outputs for sample in samples), strict=True)
      diversity = text_metrics.self_bleu(list(outputs))
      scores |= {evaluator.prefix(name) + k: v for k, v in diversity.items()}
  return values, scores


def _add_statistics(rows, evaluator, samples):
  """Adds to each row the mean statistics of its samples."""
  statistics = [evaluator.example_statistics(sample) for sample in samples]
  for row, parts in zip(rows, zip(*statistics, strict=True), strict=True):
    row["statistics"] = {
      key: example_statistics.mean_of([part[key] for part in parts])
      for key in parts[0]
      if all(key in part for part in parts)
    }
