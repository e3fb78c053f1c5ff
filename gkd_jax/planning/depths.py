"""A large model's costs from those of shallow ones.

Layers are alike, and so memory and work of a program are close to affine in the
number of layers: of a model with 1 layer and one with 2 the costs of any depth
follow, in a fraction of the time that its compilation takes. A network whose layers
are scanned compiles as fast whole, and is left as it is.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from gkd_jax.network import layer_loops
from gkd_jax.planning import hlo, topologies

_DEPTHS = ("num_encoder_layers", "num_decoder_layers", "num_layers")
_RESOURCES = ("flops", "hbm_bytes", "sent_bytes", "dcn_bytes")
# A side ("student" or "teacher"), and a field of its configuration.
Field = tuple[str, str]


def of(model: Any) -> dict[Field, int]:
  """The depths of a model's student, and of its teacher if it has one."""
  return {
    (side, name): getattr(network.config, name)
    for side in ("student", "teacher")
    if (network := getattr(model, side)) is not None
    for name in _DEPTHS
    if hasattr(network.config, name)
  }


def changed(model: Any, changes: Mapping[Field, Any]) -> Any:
  """A copy of a model with other values in its networks' configurations.

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
  """The costs of a program, extrapolated.

  Fields of a model that are equal, as encoder and decoder of a T5 mostly are,
  grow together, so that a T5 and its teacher take three compilations.

  Args:
    model: the whole one.
    report: of a shallow model and a name for it: see `precompile.Programs`.
    depths: what is compiled in place of greater depths, where layers are not
      scanned.

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
  """The numbers of a report that grow with the depth.

  Args:
    report: see `precompile.Programs.report`.

  Returns:
    Bytes by kind of memory; FLOPs, bytes of HBM and bytes sent within a slice and
    to others of what runs as often as the program says ("flops" and so on) and
    of the loops that may end early, at their longest ("loop_flops").

  Raises:
    MemoryError: the report is of a program that was too large to compile.
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
  """What a program takes at least: as long as its slowest resource, twice.

  As `program_report.roofline`, with what may end early as one segment and all
  else as another.

  Args:
    costs: see `costs`.
    chip: whose rates.
  """
  return sum(
    max(
      costs[f"{prefix}flops"] / chip.peak_flops,
      costs[f"{prefix}hbm_bytes"] / chip.hbm_bandwidth,
      costs[f"{prefix}sent_bytes"] / chip.ici_bandwidth,
      costs[f"{prefix}dcn_bytes"] / (chip.dcn_bandwidth or math.inf),
    )
    for prefix in ("", "loop_")
  )
