"""The train state: student parameters, optimizer state, counts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from gkd_jax import optimizers, partitioning, types


def abstract_state(
  student: types.TransformerModel,
  optimizer: optimizers.Optimizer,
  shapes: Mapping[str, tuple[int, ...]],
  mesh: Any,
  rules: Sequence[tuple[str, str | None]],
) -> tuple[Any, Any]:
  """Returns the abstract train state and its shardings.

  Arguments are those of `partitioning.abstract_params`.

  Raises:
    ValueError: a student whose parameters are not float32.
  """
  student_params, shardings = partitioning.abstract_params(
    student, shapes, mesh, rules
  )
  types_ = {leaf.dtype.name for leaf in jax.tree.leaves(student_params)}
  if types_ != {"float32"}:
    raise ValueError(
      "expected float32 parameters of the network that is trained, got"
      f" {', '.join(sorted(types_))}; set its weights to 'float32'"
    )
  abstract = jax.eval_shape(
    lambda p: create(p, optimizer.transform), student_params
  )
  return abstract, partitioning.state_shardings(abstract, shardings, mesh)


@struct.dataclass
class TrainState:
  """Parameters and optimizer of the student; no random key and no teacher.

  All randomness is derived from (seed, step). The teacher is a separate argument
  of the step: in the state it would be in every checkpoint.

  Attributes:
    step: `[]` int32, batches used so far, skipped updates included.
    params: the student's parameters.
    opt_state: optax's state.
    skipped: `[]` int32, updates skipped so far, in which anything was not
      finite.
    skipped_in_row: `[]` int32, how many of them just now, one after the other.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  skipped: jax.Array
  skipped_in_row: jax.Array


def create(params: Any, transform: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first step."""
  zero = lambda: jnp.zeros((), jnp.int32)
  return TrainState(zero(), params, transform.init(params), zero(), zero())
