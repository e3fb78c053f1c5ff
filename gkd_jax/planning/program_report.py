"""Reports of compiled programs: memory, work and least time of one device."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gkd_jax import partitioning
from gkd_jax.planning import costs, hlo, topologies


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Lower bounds of a program's time, at the chip's published rates.

  Attributes:
    seconds: of the whole program.
    flops_seconds: of the matrix units alone.
    hbm_seconds: of reading and writing HBM alone.
    link_seconds: of sending to other chips of the slice alone.
    dcn_seconds: of sending to other slices alone; 0 if the rate is not known.
  """

  seconds: float
  flops_seconds: float
  hbm_seconds: float
  link_seconds: float
  dcn_seconds: float = 0.0


def roofline(
  segments: Sequence[costs.Segment], chip: topologies.Chip
) -> Roofline:
  """Sums over segments the time of the slowest of four resources.

  Within a segment all resources may overlap; runs of a loop's body overlap
  neither with each other nor with what comes before and after the loop. All
  links of a chip count as busy, although a mesh axis may use few of them.

  Args:
    segments: from `costs.count`.
    chip: whose rates.
  """
  times = [
    chip.seconds(
      s.runs * s.flops,
      s.runs * s.hbm_bytes,
      s.runs * s.sent_bytes,
      s.runs * s.dcn_bytes,
    )
    for s in segments
  ]
  return Roofline(sum(map(max, times)), *map(sum, zip(*times, strict=True)))


def report(
  text: str,
  memory: dict[str, int],
  chip: topologies.Chip | None,
  *,
  loop_length: int,
  output_tokens: int,
  max_trips: Mapping[str, int] | None = None,
) -> dict[str, Any]:
  """Counts one program on one device.

  Args:
    text: of the compiled program, `as_text()`.
    memory: see `memory`.
    chip: what it was compiled for; None: neither `fits` nor a roofline.
    loop_length: see `costs.count`.
    output_tokens: of all devices in one run, at full length.
    max_trips: see `costs.count`.

  Returns:
    A dictionary for JSON: `flops`, `hbm_bytes` and `collectives` (count, operand
    and sent bytes by kind) of a whole run, and of each of its `segments`;
    `roofline`, seconds; `tokens_per_second`, output tokens of all devices at
    most; `mfu`, `flops` over what the matrix units could do in that time.
  """
  segments = costs.count(text, loop_length=loop_length, max_trips=max_trips)
  flops = costs.total(segments, lambda s: s.flops)
  result = {
    "fits": None,
    "flops": flops,
    "hbm_bytes": costs.total(segments, lambda s: s.hbm_bytes),
    "collectives": {
      kind: dataclasses.asdict(c)
      for kind, c in costs.collectives(segments).items()
    },
    "segments": [dataclasses.asdict(s) for s in segments],
    "roofline": None,
    "tokens_per_second": None,
    "mfu": None,
  }
  if chip is None:
    return result
  least = roofline(segments, chip)
  return result | {
    "fits": memory["peak"] <= chip.hbm_bytes,
    "free_bytes": chip.hbm_bytes - memory["peak"],
    "roofline": dataclasses.asdict(least),
    "tokens_per_second": output_tokens / least.seconds,
    "mfu": flops / (chip.peak_flops * least.seconds),
  }


def out_of_memory_report(error: Exception, arguments: Any) -> dict[str, Any]:
  """Returns the report of a program that does not fit into memory.

  Args:
    error: the compiler's.
    arguments: of the program, abstract arrays with shardings.
  """
  match = re.search(r"RESOURCE_EXHAUSTED: ([^\n]*)", str(error))
  return {
    "fits": False,
    "memory": {"arguments": partitioning.bytes_per_device(arguments)},
    "compiler_says": match[1] if match else str(error),
  }


def memory(stats: Any) -> dict[str, int]:
  """Returns the bytes that a program takes on one device.

  Args:
    stats: `jax.stages.Compiled.memory_analysis()`.

  Returns:
    Bytes of `arguments`, `outputs`, `aliased` (outputs that reuse the memory of
    arguments), `temporaries` and `code`, and `peak`: their sum without
    `aliased`.
  """
  found = {
    "arguments": stats.argument_size_in_bytes,
    "outputs": stats.output_size_in_bytes,
    "aliased": stats.alias_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "code": stats.generated_code_size_in_bytes,
  }
  # `peak_memory_in_bytes` also counts buffers in a TPU's on-chip memory.
  return found | {"peak": sum(found.values()) - 2 * found["aliased"]}


