"""Batch prediction and evaluation from a checkpoint."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gkd_jax import checkpoints, data, evaluation, files, partitioning
from gkd_jax.evaluation import evaluate, measurements, teacher_data
from gkd_jax.tasks import text_metrics


def infer(
  model: Any,
  *,
  checkpoint_path: str,
  mixture_or_task_name: str,
  task_feature_lengths: Mapping[str, int],
  output_path: str,
  mixture_or_task_module: str | None = None,
  split: str = "test",
  batch_size: int = 256,
  num_examples: int | None = None,
  temperature: float = 0.0,
  use_cached_tasks: bool = False,
  seed: int = 0,
  shards: evaluation.Shards | None = None,
) -> None:
  """Decodes a split of a task and writes the outputs, unscored.

  Args:
    model: the model, or a `GKDModel`, whose student is used.
    checkpoint_path: see `checkpoints.load_params`.
    mixture_or_task_name: seqio task or mixture.
    task_feature_lengths: seqio feature to length in tokens.
    output_path: file of lines `{"inputs", "prediction", "score"}`: texts as the
      vocabulary decodes them, and the output's log-prob in nats, summed over
      its tokens. With `shards`, prefix of theirs.
    mixture_or_task_module: Python module that registers the task.
    split: name of the split.
    batch_size: rows decoded at a time.
    num_examples: at most so many of each task, None for all.
    temperature: 0 is greedy, or as the model's `decode_fn` has it.
    use_cached_tasks: read seqio's cache.
    seed: of sampling.
    shards: write TFRecord shards, resumably, in place of JSONL: data to train
      on (`teacher_data`).

  Raises:
    ValueError: a wrong setting.
  """
  if shards is not None:
    _check_prefix(output_path)
    _check_temperature(temperature)
    output_path = os.fspath(files.absolute(output_path))
    total = teacher_data.write(
      model.student,
      _load(model.student, checkpoint_path),
      data.load_task(mixture_or_task_name, mixture_or_task_module),
      task_feature_lengths,
      output_path,
      shards,
      split=split,
      batch_size=batch_size,
      num_examples=num_examples,
      temperature=temperature,
      use_cached=use_cached_tasks,
      seed=seed,
    )
    print(f"outputs for {total:,} examples are in {output_path}", flush=True)
    return
  _, results = _predict(
    model,
    checkpoint_path,
    mixture_or_task_name,
    mixture_or_task_module,
    task_feature_lengths,
    split=split,
    batch_size=batch_size,
    num_examples=num_examples,
    use_cached=use_cached_tasks,
    temperature=temperature,
    seed=seed,
  )
  rows = [
    {"inputs": text, "prediction": output, "score": score}
    for result in results.values()
    for text, output, score in zip(
      result.inputs, result.outputs, result.scores, strict=True
    )
  ]
  _write(output_path, rows)
  print(f"wrote {len(rows):,} outputs to {output_path}", flush=True)


def evaluate_checkpoint(
  model: Any,
  *,
  checkpoint_path: str,
  mixture_or_task_name: str,
  task_feature_lengths: Mapping[str, int],
  eval_output_dir: str,
  mixture_or_task_module: str | None = None,
  split: str = "validation",
  batch_size: int = 256,
  num_examples: int | None = None,
  temperature: float = 0.0,
  use_cached_tasks: bool = False,
  seed: int = 0,
  num_samples: int = 1,
  instruments: bool = False,
  teacher_checkpoint_path: str | None = None,
) -> Mapping[str, float]:
  """Decodes a split and scores it with the task's metrics.

  Writes `EVAL_OUTPUT_DIR/metrics.json` and `predictions.jsonl`: input, target
  and prediction as the metrics saw them, the prediction's log-prob, and
  `statistics`, what the example adds to each metric (`comparisons` reads them).
  With several samples the first is the prediction, `samples` holds all, and the
  statistics are their means, so that runs of other numbers can be compared. With
  `instruments` also `by_position.json`.

  Args:
    model: the model, or a `GKDModel`, whose student is used.
    checkpoint_path: see `checkpoints.load_params`.
    mixture_or_task_name: seqio task or mixture.
    task_feature_lengths: seqio feature to length in tokens.
    eval_output_dir: folder for the results.
    mixture_or_task_module: Python module that registers the task.
    split: name of the split.
    batch_size: rows decoded at a time.
    num_examples: at most so many of each task, None for all.
    temperature: 0 is greedy, or as the model's `decode_fn` has it.
    use_cached_tasks: read seqio's cache.
    seed: of sampling.
    num_samples: outputs for each input, drawn independently. The metrics are
      then those of all outputs together, and `self_bleu` says how alike the
      outputs of an input are (`text_metrics.self_bleu`).
    instruments: measure calibration, and with a `GKDModel` the distance to its
      teacher; see `measurements.measure`.
    teacher_checkpoint_path: of the instruments; see `checkpoints.load_params`.

  Returns:
    The metrics, those of seqio's `metric_fns`, and what else was asked for.
  """
  if num_samples < 1:
    raise ValueError(
      f"expected at least 1 sample, got {num_samples}; set NUM_SAMPLES"
    )
  run, results = _predict(
    model,
    checkpoint_path,
    mixture_or_task_name,
    mixture_or_task_module,
    task_feature_lengths,
    split=split,
    batch_size=batch_size,
    num_examples=num_examples,
    use_cached=use_cached_tasks,
    temperature=temperature,
    seed=seed,
  )
  samples = [results, *map(run.predict, _more_seeds(seed, num_samples))]
  scores, rows = _scores_and_rows(run.evaluator, samples)
  write = functools.partial(_write_in, eval_output_dir)
  write("predictions.jsonl", rows)
  if instruments:
    teacher_params = None
    if model.teacher is not None:
      teacher_params = measurements.load_teacher(
        model, teacher_checkpoint_path, run.mesh
      )
    measured, tables = measurements.measure(
      run.evaluator, run.mesh, model, run.params, teacher_params, seed=seed
    )
    scores |= measured
    write("by_position.json", [tables])
  write("metrics.json", [scores])
  shown = " ".join(f"{k} {v:.2f}" for k, v in scores.items())
  print(f"{len(rows):,} examples of {split}: {shown}", flush=True)
  return scores


def _predict(
  model, checkpoint_path, name, module, lengths, *, temperature, seed, **options
):
  """The evaluator of a split, and the model's outputs on it."""
  _check_temperature(temperature)
  mesh = partitioning.make_mesh()
  evaluator = evaluation.Evaluator(
    data.load_task(name, module),
    lengths,
    mesh=mesh,
    converter=model.student.FEATURE_CONVERTER_CLS,
    **options,
  )
  params = jax.device_put(
    _load(model.student, checkpoint_path), partitioning.replicated(mesh)
  )
  options = {"temperature": temperature} if temperature else None
  predict = lambda seed: evaluator.predict(
    model.student, params, seed=seed, decoder_params=options
  )
  return _Run(evaluator, params, mesh, predict), predict(seed)


