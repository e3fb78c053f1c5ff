"""`gkd precompile`: compiles a run's programs for devices, attached or not.

The programs are those of `train.train`: the sampler, the teacher, and the step.
Parameters, optimizer state and batch are abstract; neither data nor checkpoints
are read.
"""

import os
import time
from collections.abc import Mapping, Sequence
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
  training,
  types,
)
from gkd_jax.partitioning import meshes
from gkd_jax.planning import program_files, program_report, topologies

SAMPLING, TEACHER = "sampling", "teacher"
# The phases and their titles.
TITLES = {
  SAMPLING: "sampling by the student alone",
  TEACHER: "teacher alone, to logits",
  models.DATA: "training step on the data",
  models.STUDENT: "training step on the student's outputs",
  models.MIXED: "training step on either, row by row",
}
# Arguments of `train.train` that the programs depend on.
SETTINGS = ("model", "optimizer", "dataset", "partitioner", "seed")


def precompile(
  model: Any,
  optimizer: optimizers.Optimizer,
  *,
  devices: Sequence[Any],
  chip: topologies.Chip | None,
  topology: str,
  dataset: training.DatasetConfig,
  partitioner: training.PartitionerConfig = training.PartitionerConfig(),
  seed: int = 0,
  phases: Sequence[str] | None = None,
  output_path: str | None = None,
  about: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Compiles each phase, and prints and returns what it needs.

  Sampling and teacher hold only what they read. The training steps show whether
  a run fits: their arguments are all that the run keeps on its devices.

  Args:
    model: see `train.train`.
    optimizer: see there.
    devices: to compile for, from `topologies.devices`.
    chip: of the devices; None for no roofline.
    topology: name of the devices, for the report.
    dataset: its lengths and batch size are used.
    partitioner: with the executor "jit".
    seed: see there.
    phases: some of `TITLES`; by default those that the model has.
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
  chosen = chosen_phases(model, phases, partitioner.executor)
  programs = Programs(
    model, optimizer, dataset, partitioner, seed=seed, devices=devices
  )
  mesh, lengths = dict(programs.mesh.shape), dict(dataset.task_feature_lengths)
  result = {
    **(about or {}),
    "versions": program_files.versions(),
    "topology": topology,
    "mesh": mesh,
    "batch_size": dataset.batch_size,
    "task_feature_lengths": lengths,
    "num_microbatches": partitioner.num_microbatches,
    "shard_params_over_data": partitioner.shard_params_over_data,
    "hbm_bytes": chip.hbm_bytes if chip else None,
    "phases": {},
  }
  print(
    f"{topology}: {len(devices)} devices as {mesh}, batch"
    f" {dataset.batch_size}, lengths {lengths}",
    *_remarks(model, mesh, chip),
    sep="\n",
    flush=True,
  )
  for phase in chosen:
    print(f"compiling: {TITLES[phase]} ...", flush=True)
    report = programs.report(phase, chip, topology, output_path)
    result["phases"][phase] = report
    lines = program_report.lines(TITLES[phase], report)
    if phase in model.sources:
      lines += program_report.remedy(report, model.config.remat_policy)
    print("\n".join(lines), flush=True)
    if output_path:
      files.write_json(os.path.join(output_path, "precompile.json"), result)
  for line in program_report.step_lines(model, result["phases"]):
    print(line, flush=True)
  return result


def _remarks(model, mesh, chip):
  """Yields what may be wrong, or costs more than it has to."""
  if chip is not None and (wrong := topologies.wrong_libtpu()):
    yield f"note: {wrong}"
  parts = mesh[partitioning.MODEL_AXIS]
  for name in ("student", "teacher"):
    of = getattr(model, name)
    heads = of.config.num_heads if of is not None else parts
    if heads % parts:
      yield (
        f"note: the model axis of {parts} does not divide the {name}'s {heads}"
        f" heads: each device keeps and computes all {heads} in attention, or"
        f" exchanges parts of them, in place of {heads / parts:.3g}; set"
        " NUM_PARTITIONS to a divisor"
      )


class Programs:
  """The programs of a run, lowered for abstract arrays.

  Arguments are those of `precompile`.
  """

  def __init__(
    self,
    model: Any,
    optimizer: optimizers.Optimizer,
    dataset: training.DatasetConfig,
    partitioner: training.PartitionerConfig,
    *,
    seed: int = 0,
    devices: Sequence[Any] | None = None,
  ):
    self._model = model
    self._run = training.build(
      model, optimizer, dataset, partitioner, seed=seed, devices=devices
    )
    self.mesh = self._run.mesh
    self._num_microbatches = partitioner.num_microbatches
    self._length = dataset.task_feature_lengths["targets"]
    features = data.feature_lengths(
      model.FEATURE_CONVERTER_CLS, dataset.task_feature_lengths, dataset.pack
    )
    self._batch = self._placed(
      {
        name: jax.ShapeDtypeStruct((dataset.batch_size, length), jnp.int32)
        for name, length in features.items()
      }
    )
    self._key = jax.eval_shape(lambda: jax.random.key(0))
    self.rows = dataset.batch_size
    self._step_batch = self._batch
    if model.needs_rewards:
      self._judge()

  def report(
    self,
    phase: str,
    chip: topologies.Chip | None,
    topology: str,
    folder: str | None = None,
  ) -> dict[str, Any]:
    """Compiles a phase, unless the folder has its program, and counts.

    Returns:
      See `program_report.report`, with `memory` and `compile_seconds`.
    """
    # The text of a program does not contain the order of its devices.
    order = ",".join(str(device.id) for device in self.mesh.devices.flat)
    target = f"{topology} {order}"
    program = _compile(*self.lower(phase), target, folder, phase)
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
    _, shards = meshes.rows(self.mesh.shape)
    tokens = self.rows * self._length // (self._num_microbatches * shards)
    size = getattr(self._model, "loss_chunk_size", None)
    return losses.num_chunks(tokens, size or losses.DEFAULT_CHUNK_SIZE)

  def lower(self, phase: str) -> tuple[jax.stages.Lowered, Any]:
    """Lowers a phase's program; returns it with its arguments."""
    run = self._run
    if phase == SAMPLING:
      arguments = run.state.params, self._batch, self._key
      return self._sampler().lower(*arguments), arguments
    if phase == TEACHER:
      arguments = run.teacher, self._batch
      teacher = partitioning.jit(self._model.teacher.logits, self.mesh)
      return teacher.lower(*arguments), arguments
    batch = self._batch if phase == models.DATA else self._step_batch
    arguments = run.state, run.teacher, batch
    return run.step.lower(*arguments, source=phase), arguments

  def _sampler(self):
    """Returns the program that samples, for a reward if the model has one."""
    if not self._model.needs_rewards:
      return partitioning.jit(self._model.sample_batch, self.mesh)
    return partitioning.jit(
      self._model.roll_out,
      self.mesh,
      out_shardings=partitioning.batch_sharding(self.mesh),
    )

  def _judge(self):
    """Makes samples with their rewards the batch of the step."""
    outputs = jax.eval_shape(
      self._model.roll_out, self._run.state.params, self._batch, self._key
    )
    shape = outputs["decoder_loss_weights"].shape
    self.rows = shape[0]
    judged = {
      types.REWARDS: jax.ShapeDtypeStruct(shape[:1], jnp.float32),
      types.ADVANTAGES: jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    self._step_batch = self._placed(outputs | judged)

  def _placed(self, batch):
    sharding = partitioning.batch_sharding(self.mesh)
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
      wrong = topologies.wrong_libtpu()
      if wrong and not target.startswith("cpu"):
        reason = str(error).splitlines()[0]
        raise ValueError(f"{wrong} (its compiler failed: {reason})") from error
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


def chosen_phases(
  model: Any, phases: Sequence[str] | None, executor: str
) -> tuple[str, ...]:
  """Returns the phases to compile, by default all that the run has."""
  if executor != "jit":
    raise ValueError(
      f"expected the executor 'jit', got {executor!r}, which needs attached"
      " devices; set EXECUTOR = 'jit'"
    )
  if not model.features_have_known_shapes:
    raise ValueError(
      "expected a model with a teacher or SFT, got stored log-probs, whose"
      " number per token depends on the data; set MODEL"
    )
  possible = model.sources
  if model.teacher is not None:
    first = (TEACHER,) if possible == (models.DATA,) else (SAMPLING, TEACHER)
    possible = (*first, *possible)
  unknown = [phase for phase in phases or () if phase not in possible]
  if unknown:
    raise ValueError(
      f"expected phases of {', '.join(possible)}, got {', '.join(unknown)};"
      " set --phases"
    )
  return tuple(phases or possible)
