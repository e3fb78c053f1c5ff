"""Arrays of single layers, and stacks of them, as a checkpoint's names tell them.

A checkpoint is read under the names of an unrolled network, one array for each
layer: `import_t5x.split_scanned` takes stacks apart. A scanned network (see
`layer_loops`) has them joined again, when they are read.
"""

import re
from collections.abc import Collection, Mapping

import numpy as np

from gkd_jax import layer_loops, stored_arrays

_LAYER = re.compile(rf"(.+)/{layer_loops.NAME}_(\d+)/(.+)")


def place(name: str, names: Collection[str]) -> str:
  """The stack that a layer's array belongs to; any other's own name.

  Args:
    name: path, of an unrolled network.
    names: paths that the network has.
  """
  match = _LAYER.fullmatch(name)
  stack = match and f"{match[1]}/{layer_loops.NAME}/{match[3]}"
  return stack if stack in names else name


def joined(
  flat: Mapping[str, stored_arrays.StoredArray], names: Collection[str]
) -> dict[str, stored_arrays.StoredArray]:
  """Joins the layers' arrays where a network has stacks; others stay.

  So do layers that make no stack, since one is missing or has another shape.

  Args:
    flat: path, of an unrolled network, to array.
    names: paths that the network has.
  """
  result, stacks = {}, {}
  for name, array in flat.items():
    match, stack = _LAYER.fullmatch(name), place(name, names)
    if match and stack != name:
      stacks.setdefault(stack, {})[int(match[2])] = name
    else:
      result[name] = array
  for stack, layers in stacks.items():
    arrays = {name: flat[name] for _, name in sorted(layers.items())}
    alike = len({array.shape for array in arrays.values()}) == 1
    if alike and sorted(layers) == list(range(len(layers))):
      result[stack] = _stack(list(arrays.values()))
    else:
      result |= arrays
  return result


def _stack(layers) -> stored_arrays.StoredArray:
  """Layers along a first axis; a part of it reads those layers alone."""

  def fetch(index):
    return np.stack([layer.fetch(index[1:]) for layer in layers[index[0]]])

  return stored_arrays.StoredArray(
    (len(layers), *layers[0].shape), layers[0].dtype, fetch
  )
