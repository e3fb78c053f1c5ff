"""Batch prediction and evaluation from a checkpoint."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax

from gkd_jax import checkpoints, data, evaluate, partitioning


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
  seed: int = 0,
) -> Mapping[str, float]:
  """Decodes a split, writes JSONL, and returns the task's metrics.

  Args:
    model: the model, or a `GKDModel`, whose student is used.
    checkpoint_path: see `checkpoints.load_params`.
    mixture_or_task_name: seqio task or mixture.
    task_feature_lengths: seqio feature to length in tokens.
    output_path: file of lines `{"inputs", "prediction", "score"}`; the score
      is the log-prob of the output in nats. `.metrics.json` holds the metrics.
    mixture_or_task_module: Python module that registers the task.
    split: name of the split.
    batch_size: rows decoded at a time.
    num_examples: at most so many, None for all.
    temperature: 0 is greedy, or as the model's `decode_fn` has it.
    seed: of sampling.
  """
  task = data.load_task(mixture_or_task_name, mixture_or_task_module)
  mesh = partitioning.make_mesh()
  evaluator = evaluate.Evaluator(
    task,
    task_feature_lengths,
    batch_size,
    mesh,
    split=split,
    num_examples=num_examples,
  )
  params = checkpoints.load_params(checkpoint_path, setting="CHECKPOINT_PATH")
  params = jax.device_put(params, partitioning.replicated(mesh))
  results = evaluator.predict(
    model.student,
    params,
    seed=seed,
    decoder_params={"temperature": temperature} if temperature else None,
  )
  scores = evaluator.score(results)
  os.makedirs(os.path.dirname(output_path) or ".", exist_ok=True)
  with open(output_path + ".tmp", "w", encoding="utf-8") as f:
    for result in results.values():
      for text, prediction, score in zip(
        result.inputs, result.predictions, result.scores, strict=True
      ):
        line = {"inputs": text, "prediction": prediction, "score": score}
        f.write(json.dumps(line) + "\n")
  os.replace(output_path + ".tmp", output_path)
  with open(output_path + ".metrics.json", "w", encoding="utf-8") as f:
    json.dump(scores, f)
  print(" ".join(f"{k} {v:.2f}" for k, v in scores.items()), flush=True)
  return scores
