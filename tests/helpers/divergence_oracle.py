"""The divergences in float64 numpy."""

import loss_batches
import numpy as np


def kl(log_a, log_b):
  return np.sum(np.exp(log_a) * (log_a - log_b), axis=-1)


def mix(log_a, log_b, share):
  return np.logaddexp(log_a + np.log(share), log_b + np.log1p(-share))


def divergence(name, teacher, student, beta=0.5, alpha=0.1):
  """The papers' formulas in float64, from logits."""
  p, q = map(loss_batches.log_softmax64, (teacher, student))
  if name == "forward_kl":
    return kl(p, q)
  if name == "reverse_kl":
    return kl(q, p)
  if name == "total_variation":
    return 0.5 * np.abs(np.exp(p) - np.exp(q)).sum(-1)
  if name == "skew_forward_kl":
    return kl(p, mix(p, q, alpha))
  if name == "skew_reverse_kl":
    return kl(q, mix(q, p, alpha))
  m = mix(p, q, beta)
  jsd = beta * kl(p, m) + (1 - beta) * kl(q, m)
  return jsd / (beta * (1 - beta)) if name == "normalized_jsd" else jsd
