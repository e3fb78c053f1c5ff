"""What each TPU chip can do at most, as its maker publishes it.

Sources: the page of Cloud TPU's documentation named at each chip; usable HBM is
the least that TPU compilers (libtpu 0.0.42, 0.0.52) name in their error for a
program that needs more. All rates are of one chip.
"""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip's published rates and memory.

  Attributes:
    name: as in a topology, such as "v5e".
    peak_flops: bfloat16 operations per second of the matrix units.
    hbm_bytes: HBM that a program may use, the capacity less what the runtime
      keeps.
    hbm_bandwidth: bytes per second between HBM and the core.
    ici_bandwidth: bytes per second that it sends to its neighbours over all of
      its links, in one direction: half of the published bidirectional rate.
    dcn_bandwidth: bytes per second of its share of its host's network, over
      which slices are joined; None where its page names none.
  """

  name: str
  peak_flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float | None = None


CHIPS = {
  chip.name: chip
  for chip in (
    # cloud.google.com/tpu/docs/v4: 275 teraflops, 32 GiB, 1200 GBps. The links
    # are six of 50 GB/s each way (Jouppi et al. 2023, arXiv 2304.01433).
    Chip("v4", 275e12, int(30.75 * _GIB), 1200e9, 300e9),
    # cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GBps, 400 GBps
    # bidirectional (1600 Gbps in earlier versions of the page); data center
    # network 6.4 Tbps per Pod of 256 chips.
    Chip("v5e", 197e12, int(15.75 * _GIB), 819e9, 200e9, 6.4e12 / 8 / 256),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GiB, 2765 GBps, 1200 GBps
    # bidirectional (4800 Gbps in earlier versions); data center network 50 Gbps
    # per chip.
    Chip("v5p", 459e12, int(95.73 * _GIB), 2765e9, 600e9, 50e9 / 8),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB, 1638 GBps, 800 GBps
    # bidirectional.
    Chip("v6e", 918e12, int(31.24 * _GIB), 1638e9, 400e9),
  )
}
