"""Cases of a benchmark: each in a process of its own, in turn, on one device.

On a CPU a measurement is CPU seconds on one thread and the process's peak memory;
where jax or torch sees a GPU it is wall seconds, the device waited for, and the
peak of the memory that the framework allocated on it. This module imports neither,
so that a peer's Python needs nothing of ours, and ours nothing of the peer's.
"""

import argparse
import ctypes
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Device(NamedTuple):
  """What a framework computes on.

  Attributes:
    name: as the framework calls it.
    is_cpu: CPU seconds count, and the process's memory.
    wait: called when a step has been started; returns when it is done.
    peak_bytes: most bytes allocated so far; of a GPU alone.
  """

  name: str
  is_cpu: bool
  wait: Callable[[Any], Any]
  peak_bytes: Callable[[], int]


def jax_device() -> Device:
  """jax's first device; on a CPU, one thread."""
  os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
  import jax

  device = jax.devices()[0]
  stats = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
  is_cpu = device.platform == "cpu"
  return Device(device.device_kind, is_cpu, jax.block_until_ready, stats)


def torch_device() -> Device:
  """torch's GPU, or its CPU on one thread."""
  import torch

  if torch.cuda.is_available():
    # jax's products of float32 are TF32 on a GPU.
    torch.set_float32_matmul_precision("high")
    torch.set_default_device("cuda")
    return Device(
      torch.cuda.get_device_name(),
      False,
      lambda _: torch.cuda.synchronize(),
      torch.cuda.max_memory_allocated,
    )
  torch.set_num_threads(1)
  # As XLA does; without it random T5 heads give numbers so small that an Intel
  # takes several times as long for them.
  torch.set_flush_denormal(True)
  return Device("cpu", True, lambda _: None, lambda: 0)


def measure(device: Device, step: Callable[[], Any], steps: int) -> dict:
  """Seconds of each of some steps after a first one, and the peak of memory.

  Returns:
    `seconds`, a list; `peak_bytes`, of the process while the steps ran, or of the
    device; `versions` and `device`.
  """
  device.wait(step())
  if device.is_cpu:
    forget_peak()
  clock = time.process_time if device.is_cpu else time.perf_counter
  seconds = []
  for _ in range(steps):
    begin = clock()
    device.wait(step())
    seconds.append(clock() - begin)
  peak = peak_of_process() if device.is_cpu else device.peak_bytes()
  return {
    "seconds": seconds,
    "peak_bytes": peak,
    "device": device.name,
    "versions": {
      name: sys.modules[name].__version__
      for name in ("jax", "torch", "transformers")
      if name in sys.modules
    },
  }


def taken() -> dict[str, Any]:
  """When and where: the date, the processor, and how busy the machine is."""
  info = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  names = [x.split(":")[1].strip() for x in info if x.startswith("model name")]
  return {
    "date": time.strftime("%Y-%m-%d"),
    "processor": names[0] if names else "unknown",
    "cores": len(names),
    "load": round(os.getloadavg()[1], 1),
  }


def forget_peak() -> None:
  """What compiling and loading took and gave back is not the steps'."""
  ctypes.CDLL(None).malloc_trim(0)
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
  """Resident memory of this process now."""
  return _status("VmRSS")


def peak_of_process() -> int:
  """Peak of the resident memory since the last write to clear_refs."""
  return _status("VmHWM")


def _status(field: str) -> int:
  status = pathlib.Path("/proc/self/status").read_text()
  line = next(x for x in status.splitlines() if x.startswith(field + ":"))
  return int(line.split()[1]) * 1024


def parser(description: str | None) -> argparse.ArgumentParser:
  """The options of every benchmark that takes turns."""
  options = argparse.ArgumentParser(description=description)
  options.add_argument("--case", default=None, help="measure this one here")
  options.add_argument("--cases", default=None, help="comma-separated")
  options.add_argument("--steps", type=int, default=3)
  options.add_argument("--repeats", type=int, default=3)
  options.add_argument("--json", type=pathlib.Path, default=None)
  options.add_argument(
    "--peer_python",
    default=sys.executable,
    help="a Python with torch and transformers",
  )
  return options


def take(
  module: str,
  options: argparse.Namespace,
  cases: Mapping[str, bool],
  carried: Sequence[str] = (),
) -> dict[str, list[dict]]:
  """Runs `python -m module --case=X` for every case, in turn, several times.

  Args:
    module: of the benchmark; with `--case` it prints a measurement as JSON.
    options: of `parser`.
    cases: name to whether it is the peer's, run by the peer's Python.
    carried: options of the benchmark to hand on.

  Returns:
    The measurements of each case.
  """
  names = options.cases.split(",") if options.cases else list(cases)
  probe = [options.peer_python, "-c", "import torch, transformers"]
  if subprocess.run(probe, capture_output=True).returncode:
    print(
      "expected torch and transformers for the comparison, got a Python without"
      " them; set --peer_python. Measuring ours alone."
    )
    names = [name for name in names if not cases[name]]
  results: dict[str, list[dict]] = {name: [] for name in names}
  for _ in range(options.repeats):
    for name in names:
      command = [
        options.peer_python if cases[name] else sys.executable,
        *("-m", module, f"--case={name}", f"--steps={options.steps}"),
        *(f"--{x}={getattr(options, x)}" for x in carried),
      ]
      done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # transformers imports TensorFlow where it finds it: not the peer's cost.
        env=os.environ | {"USE_TF": "0"},
      )
      measured = json.loads(done.stdout.splitlines()[-1])
      results[name].append(measured)
      seconds = " ".join(f"{x:.3f}" for x in measured["seconds"])
      print(f"{name}: {seconds} s, {measured['peak_bytes'] / 2**20:.0f} MiB")
      sys.stdout.flush()
  return results


def least(measurements: Sequence[Mapping[str, Any]]) -> float:
  """The least seconds of a step of a case."""
  return min(min(m["seconds"]) for m in measurements)


def most_bytes(measurements: Sequence[Mapping[str, Any]]) -> int:
  """The highest peak of a case."""
  return max(m["peak_bytes"] for m in measurements)


def save(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
  """Prints the result's figures, and writes all where `--json` says."""
  for name, value in result.items():
    if name != "measurements":
      print(f"{name}: {value}")
  if options.json:
    result = {"taken": taken()} | dict(result)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
