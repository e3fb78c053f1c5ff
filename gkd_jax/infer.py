"""Batch prediction and evaluation from a checkpoint."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gkd_jax import (
  checkpoints,
  data,
  evaluate,
  partitioning,
  teacher_data,
  teacher_records,
)


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
  shards: teacher_records.Shards | None = None,
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
    if output_path.endswith(".jsonl"):
      raise ValueError(
        f"expected a prefix of shards, got the name of a file {output_path!r};"
        " set OUTPUT_PATH, or use runs/infer.gin for JSONL"
      )
    _check_temperature(temperature)
    total = teacher_data.write(
      model.student,
      checkpoints.load_params(checkpoint_path, setting="CHECKPOINT_PATH"),
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
) -> Mapping[str, float]:
  """Decodes a split and scores it with the task's metrics.

  Writes `EVAL_OUTPUT_DIR/metrics.json` and `predictions.jsonl`: input, target
  and prediction as the metrics saw them, and the prediction's log-prob.

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

  Returns:
    The metrics, those of seqio's `metric_fns`.
  """
  evaluator, results = _predict(
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
  scores = evaluator.score(results)
  rows = [
    {"inputs": i, "target": t, "prediction": p, "score": s}
    for result in results.values()
    for i, t, p, s in zip(
      result.inputs,
      result.targets,
      result.predictions,
      result.scores,
      strict=True,
    )
  ]
  _write(os.path.join(eval_output_dir, "predictions.jsonl"), rows)
  _write(os.path.join(eval_output_dir, "metrics.json"), [scores])
  shown = " ".join(f"{k} {v:.2f}" for k, v in scores.items())
  print(f"{len(rows):,} examples of {split}: {shown}", flush=True)
  return scores


def _predict(
  model, checkpoint_path, name, module, lengths, *, temperature, seed, **options
):
  """The evaluator of a split, and the model's outputs on it."""
  _check_temperature(temperature)
  mesh = partitioning.make_mesh()
  evaluator = evaluate.Evaluator(
    data.load_task(name, module),
    lengths,
    mesh=mesh,
    converter=model.student.FEATURE_CONVERTER_CLS,
    **options,
  )
  params = checkpoints.load_params(checkpoint_path, setting="CHECKPOINT_PATH")
  params = jax.device_put(params, partitioning.replicated(mesh))
  results = evaluator.predict(
    model.student,
    params,
    seed=seed,
    decoder_params={"temperature": temperature} if temperature else None,
  )
  return evaluator, results


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
  os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
  with open(path + ".tmp", "w", encoding="utf-8") as f:
    f.writelines(json.dumps(row, default=str) + "\n" for row in rows)
  os.replace(path + ".tmp", path)
