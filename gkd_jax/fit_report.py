"""What `gkd fit` found, as text."""

import shlex
from collections.abc import Mapping
from typing import Any

_GIB = 2**30

HEADER = (
  "model axis  split over data  microbatches    remat  GiB at peak  ms at least"
)


def line(row: Mapping[str, Any]) -> str:
  """A line under `HEADER`.

  Args:
    row: of a candidate: its settings, whether it seems to fit, and the estimate
      or why there is none.
  """
  settings = row["settings"]
  if "seconds" in row:
    numbers = _numbers(row["peak_bytes"], row["seconds"])
  elif "held_bytes" in row:
    numbers = f"{row['held_bytes'] / _GIB:11.2f}  of arguments alone"
  else:
    numbers = f"  {row['compiler_says'][:60]}"
  return (
    f"{settings['num_partitions']:10}"
    f"  {'yes' if settings['shard_params_over_data'] else 'no':>15}"
    f"  {settings['num_microbatches']:12}  {settings['remat_policy']:>7}"
    f"  {numbers}{'' if row['fits'] else '  does not fit'}"
  )


def whole_lines(row: Mapping[str, Any]) -> list[str]:
  """A candidate that was compiled whole, beside its estimate.

  Args:
    row: see `line`, with the `report` of the whole program.
  """
  report = row["report"]
  memory = report["memory"]
  lines = [f"compiled whole, {shlex.join(row['flags'])}:"]
  columns = f"{'':12}{'GiB at peak':>11}  {'ms at least':>11}"
  estimate = _numbers(row["peak_bytes"], row["seconds"])
  lines += [columns, f"  {'estimated':10}{estimate}"]
  if "peak" in memory:
    found = _numbers(memory["peak"], report["roofline"]["seconds"])
    lines.append(f"  {'whole':10}{found}")
  else:
    lines.append(f"  {'whole':10}  {report['compiler_says'][:60]}")
  return lines


def lines(result: Mapping[str, Any]) -> list[str]:
  """All that `gkd fit` prints below its first line, but reports of programs.

  Args:
    result: see `fit.fit`.
  """
  rows = result["candidates"]
  found = [HEADER, *map(line, rows)]
  for row in rows:
    if "report" in row:
      found += whole_lines(row)
  return [*found, choice(result["best"])]


def choice(best: Mapping[str, Any] | None) -> str:
  """The last line: the settings of the fastest that fits."""
  if best is None:
    return "nothing fits"
  return "fits: " + shlex.join(best["flags"])


def _numbers(peak, seconds):
  return f"{peak / _GIB:11.2f}  {seconds * 1e3:11.2f}"
