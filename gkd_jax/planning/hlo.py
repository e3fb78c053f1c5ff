"""Parses the text of compiled HLO modules: what counting needs, and no more.

The text is `jax.stages.Compiled.as_text()`, of any backend. Read from it are
names, shapes, operands and attributes of instructions, and of collectives the
kind, the bytes and whether they leave a slice.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

# Bytes of an element. Other types are tokens or opaque and take 0 bytes.
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
  """Type, shape and memory of an array.

  Attributes:
    dtype: such as "bf16".
    dims: its shape.
    on_chip: whether it is in a memory nearer than HBM (a space above 0).
  """

  dtype: str
  dims: tuple[int, ...]
  on_chip: bool

  @property
  def bytes(self) -> int:
    """Size without the padding of a tiled layout."""
    return math.ceil(math.prod(self.dims) * _BYTES.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation.

  Attributes:
    name: unique in its computation.
    opcode: such as "dot".
    arrays: of its result; several if it is a tuple.
    operands: their names.
    literal: number of a parameter, or value of a constant; else "".
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
    """Returns the computations that attributes such as "body" name."""
    found = []
    for kind in kinds:
      match = re.search(rf"\b{kind}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
      if match:
        found += re.findall(r"[\w.\-]+", match[1])
    return tuple(found)

  @property
  def index(self) -> int:
    """Which part a get-tuple-element gets; -1 for other instructions."""
    match = re.search(r"\bindex=(\d+)", self.attributes)
    return int(match[1]) if match else -1

  @property
  def trip_count(self) -> int | None:
    """Trip count of a loop; None if it is known only at run time."""
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
    return int(match[1]) if match else None

  @property
  def scopes(self) -> tuple[str, ...]:
    """The `jax.named_scope`s around a loop, up to the next loop."""
    match = re.search(r'op_name="([^"]*)/while"', self.attributes)
    inner = match[1].split("/while/")[-1] if match else ""
    # Differentiated, a scope s reads jvp(s) or transpose(jvp(s)).
    names = [part for part in inner.split("/") if not part.startswith("jit(")]
    return tuple(part.split("(")[-1].rstrip(")") for part in names)


@dataclasses.dataclass(frozen=True)
class Module:
  """A parsed program.

  Attributes:
    computations: by name; each maps names to instructions, in order.
    entry: name of the computation that runs first.
    devices: number of devices that run the program together.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str
  devices: int


def parse(text: str) -> Module:
  """Parses the text of a module.

  Raises:
    ValueError: it has no entry computation.
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
  """Returns the index of the parenthesis that closes the one at `opening`."""
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
# Prefix of the kind of a collective between slices.
DCN = "dcn "


@dataclasses.dataclass
class Collective:
  """All collectives of one kind: how often they run, and bytes of one device.

  Attributes:
    count: number of runs.
    operand_bytes: of all operands.
    sent_bytes: the least that the device sends, in a ring: to other slices if
      the kind begins with `DCN`, else to other chips of its own slice.
  """

  count: int = 0
  operand_bytes: int = 0
  sent_bytes: int = 0

  def add(self, other: "Collective", runs: int = 1) -> None:
    """Adds collectives that run `runs` times."""
    self.count += runs * other.count
    self.operand_bytes += runs * other.operand_bytes
    self.sent_bytes += runs * other.sent_bytes


def sent_bytes(collectives: Mapping[str, Any], to_slices: bool) -> int:
  """Returns the bytes sent to other slices, or within the device's own slice.

  Args:
    collectives: kind to `Collective`, or to the same as a dictionary.
    to_slices: whether to count those to other slices.
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
  """Returns kind and bytes of a collective; None for other instructions.

  Args:
    instruction: of a compiled program.
    computation: that contains it.
    devices: number of devices that run the program together.
  """
  kind, slices = instruction.opcode.removesuffix("-start"), None
  if kind == "send":
    # A TPU program passes what goes to other slices to its host.
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
  """Returns kind and number of slices of a collective of the Megascale runtime."""
  text = send.attributes
  kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', text)
  slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', text)
  if kind is None or slices is None:
    return "send", None
  return kind[1].lower().replace("_", "-"), slices[1].count(",") + 1


def _group_size(instruction, devices):
  """Returns the number of devices in one group of a collective."""
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
