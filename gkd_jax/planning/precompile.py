"""`gkd precompile`: compiles a run's programs for devices, attached or not.

The programs are those of `train.train`: the sampler, the teacher, and the step.
Parameters, optimizer state and batch are abstract; neither data nor checkpoints
are read.
"""

import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import (
  data,
  files,
  losses,
  models,
  optimizers,
  partitioning,
  train,
  training,
)
from gkd_jax.models import rl_gkd
from gkd_jax.partitioning import meshes
from gkd_jax.planning import program_files, program_report, topologies

SAMPLING, TEACHER = "sampling", "teacher"
PHASES = (SAMPLING, TEACHER, models.DATA, models.STUDENT, models.MIXED)
TITLES = {
  SAMPLING: "sampling by the student alone",
  TEACHER: "teacher alone, to logits",
  models.DATA: "training step on the data",
  models.STUDENT: "training step on the student's outputs",
  models.MIXED: "training step on either, row by row",
}
# Arguments of `train.train` that the programs depend on.
SETTINGS = (
  "model",
  "optimizer",
  "task_feature_lengths",
  "batch_size",
  "seed",
  "pack",
  "num_microbatches",
  "executor",
  "num_partitions",
  "num_slices",
  "shard_params_over_data",
)


def precompile(
  model: Any,
  optimizer: optimizers.Optimizer,
  *,
  devices: Sequence[Any],
  chip: topologies.Chip | None,
  topology: str,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
  seed: int = 0,
  pack: bool = False,
  num_microbatches: int = 1,
  executor: str = "jit",
  num_partitions: int = 1,
  num_slices: int | None = None,
  shard_params_over_data: bool = False,
  phases: Sequence[str] | None = None,
  output_path: str | None = None,
  about: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Compiles each phase, and prints and returns what it needs.

  Sampling and teacher hold only what they read. The training steps show whether
  a run fits: their arguments are all that the run keeps on its devices.

  Args:
    model: see `train.train`, as all that is not named here.
    optimizer: see there.
    devices: what to compile for, from `topologies.devices`.
    chip: what they are; None: no roofline.
    topology: their name, for the report.
    task_feature_lengths: see `train.train`.
    batch_size: see there.
    seed: see there.
    pack: see there.
    num_microbatches: see there.
    executor: only "jit".
    num_partitions: see there.
    num_slices: see there.
    shard_params_over_data: see there.
    phases: some of `PHASES`; by default those that the model has.
    output_path: folder for `precompile.json`, rewritten after each phase, and
      the programs' texts. A program that is there already is counted, but not
      compiled again.
    about: `title` and `command`, for the table of docs/scale.md.

  Returns:
    `{**about, "topology", "mesh", ..., "phases": {phase: report}}`; see
    `program_report.report`.

  Raises:
    ValueError: a setting cannot be compiled, or a phase is unknown.
  """
  mesh = partitioning.make_mesh(num_partitions, devices, num_slices)
  train.check_batch(batch_size, num_microbatches, mesh, executor)
  chosen = chosen_phases(model, phases, executor)
  programs = Programs(
    model,
    optimizer,
    mesh,
    task_feature_lengths,
    batch_size,
    seed=seed,
    pack=pack,
    num_microbatches=num_microbatches,
    shard_params_over_data=shard_params_over_data,
  )
  lengths = dict(task_feature_lengths)
  result = {
    **(about or {}),
    "versions": program_files.versions(),
    "topology": topology,
    "mesh": dict(mesh.shape),
    "batch_size": batch_size,
    "task_feature_lengths": lengths,
    "num_microbatches": num_microbatches,
    "shard_params_over_data": shard_params_over_data,
    "hbm_bytes": chip.hbm_bytes if chip else None,
    "phases": {},
  }
  print(
    f"{topology}: {len(devices)} devices as {dict(mesh.shape)}, batch"
    f" {batch_size}, lengths {lengths}",
    flush=True,
  )
  for phase in chosen:
    report = programs.report(phase, chip, topology, output_path)
    result["phases"][phase] = report
    print("\n".join(program_report.lines(TITLES[phase], report)), flush=True)
    if output_path:
      files.write_json(os.path.join(output_path, "precompile.json"), result)
  return result


class Programs:
  """The programs of a run, lowered for shapes with shardings.

  Args:
    model: see `precompile`, as all that is not named here.
    optimizer: see there.
    mesh: from `partitioning.make_mesh`.
    lengths: `task_feature_lengths`.
    batch_size: see there.
    seed: see there.
    pack: see there.
    num_microbatches: see there.
    shard_params_over_data: see there.
  """

  def __init__(
    self,
    model: Any,
    optimizer: optimizers.Optimizer,
    mesh: Any,
    lengths: Mapping[str, int],
    batch_size: int,
    *,
    seed: int = 0,
    pack: bool = False,
    num_microbatches: int = 1,
    shard_params_over_data: bool = False,
  ):
    self._model, self._mesh = model, mesh
    self._length = lengths["targets"]
    self._num_microbatches = num_microbatches
    rules = partitioning.parameter_rules(shard_params_over_data)
    shapes = partitioning.input_shapes(lengths)
    state, shardings = training.abstract_state(
      model.student, optimizer, shapes, mesh, rules
    )
    self._state = partitioning.with_shardings(state, shardings)
    self._teacher = {}
    if model.teacher is not None:
      self._teacher = partitioning.with_shardings(
        *partitioning.abstract_params(model.teacher, shapes, mesh, rules)
      )
    features = data.feature_lengths(model.FEATURE_CONVERTER_CLS, lengths, pack)
    self._batch = self._placed(
      {
        name: jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        for name, length in features.items()
      }
    )
    self._key = jax.eval_shape(lambda: jax.random.key(0))
    self.rows = batch_size
    self._step_batch = self._batch
    self._sampler = training.sampler(model, mesh)
    if _judged(model):
      self._roll_out(lengths)
    step = functools.partial(
      training.train_step,
      model=model,
      optimizer=optimizer,
      seed=seed,
      num_microbatches=num_microbatches,
    )
    self._step = training.JitExecutor(step, mesh, shardings)

  @property
  def held_bytes(self) -> int:
    """Bytes that the arguments of a training step take on one device."""
    return program_report.held_bytes(
      (self._state, self._teacher, self._step_batch)
    )

  def report(
    self,
    phase: str,
    chip: topologies.Chip | None,
    topology: str,
    folder: str | None = None,
    name: str | None = None,
  ) -> dict[str, Any]:
    """Compiles a phase, unless the folder has it, and counts.

    Args:
      phase: of `PHASES`.
      chip: see `precompile`.
      topology: see there.
      folder: of compiled programs, or None.
      name: of the program in the folder; the phase's by default.

    Returns:
      See `program_report.report`, with `memory` and `compile_seconds`.
    """
    # A program is of the order of its devices, which its text does not say.
    order = ",".join(str(device.id) for device in self._mesh.devices.flat)
    target = f"{topology} {order}"
    program = _compile(*self.lower(phase), target, folder, name or phase)
    if program.text is None:
      return program.facts
    return program.facts | program_report.report(
      program.text,
      program.facts["memory"],
      chip,
      loop_length=self._length,
      output_tokens=self.rows * self._length,
      max_trips={"loss": self._loss_chunks()},
    )

  def _loss_chunks(self):
    """Returns the most chunks that a device's part of the loss goes through."""
    _, shards = meshes.rows(self._mesh.shape)
    tokens = self.rows * self._length // (self._num_microbatches * shards)
    size = getattr(self._model, "loss_chunk_size", None)
    return losses.num_chunks(tokens, size or losses.DEFAULT_CHUNK_SIZE)

  def lower(self, phase: str) -> tuple[jax.stages.Lowered, Any]:
    """The phase's program, and its arguments."""
    if phase == SAMPLING:
      arguments = self._state.params, self._batch, self._key
      return self._sampler.lower(*arguments), arguments
    if phase == TEACHER:
      arguments = self._teacher, self._batch
      teacher = partitioning.jit(self._model.teacher.logits, self._mesh)
      return teacher.lower(*arguments), arguments
    batch = self._batch if phase == models.DATA else self._step_batch
    arguments = self._state, self._teacher, batch
    return self._step.lower(*arguments, phase), arguments

  def _roll_out(self, lengths):
    """Outputs that a reward judges come before the step, and are its batch."""
    self._sampler = partitioning.jit(
      self._model.roll_out,
      self._mesh,
      out_shardings=partitioning.batch_sharding(self._mesh),
    )
    outputs = jax.eval_shape(
      self._model.roll_out, self._state.params, self._batch, self._key
    )
    shape = outputs["decoder_loss_weights"].shape
    self.rows = shape[0]
    judged = {
      rl_gkd.REWARDS: jax.ShapeDtypeStruct(shape[:1], jnp.float32),
      rl_gkd.ADVANTAGES: jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    self._step_batch = self._placed(outputs | judged)

  def _placed(self, batch):
    sharding = partitioning.batch_sharding(self._mesh)
    return partitioning.with_shardings(
      batch, {name: sharding for name in batch}
    )


def _compile(lowered, arguments, target, folder, name):
  """Returns the compiled program, from the folder if it is there."""
  fingerprint = program_files.fingerprint(lowered, target)
  if folder:
    found = program_files.read(folder, name, fingerprint)
    if found is not None:
      return found
  begin = time.monotonic()
  text = None
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    facts = program_report.out_of_memory_report(error, arguments)
  else:
    text = compiled.as_text()
    facts = {"memory": program_report.memory(compiled.memory_analysis())}
  facts["compile_seconds"] = round(time.monotonic() - begin, 1)
  program = program_files.Program(fingerprint, facts, text)
  if folder:
    program_files.write(folder, name, program)
  return program


def _judged(model):
  return isinstance(model, models.RLGKDModel) and model.needs_rewards


def chosen_phases(
  model: Any, phases: Sequence[str] | None, executor: str
) -> tuple[str, ...]:
  """Returns the phases to compile, by default all that the run has."""
  if executor != "jit":
    raise ValueError(
      f"expected the executor 'jit', got {executor!r}, which needs attached"
      " devices; set EXECUTOR = 'jit'"
    )
  if isinstance(model, models.StoredTeacherModel):
    raise ValueError(
      "expected a model with a teacher or SFT, got stored laws, whose number"
      " only the data know; set MODEL"
    )
  possible = tuple(_phases(model))
  unknown = [phase for phase in phases or () if phase not in possible]
  if unknown:
    raise ValueError(
      f"expected phases of {', '.join(possible)}, got {', '.join(unknown)};"
      " set --phases"
    )
  return tuple(phases or possible)


def _phases(model) -> Iterator[str]:
  """Those that a run of the model has at some step."""
  if model.teacher is None:
    yield models.DATA
    return
  fraction = model.student_data_fraction
  if isinstance(model, models.RLGKDModel):
    fraction = 1.0  # always on-policy
  if fraction != 0:
    yield SAMPLING
  yield TEACHER
  if fraction != 1:
    yield models.DATA
  if fraction != 0:
    yield models.STUDENT
  if model.student_data_granularity == "example" and fraction not in (0, 1):
    yield models.MIXED
