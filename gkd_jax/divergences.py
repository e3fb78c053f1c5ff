"""Divergences between the teacher's and the student's next-token laws.

p is the teacher, q the student, in that order in every signature. All take
log-probs `[..., V]` and return nats per position `[...]` in float32.

Every sum is written as sum_v f(p_v, q_v) with f >= 0: an entry `p log(p/q)` is
taken as `p log(p/q) - p + q`, whose sum is the same and whose terms cannot be
negative. Near p = q, where the plain terms cancel, this keeps the digits.

Formulas: Agarwal et al. (arXiv 2306.13649), section 2; skew KLs: Ko et al.
(arXiv 2402.03898).
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import types

# Log-probs are clipped here from below: exp is 0 in float32 well before it, and
# differences of two of them stay finite.
_FLOOR = -1e10

# (d + exp(-d) - 1) / d² = 1/2! - d/3! + d²/4! - ..., highest power first; the
# first term left out is below 1e-8 of the sum for |d| < 0.25.
_SERIES = np.array(
  [(-1.0) ** n / math.factorial(n + 2) for n in range(6, -1, -1)], np.float32
)


def _prepare(*log_probs: jax.Array) -> list[jax.Array]:
  return [jnp.maximum(x.astype(jnp.float32), _FLOOR) for x in log_probs]


def _relative_entropy(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
  """KL(a ‖ b), summed over the last axis, term by term non-negative.

  a (d + exp(-d) - 1) with d = log a - log b, by its series where d is small
  (the three terms cancel), else as a d + (b - a).
  """
  d = log_a - log_b
  a, b = jnp.exp(log_a), jnp.exp(log_b)
  # The double where keeps the gradient finite: powers of a large number would
  # be inf, and inf times a zero cotangent NaN.
  near = jnp.abs(d) < 0.25
  small = jnp.where(near, d, 0.0)
  close = a * jnp.square(small) * jnp.polyval(_SERIES, small)
  # a = 0 contributes b alone; a * d would be 0 * 1e10 in gradients.
  positive = a > 0
  far = jnp.where(positive, a * jnp.where(positive, d, 0.0), 0.0) + (b - a)
  return jnp.sum(jnp.where(near, close, far), axis=-1)


def forward_kl(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array
) -> jax.Array:
  """KL(p ‖ q) = Σ p log(p / q), which covers the teacher's modes.

  >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
  >>> round(float(forward_kl(p, q)), 4)
  0.1438

  Args:
    teacher_log_probs: `[..., V]` log p.
    student_log_probs: `[..., V]` log q.

  Returns:
    `[...]` nats per position, float32.
  """
  return _relative_entropy(*_prepare(teacher_log_probs, student_log_probs))


def reverse_kl(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array
) -> jax.Array:
  """KL(q ‖ p) = Σ q log(q / p), which seeks one of the teacher's modes.

  Args and result: see `forward_kl`.
  """
  return _relative_entropy(*_prepare(student_log_probs, teacher_log_probs))


def jsd(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array, *, beta: Any
) -> jax.Array:
  """Generalized JSD(β) = β KL(p ‖ m) + (1-β) KL(q ‖ m), m = β p + (1-β) q.

  Args:
    teacher_log_probs: `[..., V]` log p.
    student_log_probs: `[..., V]` log q.
    beta: in (0, 1), a number or a traced scalar; the teacher's share.

  Returns:
    `[...]` nats per position, float32, at most the binary entropy of β.

  Raises:
    ValueError: a static β outside (0, 1). At 0 and 1 this divergence is 0
      whatever p and q are; its scaled limits are the KLs.
  """
  _check_range("beta", beta)
  if _is_static(beta) and beta in (0, 1):
    name = "forward_kl" if beta == 0 else "reverse_kl"
    raise ValueError(
      f"expected jsd's beta in (0, 1), got {beta}, at which it is 0 for all"
      f" inputs; set the divergence to {name!r}"
    )
  p, q = _prepare(teacher_log_probs, student_log_probs)
  m = _mixture(p, q, beta)
  return beta * _relative_entropy(p, m) + (1 - beta) * _relative_entropy(q, m)


def generalized_jsd(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array, *, beta: Any
) -> jax.Array:
  """JSD(β) with β = 0 read as forward and β = 1 as reverse KL.

  This is the reading of the paper's experiments and of TRL, and what gin's
  `DIVERGENCE = 'jsd'` means. The scale jumps at the ends: see `normalized_jsd`.

  Args:
    teacher_log_probs: `[..., V]` log p.
    student_log_probs: `[..., V]` log q.
    beta: in [0, 1], a number or a traced scalar.

  Returns:
    `[...]` nats per position, float32.
  """
  _check_range("beta", beta)
  if _is_static(beta):
    if beta in (0, 1):
      end = forward_kl if beta == 0 else reverse_kl
      return end(teacher_log_probs, student_log_probs)
    return jsd(teacher_log_probs, student_log_probs, beta=beta)
  branch = jnp.where(beta <= 0, 0, jnp.where(beta >= 1, 1, 2))
  return jax.lax.switch(
    branch,
    [forward_kl, reverse_kl, functools.partial(jsd, beta=beta)],
    teacher_log_probs,
    student_log_probs,
  )


def normalized_jsd(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array, *, beta: Any
) -> jax.Array:
  """JSD(β) / (β (1-β)): KL(p ‖ q) at β = 0, KL(q ‖ p) at 1, smooth between.

  β then chooses the direction only: the plain JSD(β) is about β (1-β) KL near
  p = q, so that β also scales the gradient.

  Args:
    teacher_log_probs: `[..., V]` log p.
    student_log_probs: `[..., V]` log q.
    beta: in [0, 1], a number or a traced scalar.

  Returns:
    `[...]` nats per position, float32.
  """
  _check_range("beta", beta)
  p, q = _prepare(teacher_log_probs, student_log_probs)
  m = _mixture(p, q, beta)
  # KL(p‖m)/(1-β) + KL(q‖m)/β. Near an end one KL vanishes with its divisor
  # squared; there it is second-order small and is dropped exactly at the end.
  at_zero, at_one = jnp.equal(beta, 0), jnp.equal(beta, 1)
  teacher = _relative_entropy(p, m) / jnp.where(at_one, 1.0, 1 - beta)
  student = _relative_entropy(q, m) / jnp.where(at_zero, 1.0, beta)
  return teacher + student


def total_variation(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array
) -> jax.Array:
  """½ Σ |p - q|, in [0, 1] (no unit; f-distill's divergence).

  Args and shape: see `forward_kl`.
  """
  p, q = _prepare(teacher_log_probs, student_log_probs)
  return 0.5 * jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(q)), axis=-1)


def skew_forward_kl(
  teacher_log_probs: jax.Array,
  student_log_probs: jax.Array,
  *,
  alpha: Any = 0.1,
) -> jax.Array:
  """KL(p ‖ α p + (1-α) q) (DistiLLM).

  Args:
    teacher_log_probs: `[..., V]` log p.
    student_log_probs: `[..., V]` log q.
    alpha: in [0, 1), the teacher's share of the mixture.

  Returns:
    `[...]` nats per position, float32.
  """
  _check_range("alpha", alpha)
  p, q = _prepare(teacher_log_probs, student_log_probs)
  return _relative_entropy(p, _mixture(p, q, alpha))


def skew_reverse_kl(
  teacher_log_probs: jax.Array,
  student_log_probs: jax.Array,
  *,
  alpha: Any = 0.1,
) -> jax.Array:
  """KL(q ‖ (1-α) p + α q) (DistiLLM); α is the student's share.

  Args and result: see `skew_forward_kl`.
  """
  _check_range("alpha", alpha)
  p, q = _prepare(teacher_log_probs, student_log_probs)
  return _relative_entropy(q, _mixture(q, p, alpha))


def entropy(log_probs: jax.Array) -> jax.Array:
  """-Σ p log p of `[..., V]`, nats per position, float32."""
  (log_p,) = _prepare(log_probs)
  p = jnp.exp(log_p)
  return -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)


def _mixture(log_a: jax.Array, log_b: jax.Array, share: Any) -> jax.Array:
  """log(share a + (1-share) b), exact to rounding near a = b."""
  d = log_a - log_b
  near = jnp.abs(d) < 0.5
  small = jnp.where(near, d, 0.0)
  close = log_b + jnp.log1p(share * jnp.expm1(small))
  weighted_a = log_a + jnp.log(jnp.maximum(share, 1e-38))
  weighted_b = log_b + jnp.log(jnp.maximum(1 - share, 1e-38))
  # Both apart by at least 0.5, or equal: logaddexp's gradient is finite.
  return jnp.where(near, close, jnp.logaddexp(weighted_a, weighted_b))


def _is_static(value: Any) -> bool:
  return isinstance(value, (int, float, np.number, np.ndarray))


def _check_range(name: str, value: Any):
  if _is_static(value) and not 0 <= value <= 1:
    raise ValueError(
      f"expected {name} in [0, 1], got {value}; set {name.upper()}"
    )


_REGISTRY: dict[str, Callable[..., jax.Array]] = {
  f.__name__: f
  for f in (
    forward_kl,
    reverse_kl,
    jsd,
    generalized_jsd,
    normalized_jsd,
    total_variation,
    skew_forward_kl,
    skew_reverse_kl,
  )
}


def names() -> list[str]:
  """Names that `get` knows."""
  return sorted(_REGISTRY)


def get(name: str, **hyper: Any) -> types.Divergence:
  """Returns a divergence by name, its hyper-parameters bound.

  Args:
    name: see `names`.
    **hyper: `beta` or `alpha`, where the divergence takes it.

  Raises:
    ValueError: no such name, or a hyper-parameter that it does not take.
  """
  if name not in _REGISTRY:
    near = difflib.get_close_matches(name, _REGISTRY) or names()
    raise ValueError(
      f"expected a divergence of {', '.join(near)}, got {name!r};"
      " set DIVERGENCE"
    )
  function = _REGISTRY[name]
  taken = set(inspect.signature(function).parameters)
  for key, value in hyper.items():
    if key not in taken:
      raise ValueError(
        f"expected no {key} for the divergence {name!r}, got {value};"
        f" set DIVERGENCE or leave {key} out"
      )
    _check_range(key, value)
  return functools.partial(function, **hyper)