def lines(title: str, figures: dict[str, Any]) -> list[str]:
  """Returns the report of one phase as text.

  Args:
    title: of the phase.
    figures: from `report` or `out_of_memory_report`.
  """
  memory = figures["memory"]
  result = [f"{title} (compiled in {figures['compile_seconds']:.1f} s)"]
  fits = {True: ": fits", False: ": DOES NOT FIT", None: ""}[figures["fits"]]
  parts = ", ".join(f"{name} {_size(n)}" for name, n in memory.items())
  result.append(f"  memory per device: {parts}{fits}")
  if "compiler_says" in figures:
    return [*result, f"  compiler: {figures['compiler_says']}"]
  if figures["fits"] is not None:
    result[-1] += f" with {_size(figures['free_bytes'])} to spare"
  result.append(
    f"  work per device: {_number(figures['flops'])}FLOP of matrix products,"
    f" {_size(figures['hbm_bytes'])} to and from memory"
  )
  for kind, c in figures["collectives"].items():
    result.append(
      f"  {kind}: {c['count']} times, {_size(c['operand_bytes'])} of operands,"
      f" {_size(c['sent_bytes'])} sent"
    )
  for loop in figures["segments"]:
    if not loop["trip_count_known"] and (loop["flops"] or loop["hbm_bytes"]):
      result.append(
        f"  {loop['name']} is counted {loop['runs']} times, its upper bound"
      )
  return result + _roofline_lines(figures)


def remedy(figures: Mapping[str, Any], remat_policy: str) -> list[str]:
  """Returns what may make a training step fit that does not, as text.

  Args:
    figures: from `report` or `out_of_memory_report`.
    remat_policy: of the student, see `network.T5Config`.
  """
  if figures["fits"] is not False or remat_policy == "full":
    return []
  return [
    "  it may fit with REMAT_POLICY = 'full': the backward pass then computes the"
    f" student's layers again instead of keeping them (now {remat_policy!r})"
  ]


def _roofline_lines(figures):
  least = figures["roofline"]
  if least is None:
    return ["  no roofline: the rates of these devices are not known"]
  return [
    f"  at least {least['seconds'] * 1e3:.3f} ms: arithmetic at least"
    f" {least['flops_seconds'] * 1e3:.3f}, memory at least"
    f" {least['hbm_seconds'] * 1e3:.3f}, links at least"
    f" {least['link_seconds'] * 1e3:.3f}{_of_dcn(figures)} (the latency of"
    " collectives is left out)",
    f"  at most {figures['tokens_per_second']:,.0f} output tokens/s, MFU at"
    f" most {figures['mfu']:.1%}",
  ]


def step_lines(
  model: Any, phases: Mapping[str, Mapping[str, Any]]
) -> list[str]:
  """Returns the least time of whole steps, where all of their programs have one.

  Args:
    model: see `train.train`.
    phases: phase to figures.
  """
  # A step is one program, samples and teacher included, unless a reward is
  # called between sampling and the update.
  before = ["sampling"] if model.needs_rewards else []
  seconds = {}
  for source in model.sources:
    reports = [phases.get(name, {}) for name in [*before, source]]
    if all(report.get("roofline") for report in reports):
      seconds[source] = sum(r["roofline"]["seconds"] for r in reports)
  lines = [
    f"a whole step on {source}: at least {1e3 * least:.3f} ms"
    + (", the reward left out" if before else "")
    for source, least in seconds.items()
  ]
  share = getattr(model, "student_data_fraction", None)
  if len(seconds) == 2 and isinstance(share, int | float):
    mean = (1 - share) * seconds["data"] + share * seconds["student"]
    lines.append(
      f"the mean step, at λ = {share:g}: at least {1e3 * mean:.3f} ms"
    )
  return lines


def _of_dcn(figures):
  """Returns the time of the network between slices, if it is used."""
  if not hlo.sent_bytes(figures["collectives"], True):
    return ""
  seconds = figures["roofline"]["dcn_seconds"]
  if not seconds:
    return ", DCN left out (no published rate)"
  return f", DCN at least {seconds * 1e3:.3f}"


def _size(number):
  sign = "-" if number < 0 else ""
  number = abs(number)
  if number >= topologies.GIB / 10:
    return f"{sign}{number / topologies.GIB:.2f} GiB"
  return f"{sign}{number / 2**20:.3f} MiB"


def _number(number):
  for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
    if number >= factor:
      return f"{number / factor:.2f} {prefix}"
  return f"{number} "
