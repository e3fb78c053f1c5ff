"""A shallower student with the teacher's own weights: `gkd import --layers=...`."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gkd_jax.checkpoints import stored_arrays

_EVERY = re.compile(r"every:([1-9]\d*)")
_OF_LAYER = re.compile(r"(\w+)/layers_(\d+)/(.+)")


def choose(text: str, depth: int, flag: str) -> tuple[int, ...]:
  """Returns the layers that a text names.

  >>> choose("every:2", 5, "--layers")
  (0, 2, 4)

  Args:
    text: numbers from 0 with commas, or `every:N`, which begins with layer 0.
    depth: number of layers that there are.
    flag: what the text was set with, for the message.

  Raises:
    ValueError: numbers that no layer has, or that do not grow.
  """
  if every := _EVERY.fullmatch(text):
    return tuple(range(0, depth, int(every[1])))
  words = text.split(",")
  chosen = tuple(int(word) for word in words if word.isdecimal())
  grows = all(a < b for a, b in itertools.pairwise(chosen))
  if len(chosen) < len(words) or not grows or chosen[-1] >= depth:
    raise ValueError(
      f"expected growing numbers of layers below {depth}, or every:N, got"
      f" {text!r}; set {flag}"
    )
  return chosen


def keep(
  arrays: Mapping[str, stored_arrays.StoredArray],
  config: Any,
  layers: str,
  encoder_layers: str | None = None,
) -> tuple[dict[str, stored_arrays.StoredArray], Any]:
  """Returns the parameters and the configuration of some of the layers.

  Args:
    arrays: path, of an unrolled network, to array.
    config: of the network.
    layers: of each side; see `choose`.
    encoder_layers: of the encoder, if others than `layers`.

  Raises:
    ValueError: as `choose`, or there is no encoder.
  """
  if encoder_layers is not None and "encoder" not in config.depths:
    raise ValueError(
      f"expected layers of a decoder alone, got {encoder_layers!r}; set"
      " --layers without --encoder_layers"
    )
  of_sides = dict.fromkeys(config.depths, (layers, "--layers"))
  if encoder_layers is not None:
    of_sides["encoder"] = encoder_layers, "--encoder_layers"
  kept: dict[str, Sequence[int]] = {
    side: choose(text, config.depths[side], flag)
    for side, (text, flag) in of_sides.items()
  }
  result = {}
  for name, array in arrays.items():
    match = _OF_LAYER.fullmatch(name)
    if match is None:
      result[name] = array
    elif (number := int(match[2])) in kept[match[1]]:
      place = kept[match[1]].index(number)
      result[f"{match[1]}/layers_{place}/{match[3]}"] = array
  return result, config.with_layers(kept)
