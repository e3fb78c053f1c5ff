"""Searches the fastest mesh and settings with which a run's step fits.

Candidates are ranked by costs that are extrapolated from shallow models, compiled
with little effort. The best few are compiled whole, as they would run; the fastest
of these that fits is the answer.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from gkd_jax import files, models, optimizers, partitioning, training
from gkd_jax.planning import (
  depths,
  precompile,
  program_files,
  program_report,
  topologies,
)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """What is searched; named as the settings are.

  Attributes:
    num_partitions: the mesh's model axis; its data axis is the other devices.
    shard_params_over_data: whether parameters are split over the data axis too.
    num_microbatches: parts of a batch.
    remat_policy: of the student's network.
  """

  num_partitions: int
  shard_params_over_data: bool
  num_microbatches: int = 1
  remat_policy: str = "none"

  @property
  def partitioner(self) -> dict[str, Any]:
    """Fields of `training.PartitionerConfig`."""
    fields = dataclasses.asdict(self)
    del fields["remat_policy"]
    return fields

  @property
  def name(self) -> str:
    """For a file."""
    return "-".join(str(v) for v in dataclasses.astuple(self)).lower()


def fit(
  model: Any,
  optimizer: optimizers.Optimizer,
  *,
  devices: Sequence[Any],
  chip: topologies.Chip | None,
  topology: str,
  dataset: training.DatasetConfig,
  partitioner: training.PartitionerConfig = training.PartitionerConfig(),
  seed: int = 0,
  model_axis: Sequence[int] | None = None,
  compiled_whole: int = 3,
  output_path: str | None = None,
  about: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Prints a table of candidates, and the settings of the fastest that fits.

  The step is the one on the student's outputs where the run has it, and that on
  the data where it does not. More microbatches, or rematerialisation, are tried
  where nothing fits without.

  Args:
    model: see `precompile.precompile`, as all that is not named here.
    optimizer: see there.
    devices: see there.
    chip: whose memory is to suffice and whose rates rank.
    topology: see there.
    dataset: see there.
    partitioner: with the executor "jit"; model axis, parameters sharded over
      data and microbatches are searched.
    seed: see there.
    model_axis: its sizes to try; None for all with which a batch's rows fill the
      data axis.
    compiled_whole: how many that fit are compiled whole.
    output_path: folder for `fit.json` and the compiled programs; a search that
      was cut off goes on there.
    about: see there.

  Returns:
    `{"topology", ..., "candidates": [...], "best": {...} or None}`.

  Raises:
    ValueError: the chip is not known, or no mesh has such a model axis.
  """
  if chip is None:
    raise ValueError(
      "expected a topology of a chip whose rates are known, got"
      f" {topology!r}; set --topology={next(iter(topologies.CHIPS))}:2x2 or the like"
    )
  possible = precompile.chosen_phases(model, None, partitioner.executor)
  phase = models.STUDENT if models.STUDENT in possible else models.DATA
  batch_size = dataset.batch_size
  slices = partitioning.make_mesh(1, devices, partitioner.num_slices).shape.get(
    partitioning.SLICE_AXIS, 1
  )
  tried = list(meshes(len(devices), batch_size, model_axis, slices))

  def programs(model, candidate):
    return precompile.Programs(
      model,
      optimizer,
      dataset,
      dataclasses.replace(partitioner, **candidate.partitioner),
      seed=seed,
      devices=devices,
    )

  search = _Search(model, programs, chip, topology, phase, output_path)
  print(
    f"{topology}: {len(devices)} devices, batch {batch_size}, lengths"
    f" {dict(dataset.task_feature_lengths)}, {precompile.TITLES[phase]}\n{program_report.FIT_HEADER}",
    flush=True,
  )
  rows = list(search.rows(tried, len(devices), batch_size))
  best = search.confirm(rows, compiled_whole)
  print(program_report.choice(best))
  result = {
    **(about or {}),
    "versions": program_files.versions(),
    "topology": topology,
    "devices": len(devices),
    "batch_size": batch_size,
    "task_feature_lengths": dict(dataset.task_feature_lengths),
    "phase": phase,
    "hbm_bytes": chip.hbm_bytes,
    "candidates": rows,
    "best": best,
  }
  if output_path:
    files.write_json(os.path.join(output_path, "fit.json"), result)
  return result


