"""Devices to compile for, which need not be there."""

import contextlib
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from gkd_jax import chips

# Without these, libtpu asks a metadata server that only a TPU machine has.
_NOT_ON_A_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5e-4",  # any; the topology's name decides
  # A compiler alone shares nothing with others of its kind on the machine.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Else a v4 chip counts as two devices; a program of today runs on both cores.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


def devices(topology: str | None) -> tuple[list[Any], chips.Chip | None]:
  """Devices of a topology, and the chip that they are.

  Is to be called before JAX has looked for devices.

  Args:
    topology: chip and shape, such as "v5e:4x4" or "v5p:4x4x4"; "2xv5e:4x4" for
      two slices of it; "cpu:8" for eight fake devices of this machine; None for
      the devices that there are.

  Returns:
    The devices, and the chip, or None if its rates are not known here.

  Raises:
    ValueError: no such chip or shape, too few devices, or no TPU compiler.
  """
  if topology is None:
    return list(jax.devices()), None
  names = "|".join(("cpu", *chips.CHIPS))
  match = re.fullmatch(rf"(?:([1-9]\d*)x)?({names}):(\d+(?:x\d+)*)", topology)
  if not match or (match[1] and match[2] == "cpu"):
    raise ValueError(
      "expected a topology such as v5e:4x4 or, of two slices, 2xv5e:4x4, of a"
      f" chip of {', '.join(chips.CHIPS)}, or cpu:8 (with NUM_SLICES = 2 for two),"
      f" got {topology!r}; set --topology"
    )
  # What there is here is not used; nor is a TPU that others may be using.
  jax.config.update("jax_platforms", "cpu")
  number, chip = int(match[1] or 1), match[2]
  shape = [int(n) for n in match[3].split("x")]
  if chip == "cpu":
    return _of_this_machine(math.prod(shape)), None
  return _of_libtpu(chip, match[3], shape, number), chips.CHIPS[chip]


def _of_this_machine(number):
  # JAX may have its devices already; they may be enough.
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", number)
  found = jax.devices("cpu")
  if len(found) < number:
    raise ValueError(
      f"expected {number} CPU devices, got {len(found)}; set --topology, or"
      f" XLA_FLAGS=--xla_force_host_platform_device_count={number}"
    )
  return found[:number]


def _of_libtpu(chip, sides, shape, number):
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "expected the package libtpu, which holds the TPU compiler, got none;"
      " run `pip install 'gkd_jax[tpu]'`"
    )
  for name, value in _NOT_ON_A_TPU.items():
    os.environ.setdefault(name, value)
  options = dict(_OPTIONS.get(chip, {}))
  if math.prod(shape) == 1:  # by default a host has at least four chips
    options["chips_per_host_bounds"] = (1, 1, 1)
  if number > 1:
    options["num_slices"] = number
  topology = f"{chip}:{sides}"
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, **options
    )
  except jax.errors.JaxRuntimeError as error:
    if "INVALID_ARGUMENT" not in str(error):
      raise ValueError(
        f"expected libtpu to describe {topology}, got {error}; set its"
        " environment variables"
      ) from error
    raise ValueError(
      f"expected a shape that {chip} comes in, such as 2x2 (v5e, v6e) or 2x2x1"
      f" (v4, v5p), got {topology!r} ({error}); set --topology"
    ) from error
  return description.devices
