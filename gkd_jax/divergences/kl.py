"""Divergences between the teacher's and the student's next-token distributions.

p is the teacher and q the student, in that order in every signature. A divergence
is a `types.Divergence`: it takes log p and log q, `[..., V]` in any float type, and
returns nats per position, `[...]` in float32. Docstrings below say what is special
to one. Values and gradients are finite at log-probs of -1e9 and of -inf: a log-prob
below -1e10 counts as -1e10.

All but total variation are computed from one quantity, for distributions a, b
and a share s of b in their mixture:

  K_s(a, b) = KL(a ‖ (1-s) a + s b) / s

  | divergence        | as K                                               |
  |-------------------|----------------------------------------------------|
  | `forward_kl`      | K_1(p, q)                                          |
  | `reverse_kl`      | K_1(q, p)                                          |
  | `normalized_jsd`  | K_{1-β}(p, q) + K_β(q, p)                          |
  | `jsd`             | β (1-β) (K_{1-β}(p, q) + K_β(q, p))                |
  | `skew_forward_kl` | (1-α) K_{1-α}(p, q)                                |
  | `skew_reverse_kl` | (1-α) K_{1-α}(q, p)                                |

Sources: Agarwal et al. (arXiv 2306.13649), section 2; total variation: Wen et
al. (arXiv 2307.15190); skew KLs: Ko et al. (arXiv 2402.03898). β and α are
constants: no gradient flows into them.

To add a divergence, write it here and decorate it with `register`.
"""

import difflib
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gkd_jax import types
from gkd_jax.divergences import stable

_REGISTRY: dict[str, Callable[..., jax.Array]] = {}


