"""Devices to compile for, attached or not, and the published rates of TPU chips.

Sources: the page of Cloud TPU's documentation named at each chip. Usable HBM is
the least that TPU compilers (libtpu 0.0.42, 0.0.52) name in their error for a
program that needs more. All rates are of one chip.
"""

import contextlib
import dataclasses
import fnmatch
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip's published rates and memory.

  Attributes:
    name: as in a topology, such as "v5e".
    peak_flops: bfloat16 operations per second of the matrix units.
    hbm_bytes: HBM that a program may use: the capacity without what the
      runtime reserves.
    hbm_bandwidth: bytes per second between HBM and the core.
    ici_bandwidth: bytes per second that it sends to its neighbours over all of
      its links, in one direction: half of the published bidirectional rate.
    dcn_bandwidth: bytes per second of its share of its host's network, which
      joins slices; None if no rate is published.
  """

  name: str
  peak_flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float | None = None

  def seconds(
    self, flops: float, hbm_bytes: float, sent_bytes: float, dcn_bytes: float
  ) -> tuple[float, float, float, float]:
    """Returns how long arithmetic, HBM, links and DCN take at least, each alone."""
    return (
      flops / self.peak_flops,
      hbm_bytes / self.hbm_bandwidth,
      sent_bytes / self.ici_bandwidth,
      dcn_bytes / (self.dcn_bandwidth or math.inf),
    )


CHIPS = {
  chip.name: chip
  for chip in (
    # cloud.google.com/tpu/docs/v4: 275 teraflops, 32 GiB, 1200 GBps. The links
    # are six of 50 GB/s each way (Jouppi et al. 2023, arXiv 2304.01433).
    Chip("v4", 275e12, int(30.75 * GIB), 1200e9, 300e9),
    # cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GBps, 400 GBps
    # bidirectional (1600 Gbps in earlier versions of the page); data center
    # network 6.4 Tbps per Pod of 256 chips.
    Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 200e9, 6.4e12 / 8 / 256),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GiB, 2765 GBps, 1200 GBps
    # bidirectional (4800 Gbps in earlier versions); data center network 50 Gbps
    # per chip.
    Chip("v5p", 459e12, int(95.73 * GIB), 2765e9, 600e9, 50e9 / 8),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB, 1638 GBps, 800 GBps
    # bidirectional.
    Chip("v6e", 918e12, int(31.24 * GIB), 1638e9, 400e9),
  )
}
# Without these, libtpu asks a metadata server, which only TPU machines have.
_NOT_ON_A_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5e-4",  # any; the name of the topology decides
  # Only its compiler is used, which several processes can load.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Otherwise a v4 chip counts as two devices, one for each core.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


def devices(topology: str | None) -> tuple[list[Any], Chip | None]:
  """Returns the devices of a topology, and their chip.

  Call it before JAX looks for devices.

  Args:
    topology: chip and shape, such as "v5e:4x4" or "v5p:4x4x4"; "2xv5e:4x4" for
      two slices of it; "cpu:8" for eight devices of this machine's CPU; None for
      the attached devices.

  Returns:
    The devices, and the chip, or None if its rates are not known here.

  Raises:
    ValueError: no such chip or shape, too few devices, or no TPU compiler.
  """
  if topology is None:
    return list(jax.devices()), None
  names = "|".join(("cpu", *CHIPS))
  match = re.fullmatch(rf"(?:([1-9]\d*)x)?({names}):(\d+(?:x\d+)*)", topology)
  if not match or (match[1] and match[2] == "cpu"):
    raise ValueError(
      "expected a topology such as v5e:4x4 or, of two slices, 2xv5e:4x4, of a"
      f" chip of {', '.join(CHIPS)}, or cpu:8 (with NUM_SLICES = 2 for two),"
      f" got {topology!r}; set --topology"
    )
  # Attached devices are not used, nor taken from others that use them.
  jax.config.update("jax_platforms", "cpu")
  number, chip = int(match[1] or 1), match[2]
  shape = [int(n) for n in match[3].split("x")]
  if chip == "cpu":
    return _of_this_machine(math.prod(shape)), None
  return _of_libtpu(chip, match[3], shape, number), CHIPS[chip]


def _of_this_machine(number):
  # If JAX has its devices already, there may be enough.
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", number)
  found = jax.devices("cpu")
  if len(found) < number:
    raise ValueError(
      f"expected {number} CPU devices, got {len(found)}; set --topology, or"
      f" XLA_FLAGS=--xla_force_host_platform_device_count={number}"
    )
  return found[:number]


def wrong_libtpu() -> str | None:
  """Returns the sentence about a libtpu that JAX was not made for, or None."""
  try:
    found = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    return None  # part of the machine, or none
  pinned = _pinned_libtpu()
  if pinned is None or fnmatch.fnmatchcase(found, pinned):
    return None
  return (
    f"expected libtpu {pinned}, which jax {jax.__version__} pins, got {found};"
    f" run `pip install 'libtpu=={pinned}'`"
  )


def _pinned_libtpu():
  """Returns the version of libtpu that JAX's own extra asks for, or None."""
  for requirement in importlib.metadata.requires("jax") or ():
    if match := re.match(r"libtpu\s*==\s*([\w.*]+)", requirement):
      return match[1]
  return None


def _of_libtpu(chip, sides, shape, number):
  if importlib.util.find_spec("libtpu") is None:
    pinned = _pinned_libtpu()
    which = f", which installs libtpu=={pinned}" if pinned else ""
    raise ValueError(
      "expected the package libtpu, which holds the TPU compiler, got none;"
      f" run `pip install 'gkd_jax[tpu]'`{which}"
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