def _load(model, path):
  """Parameters on the host, in the types of the network."""
  return checkpoints.load_params(
    path, setting="CHECKPOINT_PATH", like=partitioning.host_params(model)
  )


class _Run(NamedTuple):
  """What decoded a split, to go on with: `predict` takes another seed."""

  evaluator: evaluation.Evaluator
  params: Any
  mesh: Any
  predict: Callable[[int], Mapping[str, evaluate.Predictions]]


def _more_seeds(seed: int, number: int) -> list[int]:
  """Seeds of the second to the last sample, of a stream of this seed's own."""
  return [
    int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
    for i in range(1, number)
  ]


def _scores_and_rows(evaluator, samples):
  """The metrics, and `predictions.jsonl`, of one or more outputs each."""
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


def _write_in(folder: str, name: str, rows: Sequence[Mapping[str, Any]]):
  _write(os.path.join(folder, name), rows)


def _check_prefix(path):
  if path.endswith(".jsonl"):
    raise ValueError(
      f"expected a prefix of shards, got the name of a file {path!r};"
      " set OUTPUT_PATH, or use runs/infer.gin for JSONL"
    )


def _check_temperature(temperature):
  if temperature < 0:
    raise ValueError(
      f"expected a temperature of at least 0, got {temperature};"
      " set SAMPLING_TEMPERATURE"
    )


def _write(path: str, rows: Sequence[Mapping[str, Any]]):
  """One line of JSON for each row; complete or not there at all."""
  if jax.process_index():
    return
  files.write_json_lines(path, rows)
