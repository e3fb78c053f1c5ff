"""Shapes and places of all that a run keeps on its devices; nothing is allocated."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gkd_jax import optimizers, partitioning, train_state, types


def input_shapes(
  task_feature_lengths: Mapping[str, int],
) -> dict[str, tuple[int, int]]:
  """Shapes that a model's parameters are drawn with.

  Args:
    task_feature_lengths: seqio feature to length in tokens.
  """
  return {
    "encoder_input_tokens": (1, task_feature_lengths["inputs"]),
    "decoder_input_tokens": (1, task_feature_lengths["targets"]),
  }


def rules(shard_params_over_data: bool) -> Sequence[tuple[str, str | None]]:
  """The rules of parameters: whole on the data axis, or split over it."""
  if shard_params_over_data:
    return partitioning.FULLY_SHARDED_RULES
  return partitioning.STANDARD_RULES


def host_params(model: types.TransformerModel) -> Any:
  """Shapes and types of a model's parameters, which have no place.

  Args:
    model: student or teacher.
  """
  return _variables(model, input_shapes({"inputs": 1, "targets": 1}))["params"]


def _variables(model, shapes):
  return jax.eval_shape(
    lambda: model.get_initial_variables(jax.random.key(0), shapes)
  )


def params(
  model: types.TransformerModel,
  shapes: Mapping[str, tuple[int, ...]],
  mesh: Any,
  rules: Sequence[tuple[str, str | None]],
) -> tuple[Any, Any]:
  """Shapes of a model's parameters and their shardings.

  Args:
    model: student or teacher.
    shapes: see `input_shapes`.
    mesh: see `partitioning.make_mesh`.
    rules: logical axis to mesh axis.
  """
  variables = _variables(model, shapes)
  axes = partitioning.logical_axes(variables["params_axes"])
  shardings = partitioning.param_shardings(
    variables["params"], axes, mesh, rules
  )
  return variables["params"], shardings


def state(
  student: types.TransformerModel,
  optimizer: optimizers.Optimizer,
  shapes: Mapping[str, tuple[int, ...]],
  mesh: Any,
  rules: Sequence[tuple[str, str | None]],
) -> tuple[Any, Any]:
  """Shapes of the train state and its shardings; arguments as of `params`.

  Raises:
    ValueError: a student whose parameters are not float32.
  """
  student_params, shardings = params(student, shapes, mesh, rules)
  types_ = {leaf.dtype.name for leaf in jax.tree.leaves(student_params)}
  if types_ != {"float32"}:
    raise ValueError(
      "expected float32 parameters of the network that is trained, got"
      f" {', '.join(sorted(types_))}; set its weights to 'float32'"
    )
  abstract = jax.eval_shape(
    lambda p: train_state.create(p, optimizer.transform), student_params
  )
  return abstract, partitioning.state_shardings(abstract, shardings, mesh)


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """A tree of shapes that know their shardings."""
  return jax.tree.map(
    lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h),
    shapes,
    shardings,
  )
