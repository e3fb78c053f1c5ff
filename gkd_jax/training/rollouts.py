"""Training batches with student samples scored by a reward.

Before a step of RL + GKD (`models.RLGKDModel`) the batch's prompts go to the
devices, N outputs for each come back, the host decodes and scores them, and the
outputs with their advantages become the step's batch. Batches of other models are
the data's.
"""

import functools
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gkd_jax import files, losses, partitioning, types
from gkd_jax.data import vocabularies

_FILE = "running_mean.json"


class Judge:
  """A model's reward, and the texts that it judges.

  Args:
    model: see `train.train`; one that needs rewards.
    task: its vocabularies decode inputs and outputs.
  """

  def __init__(self, model: Any, task: Any):
    self._model = model
    self._vocabularies = {
      name: feature.vocabulary
      for name, feature in task.output_features.items()
      if name in ("inputs", "targets")
    }
    # Prompts alone: outputs are of the same vocabulary.
    self._vocabularies.setdefault("targets", self._vocabularies.get("inputs"))

  def rewards(
    self, batch: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
  ) -> np.ndarray:
    """Returns the reward of each output, `[B N]` float32; NaN where there is none.

    Args:
      batch: features `[B, ...]` of the prompts and references.
      outputs: features `[B N, ...]`, N outputs for each prompt.

    Raises:
      ValueError: the reward did not return a number or None for each output.
    """
    rewards = self._model.reward(*self._texts(batch, outputs))
    return _numbers(rewards, len(outputs["decoder_target_tokens"]))

  def check_missing(self, missing: np.ndarray, present: np.ndarray) -> None:
    """Raises a ValueError if too many outputs of a batch have no reward."""
    most = self._model.max_missing_rewards
    share = np.mean(missing[present]) if present.any() else 0.0
    if share > most:
      raise ValueError(
        f"expected rewards of at least {1 - most:.0%} of a batch's outputs, got"
        f" None, NaN or an infinite number for {share:.0%} of them; set REWARD"
        " or MAX_MISSING_REWARDS"
      )

  def ended(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns which outputs have ended, bool `[B N]`, and were not cut."""
    eos = self._model.student.special_tokens.eos
    is_eos = np.isin(outputs["decoder_target_tokens"], eos)
    return np.any(is_eos & (outputs["decoder_loss_weights"] > 0), axis=1)

  def _texts(self, batch, outputs):
    """Returns a reward's arguments: decoded inputs, outputs and examples."""
    inputs = self._decode("inputs", prompts(batch))
    ended = self.ended(outputs)
    n = len(ended) // len(inputs)
    examples = [
      {"inputs": a, "targets": b}
      for a, b in zip(
        inputs, self._decode("targets", targets(batch)), strict=True
      )
    ]
    several = lambda texts: [text for text in texts for _ in range(n)]
    decoded = self._decode("targets", targets(outputs))
    examples = [
      example | {"ended": bool(has_ended)}
      for example, has_ended in zip(several(examples), ended, strict=True)
    ]
    return several(inputs), decoded, examples

  def _decode(self, name, rows: Sequence[np.ndarray]) -> list[str]:
    vocabulary = self._vocabularies[name]
    if name == "inputs":
      return [vocabularies.prompt_text(vocabulary, row) for row in rows]
    tokens = self._model.student.special_tokens
    return [vocabularies.text(vocabulary, row, tokens) for row in rows]

  def try_on(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns rewards of a batch's references as if they were outputs, `[B]`.

    A row without a reference has its prompt for an output.

    Args:
      batch: features `[B, ...]` of the prompts and references.

    Raises:
      ValueError: the reward raised, or did not return what a step needs.
    """
    inputs, outputs, examples = self._texts(batch, batch)
    outputs = [b or a for a, b in zip(inputs, outputs, strict=True)]
    try:
      rewards = self._model.reward(inputs, outputs, examples)
    except Exception as error:
      place = traceback.extract_tb(error.__traceback__)[-1]
      reason = " ".join(str(error).split())[:300]
      raise ValueError(
        "expected a reward for each reference of the first batch, got"
        f" {type(error).__name__}: {reason}"
        f" ({os.path.basename(place.filename)}:{place.lineno}); set REWARD"
      ) from error
    rewards = _numbers(rewards, len(outputs))
    self.check_missing(np.isnan(rewards), np.ones(len(outputs), bool))
    return rewards


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
    self.judged = model.needs_rewards
    if self.judged:
      self._judge = Judge(model, task)
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
      partitioning.local_rows,
      self._roll_out(params, placed, key, np.int32(step)),
    )
    return outputs | self._judged(batch, outputs)

  def _judged(self, batch, outputs):
    """Returns rewards `[B N]` and advantages `[B N, T]` of this process's outputs."""
    n = self._model.samples_per_prompt
    weights = outputs["decoder_loss_weights"]
    rows, length = weights.shape
    judged = self._judge.rewards(batch, outputs)
    ended = self._judge.ended(outputs)
    # Whitening and the running mean are of the whole batch.
    every, of_all = judged, weights
    if jax.process_count() > 1:
      every, of_all, ended = multihost_utils.process_allgather(
        (judged, weights, ended), tiled=True
      )
    # Rows of padding alone have no output, and nothing to judge.
    present = of_all.any(axis=1)
    self._judge.check_missing(np.isnan(every), present)
    mean = self._mean.mean()
    used = np.where(ended, every, every - self._model.cut_penalty)
    used = np.where(present, used, np.nan).astype(np.float32).reshape(-1, n)
    if self._model.whiten_rewards:
      used = losses.whiten(used)
    advantages = self._advantages(
      used, of_all.reshape(-1, n, length), running_mean=mean
    )
    used = np.asarray(used, np.float64)
    if np.isfinite(used).any():
      decay = self._model.baseline_decay
      self._mean = self._mean.updated(float(np.nanmean(used)), decay)
    start = jax.process_index() * rows
    advantages = np.asarray(advantages).reshape(-1, length)
    return {
      types.REWARDS: judged,
      types.ADVANTAGES: advantages[start : start + rows],
    }

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


def _numbers(rewards: Sequence[float | None], rows: int) -> np.ndarray:
  """Returns rewards `[B N]` float32, NaN for those that are no finite number.

  Raises:
    ValueError: there is not one reward, a number or None, for each row.
  """
  try:
    numbers = np.array(
      [np.nan if reward is None else reward for reward in rewards], np.float32
    )
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"expected a number or None for each of {rows} outputs, got {rewards!r:.99}"
      f" ({error}); set REWARD"
    ) from error
  if numbers.shape != (rows,):
    raise ValueError(
      f"expected one reward for each of {rows} outputs, got an array of shape"
      f" {numbers.shape}; set REWARD"
    )
  return np.where(np.isfinite(numbers), numbers, np.nan)


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
