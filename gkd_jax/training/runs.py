"""What a run is made of before anything is allocated: mesh, shapes, the step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gkd_jax import checks, optimizers, partitioning
from gkd_jax.training import settings, train_state, trainer


@dataclasses.dataclass(frozen=True)
class Run:
  """A run's mesh, abstract arrays and compiled step.

  Attributes:
    mesh: see `partitioning.make_mesh`.
    input_shapes: shapes that parameters are drawn with.
    state: abstract `TrainState` with shardings.
    teacher: the teacher's abstract parameters with shardings; {} without one.
    step: `(state, teacher_params, batch, source=...) -> (state, metrics)`.
    put: places a process's rows of a batch for `step`.
  """

  mesh: jax.sharding.Mesh
  input_shapes: dict[str, tuple[int, int]]
  state: Any
  teacher: Any
  step: Callable[..., Any]
  put: Callable[..., Any]


def check_parts(model: Any, optimizer: Any) -> None:
  """Raises a ValueError for what is no model, or no optimizer."""
  if not hasattr(model, "train_loss"):
    checks.refuse("a model such as @models.GKDModel()", model, "MODEL")
  if not hasattr(optimizer, "transform"):
    checks.refuse(
      "an optimizer such as @optimizers.adafactor()", optimizer, "OPTIMIZER"
    )


def build(
  model: Any,
  optimizer: optimizers.Optimizer,
  dataset: settings.DatasetConfig,
  partitioner: settings.PartitionerConfig,
  *,
  seed: int = 0,
  devices: Sequence[Any] | None = None,
) -> Run:
  """Builds a run for these devices, which need not be there.

  Args:
    model: see `train.train`.
    optimizer: see `optimizers.Optimizer`.
    dataset: lengths and batch size are read.
    partitioner: see `settings.PartitionerConfig`.
    seed: of everything random.
    devices: all of this machine by default.

  Raises:
    ValueError: settings that do not fit each other or the devices.
  """
  check_parts(model, optimizer)
  mesh = partitioning.make_mesh(
    partitioner.num_partitions, devices, partitioner.num_slices
  )
  _check(dataset.batch_size, partitioner, mesh)
  if dataset.pack and set(model.sources) != {"data"}:
    raise ValueError(
      "expected unpacked batches for outputs of the student, got PACK = True; set"
      " PACK = False, or STUDENT_DATA_FRACTION = 0.0"
    )
  shapes = partitioning.input_shapes(dataset.task_feature_lengths)
  rules = partitioning.parameter_rules(partitioner.shard_params_over_data)
  state, shardings = train_state.abstract_state(
    model.student, optimizer, shapes, mesh, rules
  )
  teacher = {}
  if model.teacher is not None:
    teacher = partitioning.with_shardings(
      *partitioning.abstract_params(model.teacher, shapes, mesh, rules)
    )
  step = functools.partial(
    trainer.train_step,
    model=model,
    optimizer=optimizer,
    seed=seed,
    num_microbatches=partitioner.num_microbatches,
  )
  if partitioner.executor == "pmap":
    step, put = trainer.pmap_step(step), dict
  else:
    step = trainer.jit_step(step, mesh, shardings)
    put = functools.partial(partitioning.put_batch, mesh=mesh)
  return Run(
    mesh,
    shapes,
    partitioning.with_shardings(state, shardings),
    teacher,
    step,
    put,
  )


def _check(batch_size, partitioner, mesh):
  """Raises a ValueError for a batch that the mesh or executor cannot take."""
  executor, parts = partitioner.executor, partitioner.num_microbatches
  data_axis = partitioning.row_shards(mesh)
  if batch_size % (data_axis * parts):
    raise ValueError(
      f"expected BATCH_SIZE to be a multiple of {data_axis * parts}"
      f" ({data_axis} data-parallel devices x {parts} microbatches),"
      f" got {batch_size}; set BATCH_SIZE"
    )
  if executor == "pmap" and jax.process_count() > 1:
    raise ValueError(
      f"expected one process under pmap, got {jax.process_count()};"
      " set EXECUTOR = 'jit'"
    )
