"""Reads the text of a compiled HLO module into computations and instructions.

Only what counting needs: names, shapes, operands and attributes. The text is
that of `jax.stages.Compiled.as_text()`, of any backend.

Collectives of a compiled program: kind, bytes, and whether they leave a slice.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

# Bytes of an element; a type that is not here is a token or opaque, 0 bytes.
_BYTES = {
  **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
  **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
  **dict.fromkeys(("s32", "u32", "f32"), 4),
  **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
  **dict.fromkeys(("s4", "u4"), 0.5),
  "c128": 16,
}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Array:
  """An array's type, size and place.

  Attributes:
    dtype: such as "bf16".
    dims: its shape.
    on_chip: whether it lies in a memory nearer than HBM (a space above 0).
  """

  dtype: str
  dims: tuple[int, ...]
  on_chip: bool

  @property
  def bytes(self) -> int:
    """Without the padding of a tiled layout."""
    return math.ceil(math.prod(self.dims) * _BYTES.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    name: in its computation.
    opcode: such as "dot".
    arrays: of its result; several of a tuple.
    operands: their names.
    literal: what stands in the operands' place of a parameter or a constant.
    attributes: the rest of its text.
    is_root: whether it is the computation's result.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str
  is_root: bool

  def called(self, *kinds: str) -> tuple[str, ...]:
    """Names of the computations under such attributes as "body"."""
    found = []
    for kind in kinds:
      match = re.search(rf"\b{kind}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
      if match:
        found += re.findall(r"[\w.\-]+", match[1])
    return tuple(found)

  @property
  def index(self) -> int:
    """Of a get-tuple-element: which part it gets; -1 of anything else."""
    match = re.search(r"\bindex=(\d+)", self.attributes)
    return int(match[1]) if match else -1

  @property
  def trip_count(self) -> int | None:
    """Of a loop; None where only the run decides."""
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
    return int(match[1]) if match else None

  @property
  def scopes(self) -> tuple[str, ...]:
    """Returns the `jax.named_scope`s around a loop, up to the next loop."""
    match = re.search(r'op_name="([^"]*)/while"', self.attributes)
    inner = match[1].split("/while/")[-1] if match else ""
    # Differentiated, a scope s reads jvp(s) or transpose(jvp(s)).
    names = [part for part in inner.split("/") if not part.startswith("jit(")]
    return tuple(part.split("(")[-1].rstrip(")") for part in names)


@dataclasses.dataclass(frozen=True)
class Module:
  """Computations by name, each an ordered dict of instructions by name.

  Attributes:
    computations: all of them.
    entry: name of the first to run.
    devices: that run the program together.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str
  devices: int


def parse(text: str) -> Module:
  """Returns the module that `text` describes.

  Raises:
    ValueError: it holds no entry computation.
  """
  first = text[: text.find("\n")]
  devices = math.prod(
    int(n) for n in re.findall(r"num_(?:partitions|replicas)=(\d+)", first)
  )
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
      continue
    match = _INSTRUCTION.match(line)
    if match and current is not None:
      current[match[2]] = _instruction(match, line[match.end() :])
  if entry is None:
    raise ValueError(
      "expected the text of a compiled HLO module, got one without an entry"
      " computation; set another version of jax"
    )
  return Module(computations, entry, devices)


def _instruction(match, rest):
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  opening = rest.index("(", end)
  opcode = rest[end:opening].strip()
  closing = _closing(rest, opening)
  inside = rest[opening + 1 : closing]
  leaf = opcode in ("parameter", "constant")
  return Instruction(
    match[2],
    opcode,
    tuple(_array(*found) for found in _ARRAY.findall(rest[:end])),
    () if leaf else tuple(re.findall(r"%([\w.\-]+)", inside)),
    inside if leaf else "",
    rest[closing + 1 :],
    bool(match[1]),
  )


def _closing(text, opening):
  """Place of the parenthesis that closes the one at `opening`."""
  depth = 0
  for place in range(opening, len(text)):
    depth += {"(": 1, ")": -1}.get(text[place], 0)
    if depth == 0:
      return place
  raise ValueError(
    f"expected closed parentheses in HLO text, got {text[:80]!r};"
    " set another version of jax"
  )


def _array(dtype, dims, layout):
  sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
  space = re.search(r"S\((\d+)\)", layout)
  return Array(dtype, sizes, bool(space and space[1] != "0"))


COLLECTIVE_KINDS = (
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


def collectives_of(
  instruction: Instruction,
  computation: Mapping[str, Instruction],
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
  if kind not in COLLECTIVE_KINDS:
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
