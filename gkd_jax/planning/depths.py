"""Estimates a deep model's costs from those of shallow ones.

Memory and work of a program are nearly affine in the number of layers, which are
all alike. From models with 1 and 2 layers the costs of any depth follow, in a
fraction of the time of its compilation. A network with scanned layers compiles as
fast whole and is not changed.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gkd_jax.network import layer_loops
from gkd_jax.planning import hlo, topologies

_DEPTHS = ("num_encoder_layers", "num_decoder_layers", "num_layers")
_RESOURCES = ("flops", "hbm_bytes", "sent_bytes", "dcn_bytes")
# A side ("student" or "teacher"), and a field of its configuration.
Field = tuple[str, str]


def of(model: Any) -> dict[Field, int]:
  """Returns the depths of a model's student, and of its teacher if it has one."""
  return {
    (side, name): getattr(network.config, name)
    for side in ("student", "teacher")
    if (network := getattr(model, side)) is not None
    for name in _DEPTHS
    if hasattr(network.config, name)
  }


def changed(model: Any, changes: Mapping[Field, Any]) -> Any:
  """Returns a copy of a model with changed configurations of its networks.

  Args:
    model: `GKDModel`, or a network's model for SFT.
    changes: field to value.
  """
  new = copy.copy(model)
  for side in ("student", "teacher"):
    fields = {
      name: value for (of, name), value in changes.items() if of == side
    }
    if not fields:
      continue
    network = new if new.student is new else copy.copy(getattr(new, side))
    config = dataclasses.replace(network.config, **fields)
    network.module = network.module.clone(config=config)
    if network is not new:
      setattr(new, side, network)
  return new


def estimate(
  model: Any,
  report: Callable[[Any, str], dict[str, Any]],
  depths: tuple[int, int] = (1, 2),
) -> dict[str, float]:
  """Extrapolates the costs of a program.

  Depths of a network that are equal, as those of a T5's encoder and decoder
  mostly are, grow together: a T5 and its teacher take three compilations.

  Args:
    model: the deep model.
    report: takes a shallow model and a name for it; see
      `precompile.Programs.report`.
    depths: the two that are compiled in place of greater ones.

  Returns:
    Name to number, see `costs`.

  Raises:
    MemoryError: a shallow model does not even compile.
  """
  low, high = depths
  deep = {
    field: depth
    for field, depth in of(model).items()
    if depth > high
    and not layer_loops.is_scanned(getattr(model, field[0]).module)
  }
  base = {field: low for field in deep}
  groups = sorted({(side, depth) for (side, _), depth in deep.items()})
  measured = []
  for grown in (None, *groups):
    shallow = base | {
      field: high for field, depth in deep.items() if grown == (field[0], depth)
    }
    name = "-".join(map(str, shallow.values())) or "as-it-is"
    measured.append(costs(report(changed(model, shallow), name)))
  first, *others = measured
  return {
    name: value
    + sum(
      (other[name] - value) * (depth - low) / (high - low)
      for other, (_, depth) in zip(others, groups, strict=True)
    )
    for name, value in first.items()
  }


def costs(report: Mapping[str, Any]) -> dict[str, float]:
  """Returns the numbers of a report that grow with the depth.

  Args:
    report: see `precompile.Programs.report`.

  Returns:
    Bytes by kind of memory. FLOPs, bytes of HBM, bytes sent within a slice and to
    other slices: of what has a known trip count ("flops" and so on), and of loops
    that may end early, at their upper bound ("loop_flops").

  Raises:
    MemoryError: the program was too large to compile.
  """
  if "segments" not in report:
    raise MemoryError(report["compiler_says"])
  result = dict(report["memory"])
  for prefix, known in (("", True), ("loop_", False)):
    segments = [s for s in report["segments"] if s["trip_count_known"] is known]
    for name in _RESOURCES:
      result[prefix + name] = sum(s["runs"] * _of(s, name) for s in segments)
  return result


def _of(segment, name):
  if name in ("sent_bytes", "dcn_bytes"):
    return hlo.sent_bytes(segment["collectives"], name == "dcn_bytes")
  return segment[name]


def seconds(costs: Mapping[str, float], chip: topologies.Chip) -> float:
  """Returns a lower bound of a program's time, as `program_report.roofline`.

  What may end early counts as one segment, all else as another.

  Args:
    costs: see `costs`.
    chip: whose rates.
  """
  return sum(
    max(chip.seconds(*(costs[prefix + name] for name in _RESOURCES)))
    for prefix in ("", "loop_")
  )
