"""Decodes and evaluates from a checkpoint: `gkd infer` and `gkd eval`."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gkd_jax import (
  checkpoints,
  checks,
  data,
  evaluation,
  files,
  partitioning,
)
from gkd_jax.evaluation import evaluate, measurements, teacher_data
from gkd_jax.tasks import text_metrics


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
    output_path: file of JSON lines `{"inputs", "prediction", "score", "ended"}`:
      texts decoded by the vocabulary, the log-prob of the output in nats, summed
      over its tokens, and whether it has EOS or was cut. With `shards`, the prefix of their paths.
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
  results = _Decoder(settings).predict(settings.seed)
  rows = [
    {"inputs": text, "prediction": output, "score": score, "ended": ended}
    for result in results.values()
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
    metrics.json: the returned metrics.
    predictions.jsonl: for each example input, target and prediction as the
      metrics receive them, the log-prob of the prediction in nats, and
      `statistics`, the terms that the example adds to each metric (read by
      `compare`). With several samples the first one is the prediction,
      `samples` has all, and the statistics are their means, so that runs with
      different numbers of samples can be compared.
    by_position.json: with `instruments`, see `measurements.measure`.

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
    ValueError: if a setting is wrong.
  """
  checks.path(eval_output_dir, "EVAL_OUTPUT_DIR")
  files.check_folder(eval_output_dir, "EVAL_OUTPUT_DIR")
  checks.whole(num_samples, "NUM_SAMPLES")
  checks.boolean(instruments, "infer.evaluate_checkpoint.instruments")
  checks.path(teacher_checkpoint_path, "TEACHER_CHECKPOINT_PATH", none=True)
  settings = settings.fitted(teacher_checkpoint_path if instruments else None)
  model, seed = settings.model, settings.seed
  decoder = _Decoder(settings)
  samples = [
    decoder.predict(x) for x in (seed, *_more_seeds(seed, num_samples))
  ]
  scores, rows = _scores_and_rows(decoder.evaluator, samples)
  tables = None
  if instruments:
    teacher_params = None
    if model.teacher is not None:
      teacher_params = measurements.load_teacher(
        model, teacher_checkpoint_path, decoder.mesh
      )
    measured, tables = measurements.measure(
      decoder.evaluator,
      decoder.mesh,
      model,
      decoder.params,
      teacher_params,
      seed=seed,
    )
    scores |= measured
  if jax.process_index() == 0:
    folder = files.absolute(eval_output_dir)
    files.write_json_lines(folder / "predictions.jsonl", rows)
    if tables is not None:
      files.write_json(folder / "by_position.json", tables, indent=None)
    files.write_json(folder / "metrics.json", scores, indent=None)
  shown = " ".join(f"{k} {v:.2f}" for k, v in scores.items())
  print(f"{len(rows):,} examples of {settings.split}: {shown}", flush=True)
  return scores


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

  def predict(self, seed: int) -> Mapping[str, evaluate.Predictions]:
    temperature = self._settings.temperature
    return self.evaluator.predict(
      self._settings.model.student,
      self.params,
      seed=seed,
      decoder_params={"temperature": temperature} if temperature else None,
    )


def _more_seeds(seed: int, number: int) -> list[int]:
  """Returns the seeds of the second to the last sample."""
  return [
    int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
    for i in range(1, number)
  ]


def _scores_and_rows(evaluator, samples):
  """Returns the metrics, and the rows of `predictions.jsonl`."""
  pooled = {
    name: evaluate.pool([sample[name] for sample in samples])
    for name in samples[0]
  }
  scores = evaluator.score(pooled)
  statistics = [evaluator.example_statistics(sample) for sample in samples]
  rows = []
  for name, first in samples[0].items():
    of_task = [sample[name] for sample in samples]
    if len(samples) > 1:
      outputs = list(zip(*(s.outputs for s in of_task), strict=True))
      prefix = f"{name}/" if len(pooled) > 1 else ""
      for key, value in text_metrics.self_bleu(outputs).items():
        scores[prefix + key] = value
    for i, text in enumerate(first.inputs):
      row = {
        "inputs": text,
        "target": first.targets[i],
        "prediction": first.predictions[i],
        "score": first.scores[i],
      }
      if len(samples) > 1:
        row["samples"] = [s.predictions[i] for s in of_task]
      parts = [of_sample[len(rows)] for of_sample in statistics]
      row["statistics"] = {
        key: np.mean([part[key] for part in parts], axis=0).tolist()
        for key in parts[0]
      }
      rows.append(row)
  return scores, rows
