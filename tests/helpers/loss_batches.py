"""Batches for the tests of losses, and what they are compared with."""

import jax
import numpy as np


def log_softmax64(logits):
  """In float64 numpy."""
  z = np.asarray(logits, np.float64)
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def random_batch(seed=0, shape=(3, 5, 7)):
  """Teacher and student logits, weights of ragged rows, and targets."""
  rng = np.random.default_rng(seed)
  teacher, student = rng.normal(size=(2, *shape)).astype(np.float32) * 2
  lengths = rng.integers(1, shape[1] + 1, size=shape[0])
  lengths[0] = shape[1]
  weights = (np.arange(shape[1])[None] < lengths[:, None]).astype(np.float32)
  return teacher, student, weights, rng.integers(0, shape[2], size=shape[:2])


def value_and_grad(loss, logits):
  """`(loss_sum, weight_sum, gradient)` of a loss that takes logits only."""

  def total_and_weight(x):
    total, weight, _ = loss(x)
    return total, weight

  function = jax.jit(jax.value_and_grad(total_and_weight, has_aux=True))
  (total, weight), gradient = function(logits)
  return float(total), float(weight), np.asarray(gradient)
