"""Training batches with student samples scored by a reward.

Before a step of RL + GKD (`models.RLGKDModel`) the batch's prompts go to the
devices, N outputs for each come back, the host decodes and scores them, and the
outputs with their advantages become the step's batch. Batches of other models are
the data's.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gkd_jax import files, losses, partitioning, types
from gkd_jax.data import vocabularies

_FILE = "running_mean.json"


class RolloutBatches:
  """Iterator over training batches; its state can be saved.

  The running mean of a running-mean baseline is part of the state, so that a
  resumed run continues as if it had not stopped.

  Args:
    iterator: batches of the data, a `checkpoints.SavableIterator`.
    model: see `train.train`.
    task: its vocabularies decode inputs and outputs.
    seed: of the run.
    mesh: see `partitioning.make_mesh`.
  """

  def __init__(
    self, iterator: Any, model: Any, task: Any, *, seed: int, mesh: Any
  ):
    self._iterator, self._model, self._seed = iterator, model, seed
    self._mesh = mesh
    self._vocabularies = {
      name: task.output_features[name].vocabulary
      for name in ("inputs", "targets")
      if name in task.output_features
    }
    self.judged = model.needs_rewards
    if self.judged:
      self._roll_out = partitioning.jit(
        model.roll_out,
        mesh,
        out_shardings=partitioning.batch_sharding(mesh),
      )
      self._advantages = jax.jit(
        functools.partial(
          losses.advantages,
          baseline=model.baseline,
          credit=model.credit,
          discount=model.discount,
        )
      )
    self._mean = losses.RunningMean()

  def next(self, step: int, params: Any) -> dict[str, np.ndarray]:
    """Returns this process's rows for a step.

    Args:
      step: updates made so far.
      params: the student's, which samples the outputs.

    Raises:
      ValueError: the reward did not return one number per output.
    """
    batch = next(self._iterator)
    if not self.judged:
      return batch
    key = jax.random.fold_in(jax.random.key(self._seed), step)
    placed = partitioning.put_batch(batch, self._mesh)
    outputs = jax.tree.map(
      partitioning.local_rows, self._roll_out(params, placed, key)
    )
    return outputs | self._judge(batch, outputs)

  def _judge(self, batch, outputs):
    """Returns rewards `[B N]` and advantages `[B N, T]` of this process's outputs."""
    n = self._model.samples_per_prompt
    judged = self._model.reward(*self._texts(batch, outputs))
    judged = np.asarray(judged, np.float32)
    weights = outputs["decoder_loss_weights"]
    rows, length = weights.shape
    if judged.shape != (rows,):
      raise ValueError(
        f"expected one reward for each of {rows} outputs, got an array of shape"
        f" {judged.shape}; set REWARD"
      )
    # Whitening and the running mean are of the whole batch.
    every, of_all = judged, weights
    if jax.process_count() > 1:
      every, of_all = multihost_utils.process_allgather(
        (judged, weights), tiled=True
      )
    mean = self._mean.mean()
    used = every.reshape(-1, n)
    if self._model.whiten_rewards:
      used = losses.whiten(used)
    advantages = self._advantages(
      used, of_all.reshape(-1, n, length), running_mean=mean
    )
    batch_mean = float(np.mean(np.asarray(used, np.float64)))
    if np.isfinite(batch_mean):  # else the step is skipped
      decay = self._model.baseline_decay
      self._mean = self._mean.updated(batch_mean, decay)
    start = jax.process_index() * rows
    advantages = np.asarray(advantages).reshape(-1, length)
    return {
      types.REWARDS: judged,
      types.ADVANTAGES: advantages[start : start + rows],
    }

  def _texts(self, batch, outputs):
    """Returns a reward's arguments: decoded inputs, outputs and examples."""
    n = self._model.samples_per_prompt
    inputs = self._decode("inputs", prompts(batch))
    examples = [
      {"inputs": a, "targets": b}
      for a, b in zip(
        inputs, self._decode("targets", targets(batch)), strict=True
      )
    ]
    several = lambda texts: [text for text in texts for _ in range(n)]
    decoded = self._decode("targets", targets(outputs))
    return several(inputs), decoded, several(examples)

  def _decode(self, name, rows: Sequence[np.ndarray]) -> list[str]:
    vocabulary = self._vocabularies[name]
    tokens = self._model.student.special_tokens
    return [vocabularies.text(vocabulary, row, tokens) for row in rows]

  def save_state(self, path: str | os.PathLike[str]) -> None:
    """Writes the state into the folder `path`."""
    self._iterator.save_state(path)
    if self._keeps_mean and jax.process_index() == 0:
      files.write_json(os.path.join(path, _FILE), self._mean._asdict())

  def restore_state(self, path: str | os.PathLike[str]) -> None:
    """Restores the state that `save_state` wrote.

    Raises:
      ValueError: a running mean is needed, and none was saved.
    """
    self._iterator.restore_state(path)
    if not self._keeps_mean:
      return
    mean = files.read_json(os.path.join(path, _FILE))
    if mean is None:
      raise ValueError(
        f"expected a checkpoint with the running mean of rewards, got none in"
        f" {path}; set BASELINE as the run began, or another MODEL_DIR"
      )
    self._mean = losses.RunningMean(**mean)

  @property
  def _keeps_mean(self):
    return self.judged and self._model.baseline == "running_mean"


def prompts(batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
  """Returns each row's input tokens, of the encoder or of a decoder-only row.

  Args:
    batch: features `[B, ...]`.
  """
  if "encoder_input_tokens" in batch:
    rows = batch["encoder_input_tokens"]
    masks = batch.get(types.INPUT_MASK, rows)
    return [row[mask > 0] for row, mask in zip(rows, masks, strict=True)]
  rows = batch["decoder_target_tokens"]
  ends = np.argmax(batch["decoder_loss_weights"] > 0, axis=1)
  if "decoder_causal_attention" in batch:
    # One more position than the prompt has tokens; none in a row of padding.
    ends = np.maximum(batch["decoder_causal_attention"].sum(axis=1) - 1, 0)
  return [row[:end] for row, end in zip(rows, ends, strict=True)]


def targets(batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
  """Returns each row's output tokens, those that the loss counts.

  Args:
    batch: features `[B, ...]`.
  """
  rows = batch["decoder_target_tokens"]
  return [
    row[weights > 0]
    for row, weights in zip(rows, batch["decoder_loss_weights"], strict=True)
  ]


def check_targets(
  batch: Mapping[str, np.ndarray], source: str, step: int
) -> None:
  """Raises a ValueError for a batch of the data without a target token.

  Args:
    batch: features `[B, ...]`.
    source: whose outputs the step trains on.
    step: steps done, for the message.
  """
  if source == "data" and not np.any(batch["decoder_loss_weights"]):
    raise ValueError(
      "expected target tokens in every batch, got a batch without any at"
      f" step {step}; set STUDENT_DATA_FRACTION = 1.0 for data without"
      " references, or MIXTURE_OR_TASK_NAME"
    )
