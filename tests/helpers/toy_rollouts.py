"""Models trained by rewards, and batches of their rollouts."""

import jax
import numpy as np
import toy_models

from gkd_jax import data, files, models, partitioning, training

SYMBOLS = "0123456789+-=;#"  # of arithmetic_cot, from id 3 on


class Lists:
  """A saveable iterator over batches that are there already."""

  def __init__(self, batches):
    self.batches, self.position = batches, 0

  def __next__(self):
    self.position += 1
    return self.batches[(self.position - 1) % len(self.batches)]

  def save_state(self, path):
    (files.absolute(path) / "position").write_text(str(self.position))

  def restore_state(self, path):
    self.position = int((files.absolute(path) / "position").read_text())


def symbols(text):
  return "".join(c for c in text if c in SYMBOLS)


def score(inputs, outputs, examples):
  """Depends on all three, and differs between samples of a prompt."""
  return [
    len(symbols(b)) + 0.1 * len(symbols(a)) + 0.01 * len(symbols(e["targets"]))
    for a, b, e in zip(inputs, outputs, examples, strict=True)
  ]


def rl(reward=score, toys=toy_models, **settings):
  plain, student, teacher = toys.gkd()
  settings = {"alpha": 0.3, "samples_per_prompt": 2} | settings
  model = models.RLGKDModel(
    plain.student, plain.teacher, reward=reward, **settings
  )
  return model, student, teacher


def make(model, batches, mesh=None):
  return training.RolloutBatches(
    Lists(batches),
    model,
    data.load_task("arithmetic_cot"),
    seed=7,
    mesh=mesh or partitioning.make_mesh(),
  )


def second_batch(batch):
  """Rewards whitened by all rows, and a running mean that is not 0."""
  model, params, _ = rl(
    whiten_rewards=True, baseline="running_mean", baseline_decay=0.5
  )
  batches = make(model, [batch])
  params = jax.tree.map(np.asarray, params)
  batches.next(0, params)
  batches._mean = batches._mean.updated(3.0, 0.5)
  return batches.next(1, params)