def meshes(
  number: int,
  batch_size: int,
  model_axis: Sequence[int] | None = None,
  slices: int = 1,
) -> Iterator[Candidate]:
  """Candidates for a number of devices that fill a batch's rows, simplest first.

  Args:
    number: of devices.
    batch_size: rows of a batch.
    model_axis: its sizes to try; None for all that are possible.
    slices: that the devices are in; the model axis stays within one.

  Raises:
    ValueError: a size that is not possible.
  """
  possible = [
    size
    for size in range(1, number // slices + 1)
    if number // slices % size == 0 and batch_size % (number // size) == 0
  ]
  wrong = [size for size in model_axis or () if size not in possible]
  if wrong:
    raise ValueError(
      f"expected sizes of the model axis of {possible}, which divide the"
      f" {number} devices and leave a data axis that divides the batch's"
      f" {batch_size} rows, got {wrong}; set --model_axis"
    )
  for partitions in model_axis or possible:
    data = number // slices // partitions
    for split in (False, True) if data > 1 else (False,):
      yield Candidate(partitions, split)


def savers(candidate: Candidate, rows: int) -> Iterator[list[Candidate]]:
  """A candidate as it is, then with ever less memory and ever more work.

  Args:
    candidate: with one microbatch and no rematerialisation.
    rows: of a batch, on each part of the data axis.
  """
  yield [candidate]
  changed = functools.partial(dataclasses.replace, candidate)
  parts = 1
  while parts <= rows:
    level = [changed(num_microbatches=parts, remat_policy="minimal")]
    if 2 * parts <= rows and rows % (2 * parts) == 0:
      level.append(changed(num_microbatches=2 * parts))
    yield level
    yield [changed(num_microbatches=parts, remat_policy="full")]
    parts *= 2
    if rows % parts:
      return


class _Search:
  """Candidates' costs, and the choice."""

  def __init__(self, model, programs, chip, topology, phase, folder):
    self._model, self._programs, self._chip = model, programs, chip
    self._topology, self._phase, self._folder = topology, phase, folder

  def rows(self, tried, number, batch_size):
    """For each mesh the candidates up to the first that seem to fit."""
    for mesh in tried:
      if self._held(mesh) > self._chip.hbm_bytes:
        # Of arguments; nothing but the mesh and the split changes them.
        yield self._row(mesh, {"held_bytes": self._held(mesh), "fits": False})
        continue
      data = number // mesh.num_partitions
      for level in savers(mesh, batch_size // data):
        rows = [self._estimated(candidate) for candidate in level]
        yield from rows
        if any(row["fits"] for row in rows):
          break

  def confirm(self, rows, number):
    """The fastest of the first that fit when compiled whole, or None if none do."""
    likely = sorted(
      (row for row in rows if row["fits"]), key=lambda row: row["seconds"]
    )
    found = []
    for row in likely:
      candidate = Candidate(**row["settings"])
      report = self._programs(self._of(candidate), candidate).report(
        self._phase,
        self._chip,
        self._topology,
        self._folder,
        f"{candidate.name}-whole",
      )
      row["report"] = report
      text = program_report.lines(precompile.TITLES[self._phase], report)
      print("\n".join(program_report.whole_lines(row) + text), flush=True)
      if report["fits"]:
        found.append(row)
      if len(found) == number:
        break
    return min(
      found,
      key=lambda row: row["report"]["roofline"]["seconds"],
      default=None,
    )

  def _of(self, candidate):
    return depths.changed(
      self._model,
      {("student", "remat_policy"): candidate.remat_policy},
    )

  def _held(self, candidate):
    return self._programs(self._of(candidate), candidate).held_bytes

  def _estimated(self, candidate):
    def report(shallow, name):
      return self._programs(shallow, candidate).report(
        self._phase,
        self._chip,
        self._topology,
        self._folder,
        f"{candidate.name}-{name}",
      )

    try:
      with _little_effort():
        costs = depths.estimate(self._of(candidate), report)
    except MemoryError as error:
      return self._row(candidate, {"compiler_says": str(error), "fits": False})
    return self._row(
      candidate,
      {
        "peak_bytes": costs["peak"],
        "seconds": depths.seconds(costs, self._chip),
        "fits": costs["peak"] <= self._chip.hbm_bytes,
        "costs": costs,
      },
    )

  def _row(self, candidate, found):
    row = {
      "settings": dataclasses.asdict(candidate),
      "flags": self._flags(candidate),
      **found,
    }
    print(program_report.fit_line(row), flush=True)
    return row

  def _flags(self, candidate):
    config = self._model.student.config
    module = type(config).__module__.rpartition(".")[2]
    name = f"{module}.{type(config).__name__}.remat_policy"
    return [
      f"--gin.NUM_PARTITIONS={candidate.num_partitions}",
      f"--gin.NUM_MICROBATCHES={candidate.num_microbatches}",
      f"--gin.SHARD_PARAMS_OVER_DATA={candidate.shard_params_over_data}",
      # Of the teacher as well, which has no backward pass.
      f'--gin.{name}="{candidate.remat_policy}"',
    ]


@contextlib.contextmanager
def _little_effort():
  """Compiles in less time; the programs hold and do much the same.

  Only the search for memory is cut short. Of the optimizations all are needed:
  with fewer of them, libtpu 0.0.52 gathers weights split over data in float32,
  before they are rounded to bfloat16, and sends and holds twice the bytes.
  """
  before = jax.config.jax_memory_fitting_level
  jax.config.update("jax_memory_fitting_level", "O1")
  try:
    yield
  finally:
    jax.config.update("jax_memory_fitting_level", before)
