"""`gkd fit`: searches the fastest mesh and settings whose training step fits.

Candidates are ranked by costs extrapolated from shallow models, compiled with
little effort. The best few are compiled whole, as they would run; the answer is
the fastest of these that fits.
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
  """Settings to try, under their names in `train.train`.

  Attributes:
    num_partitions: size of the mesh's model axis; the rest is its data axis.
    shard_params_over_data: whether the data axis shards parameters too.
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
    """The settings as the name of a file."""
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

  The step is the one on the student's outputs if the run has it, else the one on
  the data. More microbatches and rematerialisation are tried only if nothing fits
  without.

  Args:
    model: see `precompile.precompile`, as all that is not named here.
    optimizer: see there.
    devices: see there.
    chip: whose memory limits and whose rates rank the candidates.
    topology: see there.
    dataset: see there.
    partitioner: with the executor "jit". Its model axis, sharding of parameters
      over data and number of microbatches are searched.
    seed: see there.
    model_axis: sizes to try; None for all whose data axis divides the batch.
    compiled_whole: how many that fit are compiled whole.
    output_path: folder for `fit.json` and the compiled programs; a search that
      was interrupted continues there.
    about: see there.

  Returns:
    `{"topology", ..., "candidates": [...], "best": {...} or None}`.

  Raises:
    ValueError: the chip is not known, or a size of the model axis is impossible.
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
  programs = _programs_of(optimizer, dataset, partitioner, seed, devices)
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
  """Yields candidates whose data axis divides the batch, the simplest first.

  Args:
    number: of devices.
    batch_size: rows of a batch.
    model_axis: sizes to try; None for all that are possible.
    slices: number of slices; the model axis stays within one.

  Raises:
    ValueError: a size is not possible.
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
  """Yields levels of candidates with less and less memory and more work.

  Args:
    candidate: the first level, with one microbatch and no rematerialisation.
    rows: of a batch on each shard of the data axis.
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


def _programs_of(optimizer, dataset, partitioner, seed, devices):
  """Returns a function of a model and a candidate to the run's programs."""

  def programs(model, candidate):
    return precompile.Programs(
      model,
      optimizer,
      dataset,
      dataclasses.replace(partitioner, **candidate.partitioner),
      seed=seed,
      devices=devices,
    )

  return programs


class _Search:
  """Estimates candidates and chooses one."""

  def __init__(self, model, programs, chip, topology, phase, folder):
    self._model, self._programs, self._chip = model, programs, chip
    self._topology, self._phase, self._folder = topology, phase, folder

  def rows(self, tried, number, batch_size):
    """Yields each mesh's candidates up to the first level that seems to fit."""
    for mesh in tried:
      if self._held(mesh) > self._chip.hbm_bytes:
        # The arguments depend on the mesh and the sharding alone.
        yield self._row(mesh, {"held_bytes": self._held(mesh), "fits": False})
        continue
      data = number // mesh.num_partitions
      for level in savers(mesh, batch_size // data):
        rows = [self._estimated(candidate) for candidate in level]
        yield from rows
        if any(row["fits"] for row in rows):
          break

  def confirm(self, rows, number):
    """Returns the fastest of the first `number` that fit whole, or None."""
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
    config = type(self._model.student.config)
    package, *modules = config.__module__.split(".")
    # Gin names the classes of gkd_jax by their room.
    module = modules[0] if package == "gkd_jax" else modules[-1]
    name = f"{module}.{config.__name__}.remat_policy"
    return [
      f"--gin.NUM_PARTITIONS={candidate.num_partitions}",
      f"--gin.NUM_MICROBATCHES={candidate.num_microbatches}",
      f"--gin.SHARD_PARAMS_OVER_DATA={candidate.shard_params_over_data}",
      # Binds the teacher's too, which has no backward pass.
      f'--gin.{name}="{candidate.remat_policy}"',
    ]


@contextlib.contextmanager
def _little_effort():
  """Compiles faster, to programs with nearly the same memory and work.

  Only the search for less memory is shortened. All optimizations are kept:
  without some, libtpu 0.0.52 gathers weights that the data axis shards in
  float32, before they are rounded to bfloat16, which doubles their bytes.
  """
  before = jax.config.jax_memory_fitting_level
  jax.config.update("jax_memory_fitting_level", "O1")
  try:
    yield
  finally:
    jax.config.update("jax_memory_fitting_level", before)
