"""Counts what one device does in a run of a compiled program.

XLA's own `cost_analysis` counts the body of a loop once and so misses most of a
sampler. Here a loop's body counts as often as it runs, and work is kept by
segment: what runs once, and each loop.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping

from gkd_jax.planning import hlo

Collective = hlo.Collective
# Attributes that name what runs inside an instruction. A reduction is left out:
# it applies no matrix product to its elements.
_CALLED = {
  "fusion": ("calls",),
  "async-start": ("calls",),
  "call": ("to_apply", "calls"),
}
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
# Instructions that move nothing, or whose bytes count where they are used.
_FREE = {
  *("parameter", "constant", "get-tuple-element", "tuple", "bitcast"),
  *("after-all", "partition-id", "replica-id", "opt-barrier"),
  *("optimization-barrier", "while", "conditional", "call", "async-start"),
  *("async-update", "async-done", "domain"),
}


@dataclasses.dataclass
class Segment:
  """The work of one device in one run of a part of the program.

  Attributes:
    name: "once", or the name of the loop or branch.
    runs: how often this part runs.
    trip_count_known: False for a loop that may end early, and for all inside it;
      `runs` is then an upper bound.
    flops: of matrix products and convolutions; a multiply-add counts as 2.
    hbm_bytes: read from and written to HBM.
    collectives: by kind.
  """

  name: str
  runs: int = 1
  trip_count_known: bool = True
  flops: int = 0
  hbm_bytes: int = 0
  collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)

  @property
  def sent_bytes(self) -> int:
    """Bytes that the collectives within a slice send."""
    return hlo.sent_bytes(self.collectives, False)

  @property
  def dcn_bytes(self) -> int:
    """Bytes that the collectives between slices send."""
    return hlo.sent_bytes(self.collectives, True)


def count(
  text: str,
  *,
  loop_length: int,
  max_trips: Mapping[str, int] | None = None,
) -> list[Segment]:
  """Counts a compiled program.

  `flops` leave out elementwise work, as in model-FLOPs utilisation. Bytes are
  without the padding of tiled layouts. Of a conditional's branches, such as a
  step's at several lengths, only the one with the most work counts.

  Args:
    text: `jax.stages.Compiled.as_text()`.
    loop_length: trip count of a loop that may end early: the sampler's, for
      the longest output.
    max_trips: trip counts that take the place of `loop_length`, by the
      `jax.named_scope` that the loop is in.

  Returns:
    The segment that runs once, then one for each loop and conditional.

  Raises:
    ValueError: the text has an unknown form.
  """
  module = hlo.parse(text)
  segments = [Segment("once")]
  bounds = {None: loop_length, **(max_trips or {})}
  _walk(module, module.entry, segments[0], segments, bounds, set())
  return segments


def total(segments: list[Segment], of: Callable[[Segment], int]) -> int:
  """Sums a count of the segments over the whole program."""
  return sum(s.runs * of(s) for s in segments)


def collectives(segments: list[Segment]) -> dict[str, Collective]:
  """Sums the collectives of the whole program by kind."""
  kinds = sorted({kind for s in segments for kind in s.collectives})
  result = {kind: Collective() for kind in kinds}
  for segment in segments:
    for kind, part in segment.collectives.items():
      result[kind].add(part, segment.runs)
  return result


def _walk(module, name, segment, segments, bounds, channels, *, fused=False):
  """Adds a computation's work to `segment`, that of its loops to new segments.

  `bounds` are the trip counts of loops that may end early, by scope; `channels`
  those of the collectives in fusions so far.
  """
  computation = module.computations[name]
  for instruction in computation.values():
    segment.flops += _flops(instruction, computation)
    if not (fused and _seen(instruction, channels)):
      _add_collective(segment, instruction, computation, module.devices)
    if not fused:
      segment.hbm_bytes += _hbm_bytes(instruction, computation, module)
    if instruction.opcode == "while":
      trips = _trip_count(instruction, computation, module)
      scope = next((s for s in instruction.scopes if s in bounds), None)
      loop = Segment(
        instruction.name,
        segment.runs * (bounds[scope] if trips is None else trips),
        trips is not None,
      )
      segments.append(loop)
      for part in instruction.called("condition", "body"):
        _walk(module, part, loop, segments, bounds, channels, fused=fused)
      continue
    if instruction.opcode == "conditional":
      names = instruction.called(*_BRANCHES)
      segments += _branch(module, names, segment, bounds, channels)
      continue
    inside = fused or instruction.opcode == "fusion"
    for part in instruction.called(*_CALLED.get(instruction.opcode, ())):
      _walk(module, part, segment, segments, bounds, channels, fused=inside)


def _branch(module, names, segment, bounds, channels):
  """Returns the segments of the branch with the most FLOPs, then bytes."""
  walked = []
  for name in names:
    segments = [Segment(name, segment.runs, segment.trip_count_known)]
    _walk(module, name, segments[0], segments, bounds, set(channels))
    of = lambda field, s=segments: total(s, operator.attrgetter(field))
    walked.append((of("flops"), of("hbm_bytes"), len(walked), segments))
  return max(walked)[-1]


def _seen(instruction, channels):
  """Whether a collective in a fusion is a part of one that was counted.

  TPU programs split a collective over several fusions with matrix products, also
  over those of a loop that it outlasts. All of them name its channel.
  """
  match = re.search(r"channel_id=(\d+)", instruction.attributes)
  if match is None:
    return False
  seen = match[1] in channels
  channels.add(match[1])
  return seen


def _trip_count(loop, computation, module):
  """Returns how often a loop runs, or None if not only a counter decides it.

  TPU programs do not state the trip count of the loops that overlap a matrix
  product with its collective; these count from one constant to another.
  """
  if loop.trip_count is not None:
    return loop.trip_count
  condition, body = (
    module.computations[loop.called(part)[0]] for part in ("condition", "body")
  )
  test, results = _root(condition), _root(body).operands
  initial = _made_of(computation[loop.operands[0]], computation).operands
  if test.opcode != "compare" or "direction=LT" not in test.attributes:
    return None
  counter = _made_of(condition[test.operands[0]], condition)
  if counter.opcode != "get-tuple-element" or not initial or not results:
    return None
  advance = _made_of(body[results[counter.index]], body)
  if advance.opcode != "add":
    return None
  counted, by = (_made_of(body[name], body) for name in advance.operands)
  if by.opcode != "constant":
    counted, by = by, counted
  bound = _made_of(condition[test.operands[1]], condition)
  if bound.opcode == "get-tuple-element":
    bound = _made_of(computation[initial[bound.index]], computation)
  start = _made_of(computation[initial[counter.index]], computation)
  if {start.opcode, bound.opcode, by.opcode} != {"constant"}:
    return None
  if (counted.opcode, counted.index) != (counter.opcode, counter.index):
    return None
  return -(-(int(bound.literal) - int(start.literal)) // int(by.literal))


def _shape(name, computation):
  return computation[name].arrays[0]


def _flops(instruction, computation):
  if instruction.opcode == "dot":
    lhs = _shape(instruction.operands[0], computation)
    match = re.search(
      r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes
    )
    axes = [int(a) for a in match[1].split(",") if a] if match else []
    summed = math.prod(lhs.dims[a] for a in axes)
    return 2 * math.prod(instruction.arrays[0].dims) * summed
  if instruction.opcode == "convolution":
    return _convolution_flops(instruction, computation)
  return 0


def _convolution_flops(instruction, computation):
  """Counts a convolution; TPU programs write matrix products as such."""
  lhs, rhs = (_shape(name, computation) for name in instruction.operands[:2])
  text = instruction.attributes
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
  if labels is None:
    raise ValueError(
      f"expected dim_labels of the convolution {instruction.name!r}, got"
      f" {text[:80]!r}; set another version of jax"
    )
  size = lambda label, axis, array: array.dims[labels[label].index(axis)]
  output = instruction.arrays[0]
  groups = re.search(r"batch_group_count=(\d+)", text)
  products = size(2, "i", rhs) * size(2, "o", rhs) * size(1, "b", lhs)
  products //= int(groups[1]) if groups else 1
  options = re.search(r"window=\{([^}]*)\}", text)
  window = dict(re.findall(r"(\w+)=([\w\-]+)", options[1])) if options else {}
  spatial = sorted(c for c in labels[1] if c.isdigit())
  for place, axis in enumerate(spatial):
    here = {
      name: int(values.split("x")[place].split("_")[0])
      for name, values in window.items()
    }
    products *= _window_products(
      size(1, axis, lhs),
      size(2, axis, rhs),
      size(3, axis, output),
      here.get("stride", 1),
      here.get("pad", 0),
      here.get("rhs_dilate", 1),
      here.get("lhs_dilate", 1),
    )
  return 2 * products


@functools.cache
def _window_products(inputs, window, outputs, stride, low, step, gap):
  """Counts the output and window positions that meet an input, on one axis."""
  found = 0
  for w in range(window):
    for o in range(outputs):
      place, rest = divmod(o * stride - low + w * step, gap)
      found += rest == 0 and 0 <= place < inputs
  return found


def _add_collective(segment, instruction, computation, devices):
  found = hlo.collectives_of(instruction, computation, devices)
  if found:
    kind, one = found
    segment.collectives.setdefault(kind, Collective()).add(one)


def _hbm_bytes(instruction, computation, module):
  """Returns the bytes an instruction outside of fusions moves to or from HBM."""
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith(("-done", "-update")):
    return 0
  if opcode == "fusion":
    return _fusion_bytes(instruction, computation, module)
  result = instruction.arrays
  reads = [computation[name].arrays for name in instruction.operands]
  if opcode == "copy-start":  # what it makes, the operand, a semaphore
    result = result[:1]
  elif opcode == "send":  # the operand again
    result = ()
  elif opcode.endswith("-start") and len(result) > len(reads):
    result = result[len(reads) : 2 * len(reads)]  # behind the operands
  if opcode.removesuffix("-start") in ("dynamic-slice", "slice", "gather"):
    # It reads only the part of its operand that it returns.
    reads[0] = _at(reads[0], result)
  if opcode == "dynamic-update-slice":  # in place
    result = _at(reads[0], reads[1])
    reads = reads[1:]
  return sum(map(_in_hbm, (result, *reads)))


def _at(whole, parts):
  """Returns parts of an array, in the memory of the whole array."""
  return [dataclasses.replace(a, on_chip=whole[0].on_chip) for a in parts]


def _in_hbm(arrays):
  return sum(a.bytes for a in arrays if not a.on_chip)


def _fusion_bytes(fusion, computation, module):
  """Returns `_hbm_bytes` of a fusion that may read or update slices."""
  inner = module.computations[fusion.called("calls")[0]]
  passed, kept = _passed_on(fusion, inner)
  moved = 0
  for instruction in inner.values():
    if instruction.opcode == "parameter" and instruction.name not in passed:
      outside = computation[fusion.operands[int(instruction.literal)]]
      moved += min(
        _in_hbm(outside.arrays), _bytes_read(instruction.name, inner, module)
      )
  root = _root(inner)
  parts = root.operands if root.opcode == "tuple" else (root.name,)
  if len(parts) != len(fusion.arrays):  # one instruction of several results
    return moved + _in_hbm(
      [a for i, a in enumerate(fusion.arrays) if i not in kept]
    )
  for place, (name, array) in enumerate(zip(parts, fusion.arrays, strict=True)):
    made = _made_of(inner[name], inner)
    if place in kept:
      continue
    if made.opcode == "dynamic-update-slice":  # in place
      moved += min(_in_hbm([array]), _shape(made.operands[1], inner).bytes)
    else:
      moved += _in_hbm([array])
  return moved


def _passed_on(fusion, inner):
  """Returns what a part of a split collective passes on: parameters, results.

  Its first part reads the operand and creates the result; the others only pass
  both on.
  """
  pieces = [i.name for i in inner.values() if i.opcode in hlo.COLLECTIVE_KINDS]
  text = fusion.attributes
  aliases = re.search(r"output_to_operand_aliasing=\{(.*?\{\}\))\}", text)
  if not pieces or not aliases:
    return set(), set()
  # The index of an only result is empty: {}: (1, {}).
  found = re.findall(r"\{(\d*)\}: \(\d+,", aliases[1])
  kept = {int(place or 0) for place in found}
  starts = any("AsyncCollectiveStart" in i.attributes for i in inner.values())
  if starts:
    return set(), kept
  passive = {*pieces, _root(inner).name}
  parameters = [i.name for i in inner.values() if i.opcode == "parameter"]
  users = lambda name: {i.name for i in inner.values() if name in i.operands}
  return {name for name in parameters if users(name) <= passive}, kept


def _bytes_read(name, inner, module):
  """Returns the bytes that a fusion reads of its parameter `name`."""
  read = 0
  for user in inner.values():
    if name not in user.operands:
      continue
    first_only = user.operands[0] == name and name not in user.operands[1:]
    if user.opcode == "bitcast":
      read += _bytes_read(user.name, inner, module)
    elif user.opcode == "fusion":
      deeper = module.computations[user.called("calls")[0]]
      read += sum(
        _bytes_read(i.name, deeper, module)
        for i in deeper.values()
        if i.opcode == "parameter" and user.operands[int(i.literal)] == name
      )
    elif first_only and user.opcode in ("dynamic-slice", "slice", "gather"):
      read += sum(a.bytes for a in user.arrays)
    elif not (first_only and user.opcode == "dynamic-update-slice"):
      return sum(a.bytes for a in inner[name].arrays)
  return read


def _root(computation):
  return next(i for i in computation.values() if i.is_root)


def _made_of(instruction, computation):
  """Returns the instruction that this one copies or views."""
  while instruction.opcode in ("bitcast", "copy"):
    instruction = computation[instruction.operands[0]]
  return instruction
