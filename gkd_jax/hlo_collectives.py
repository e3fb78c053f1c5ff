"""Collectives of a compiled program: kind, bytes, and whether they leave a slice."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from gkd_jax import hlo_text

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# Before the name of a collective between slices.
DCN = "dcn "


@dataclasses.dataclass
class Collective:
  """All collectives of one kind: how many run, and bytes of one device.

  Attributes:
    count: runs.
    operand_bytes: of all operands.
    sent_bytes: what the device sends at least, in a ring. Of a kind that begins
      with `DCN` to other slices, else to other chips of its own.
  """

  count: int = 0
  operand_bytes: int = 0
  sent_bytes: int = 0


def sent_bytes(collectives: Mapping[str, Any], to_slices: bool) -> int:
  """Bytes sent to other slices, or to chips of the own one.

  Args:
    collectives: kind to `Collective`, or to the same as a dictionary.
    to_slices: which.
  """
  found = {
    kind: c["sent_bytes"] if isinstance(c, dict) else c.sent_bytes
    for kind, c in collectives.items()
  }
  return sum(
    n for kind, n in found.items() if kind.startswith(DCN) == to_slices
  )


def of(
  instruction: hlo_text.Instruction,
  computation: Mapping[str, hlo_text.Instruction],
  devices: int,
) -> tuple[str, Collective] | None:
  """Kind and bytes of one collective; None of any other instruction.

  Args:
    instruction: of a compiled program.
    computation: that it is in.
    devices: that run the program together.
  """
  kind, slices = instruction.opcode.removesuffix("-start"), None
  if kind == "send":
    # A TPU program hands what goes to other slices to its host.
    kind, slices = _between_slices(instruction)
  if kind not in KINDS:
    return None
  operand = sum(
    a.bytes for name in instruction.operands for a in computation[name].arrays
  )
  sent = operand
  if kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
    # A ring passes each part on n - 1 times; an all-reduce goes around twice.
    n = slices or _group_size(instruction, devices)
    times = {"all-reduce": 2 * (n - 1), "all-gather": n * (n - 1)}
    sent = times.get(kind, n - 1) * operand // n
  return (DCN if slices else "") + kind, Collective(1, operand, sent)


def _between_slices(send):
  """Kind and number of slices of a collective of the Megascale runtime."""
  text = send.attributes
  kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', text)
  slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', text)
  if kind is None or slices is None:
    return "send", None
  return kind[1].lower().replace("_", "-"), slices[1].count(",") + 1


def _group_size(instruction, devices):
  """Devices that take part in one group of a collective."""
  text = instruction.attributes
  match = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
  if match:
    return len(match[1].split(","))
  match = re.search(r"replica_groups=\[([\d,]+)\]<=", text)
  if match:
    return int(match[1].split(",")[-1])
  if re.search(r"replica_groups=\{\}", text):
    return devices
  # mesh['a'=2,'b'=4], perhaps device_ids=(...), then the axes {'a'}, or a part
  # of an axis, 'b':(1)2, of the size after the parentheses.
  match = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
  if match:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
    used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sizes[axis]) for axis, part in used)
  raise ValueError(
    f"expected replica_groups of {instruction.name!r} in a known form, got"
    f" {text[:120]!r}; set another version of jax"
  )