def register(divergence: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Registers a divergence for `get` under its function's name.

  Args:
    divergence: a function of teacher and student log-probs `[..., V]`, giving
      `[...]`; its hyper-parameters are keyword-only arguments.

  Returns:
    The function itself.
  """
  _REGISTRY[divergence.__name__] = divergence
  return divergence


@register
def forward_kl(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array
) -> jax.Array:
  """Computes KL(p ‖ q) = Σ p log(p / q), which covers the teacher's modes.

  >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
  >>> round(float(forward_kl(p, q)), 4)
  0.1438
  """
  return stable.skewed_kl(teacher_log_probs, student_log_probs, 1.0, 0.0)


@register
def reverse_kl(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array
) -> jax.Array:
  """Computes KL(q ‖ p) = Σ q log(q / p), which seeks one mode of the teacher.

  >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
  >>> round(float(reverse_kl(p, q)), 4)
  0.1308
  """
  return stable.skewed_kl(student_log_probs, teacher_log_probs, 1.0, 0.0)


@register
def jsd(
  teacher_log_probs: jax.Array,
  student_log_probs: jax.Array,
  *,
  beta: float | jax.Array,
) -> jax.Array:
  """Computes JSD(β) = β KL(p ‖ m) + (1-β) KL(q ‖ m), m = β p + (1-β) q.

  β is the teacher's share of the mixture and of the sum (equation 1 of the
  paper). Near p = q the JSD is β (1-β) times a KL, so β scales the gradient
  too; that of `normalized_jsd` is not scaled.

  >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
  >>> round(float(jsd(p, q, beta=0.5)), 4)
  0.0338

  Args:
    beta: in (0, 1), a number or a traced scalar.

  Returns:
    `[...]` nats per position, float32, at most the binary entropy of β.

  Raises:
    ValueError: β is known when tracing and outside of (0, 1). At 0 and 1 the
      formula is 0 for all p and q; its scaled limits are the KLs.
  """
  beta = _checked("beta", beta)
  if isinstance(beta, float) and beta in (0, 1):
    raise ValueError(
      f"expected beta between 0 and 1 for 'jsd', got {beta}, at which it is 0"
      " for all inputs; set the divergence to"
      f" {'reverse_kl' if beta else 'forward_kl'!r}"
    )
  scale = beta * (1 - beta)
  return scale * normalized_jsd(teacher_log_probs, student_log_probs, beta=beta)


@register
def generalized_jsd(
  teacher_log_probs: jax.Array,
  student_log_probs: jax.Array,
  *,
  beta: float | jax.Array,
) -> jax.Array:
  """Computes `jsd`; β = 0 means forward KL and β = 1 means reverse KL.

  This is how the paper's experiments and TRL read β, and what the gin macros
  `DIVERGENCE = 'jsd'` and `BETA` mean. Its scale jumps at both ends.

  Args:
    beta: in [0, 1], a number or a traced scalar; only the divergence that it
      picks is computed (all three if `vmap` maps over it).

  Raises:
    ValueError: β is known when tracing and outside of [0, 1].
  """
  beta = _checked("beta", beta)
  branches = [forward_kl, functools.partial(jsd, beta=beta), reverse_kl]
  if isinstance(beta, float):
    chosen = branches[0 if beta == 0 else 2 if beta == 1 else 1]
    return chosen(teacher_log_probs, student_log_probs)
  index = jnp.where(beta <= 0, 0, jnp.where(beta >= 1, 2, 1))
  return jax.lax.switch(index, branches, teacher_log_probs, student_log_probs)


@register
def normalized_jsd(
  teacher_log_probs: jax.Array,
  student_log_probs: jax.Array,
  *,
  beta: float | jax.Array,
) -> jax.Array:
  """Computes JSD(β) / (β (1-β)): KL(p ‖ q) at β = 0, KL(q ‖ p) at β = 1.

  It is continuous in β, which sets the direction of the divergence and leaves
  the gradient's scale alone.

  >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
  >>> [round(float(normalized_jsd(p, q, beta=b)), 4) for b in (0, 0.5, 1)]
  [0.1438, 0.1353, 0.1308]

  Args:
    beta: in [0, 1], a number or a traced scalar.

  Raises:
    ValueError: β is known when tracing and outside of [0, 1].
  """
  beta = _checked("beta", beta)
  if isinstance(beta, float) and beta in (0, 1):
    return (reverse_kl if beta else forward_kl)(
      teacher_log_probs, student_log_probs
    )
  # Never divides by β (1-β): near an end JSD(β) has lost its digits.
  return stable.normalized_jsd(
    teacher_log_probs, student_log_probs, beta, 1 - beta
  )


@register
def total_variation(
  teacher_log_probs: jax.Array, student_log_probs: jax.Array
) -> jax.Array:
  """Computes ½ Σ |p - q|, between 0 and 1, without a unit (f-distill).

  >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
  >>> round(float(total_variation(p, q)), 4)
  0.25

  Returns:
    `[...]` per position, float32.
  """
  pair = stable.compared(
    stable.floored(teacher_log_probs), stable.floored(student_log_probs)
  )
  return 0.5 * jnp.sum(jnp.abs(pair.gap), axis=-1)


@register
def skew_forward_kl(
  teacher_log_probs: jax.Array,
  student_log_probs: jax.Array,
  *,
  alpha: float | jax.Array = 0.1,
) -> jax.Array:
  """Computes KL(p ‖ α p + (1-α) q), DistiLLM's skew KL; forward KL at α = 0.

  Args:
    alpha: in [0, 1), the teacher's share of the mixture, a number or a traced
      scalar.

  Returns:
    `[...]` nats per position, float32, at most -log α.

  Raises:
    ValueError: α is known when tracing and outside of [0, 1).
  """
  alpha = _checked_skew(alpha)
  kl = stable.skewed_kl(teacher_log_probs, student_log_probs, 1 - alpha, alpha)
  return (1 - alpha) * kl


@register
def skew_reverse_kl(
  teacher_log_probs: jax.Array,
  student_log_probs: jax.Array,
  *,
  alpha: float | jax.Array = 0.1,
) -> jax.Array:
  """Computes KL(q ‖ (1-α) p + α q), DistiLLM's; reverse KL at α = 0.

  Args:
    alpha: in [0, 1), the student's share of the mixture, a number or a traced
      scalar.

  Returns:
    `[...]` nats per position, float32, at most -log α.

  Raises:
    ValueError: α is known when tracing and outside of [0, 1).
  """
  alpha = _checked_skew(alpha)
  kl = stable.skewed_kl(student_log_probs, teacher_log_probs, 1 - alpha, alpha)
  return (1 - alpha) * kl


def entropy(log_probs: jax.Array) -> jax.Array:
  """Computes the entropy -Σ p log p, in nats per position.

  >>> round(float(entropy(jnp.log(jnp.array([0.5, 0.5])))), 4)
  0.6931

  Args:
    log_probs: `[..., V]` log p.

  Returns:
    `[...]` float32.
  """
  log_p = stable.floored(log_probs)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def names() -> list[str]:
  """Returns the names of all divergences, sorted."""
  return sorted(_REGISTRY)


def parameters(name: str) -> tuple[str, ...]:
  """Returns the names of a divergence's hyper-parameters.

  >>> parameters("jsd"), parameters("forward_kl")
  (('beta',), ())

  Args:
    name: one of `names()`.

  Raises:
    ValueError: there is no such name.
  """
  return tuple(_options(name))


def get(name: str, **hyper: float | jax.Array) -> types.Divergence:
  """Returns a divergence with its hyper-parameters bound.

  >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
  >>> round(float(get("jsd", beta=0.5)(p, q)), 4)
  0.0338

  Args:
    name: one of `names()`.
    **hyper: `beta` or `alpha`, where the divergence takes it.

  Returns:
    A function of teacher and student log-probs `[..., V]`, giving nats `[...]`,
    and a pytree of its hyper-parameters.

  Raises:
    ValueError: there is no such name (the message holds the nearest ones), or
      a hyper-parameter is missing, not taken, or out of its range.
  """
  options = _options(name)
  for key, value in hyper.items():
    if key not in options:
      raise ValueError(
        f"expected no {key} for the divergence {name!r}, got {value};"
        f" set DIVERGENCE or leave {key} out"
      )
  for key, option in options.items():
    if option.default is option.empty and key not in hyper:
      raise ValueError(
        f"expected a {key} for the divergence {name!r}, got none;"
        f" set {key.upper()}"
      )
  divergence = jax.tree_util.Partial(_REGISTRY[name], **hyper)
  # Values out of range raise here, not in the first step.
  abstract = jax.ShapeDtypeStruct((1,), jnp.float32)
  jax.eval_shape(divergence, abstract, abstract)
  return divergence


def _options(name):
  """Returns the hyper-parameters of a divergence, by name."""
  if name not in _REGISTRY:
    near = difflib.get_close_matches(str(name), _REGISTRY) or names()
    raise ValueError(
      f"expected a divergence such as {', '.join(near)}, got {name!r};"
      " set DIVERGENCE"
    )
  parameters = inspect.signature(_REGISTRY[name]).parameters.values()
  return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _checked(name: str, value: float | jax.Array) -> float | jax.Array:
  """Returns the value: a float in [0, 1] if it is known when tracing."""
  if isinstance(value, jax.core.Tracer):
    return jax.lax.stop_gradient(value)
  known = float(value)
  if not 0 <= known <= 1:
    raise ValueError(
      f"expected {name} in [0, 1], got {value}; set {name.upper()}"
    )
  return known


def _checked_skew(alpha: float | jax.Array) -> float | jax.Array:
  alpha = _checked("alpha", alpha)
  if isinstance(alpha, float) and alpha == 1:
    raise ValueError(
      f"expected alpha in [0, 1), got {alpha}, at which a skew KL is 0 for all"
      " inputs; set ALPHA"
    )
  return alpha
