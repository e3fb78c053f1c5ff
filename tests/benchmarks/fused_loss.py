"""CPU seconds and peak memory of the fused loss, the dense one, and Liger's.

JSD(½) of 2048 tokens, V = 32128, student and teacher 512 and 768 wide, float32,
value and gradient. Each case runs in a process of its own on one thread, and the
cases take turns. Memory is what a step's peak lies above what the process holds
before it, inputs among it, after a first step that compiled everything.

Run: python -m tests.benchmarks.fused_loss [--json=x.json] [--peer_python=PATH]
PATH is a Python with torch and liger-kernel; by default this one. Pin it to a core
with `taskset -c 0`. With --gpu both run on the GPU, matrix products in TF32: then
seconds are of the wall clock, and memory is what each library's allocator counts.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from tests.benchmarks import turns

N, V, STUDENT, TEACHER = 2048, 32128, 512, 768
OURS = ("fused", "fused_without_metrics", "dense", "dense_without_metrics")
# Liger's two settings: eager or compiled, and tokens of a chunk.
PEERS = tuple(
  f"liger_{mode}_{chunk}"
  for mode in ("eager", "compiled")
  for chunk in (128, 256, 1024)
)


def ours(case: str, chunk: int, gpu: bool):
  """A step of our loss, and the device's bytes (peak, in use) if a GPU."""
  if gpu:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
  import jax
  import jax.numpy as jnp
  import numpy as np

  from gkd_jax import divergences, losses

  rng = np.random.default_rng(0)
  make = lambda *s: jnp.asarray(rng.standard_normal(s, np.float32))
  hidden, teacher = make(1, N, STUDENT), make(1, N, TEACHER)
  heads = 0.05 * make(STUDENT, V), 0.05 * make(TEACHER, V)
  settings = {"divergence": divergences.get("jsd", beta=0.5)}

  def loss(hidden, head, teacher, teacher_head):
    weights = jnp.ones((1, N))
    if case.startswith("fused"):
      total, weight, metrics = losses.fused_distillation_loss(
        hidden,
        head,
        teacher,
        teacher_head,
        weights,
        chunk_size=chunk,
        **settings,
      )
    else:
      total, weight, metrics = losses.distillation_loss(
        teacher @ teacher_head, hidden @ head, weights, **settings
      )
    return total / weight, {} if case.endswith("metrics") else metrics

  arguments = hidden, heads[0], teacher, heads[1]
  step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  compiled = step.lower(*arguments).compile()

  def memory():
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"], stats["bytes_in_use"]

  return lambda: jax.block_until_ready(compiled(*arguments)), memory


def liger(case: str, gpu: bool):
  """A step of Liger's loss, and the device's bytes (peak, in use) if a GPU."""
  import torch
  from liger_kernel import chunked_loss

  if gpu:
    torch.set_default_device("cuda")
    # What XLA takes for float32 products on such a GPU.
    torch.set_float32_matmul_precision("high")
  torch.set_num_threads(1)
  torch.set_flush_denormal(True)  # as `turns.torch_device`
  torch.manual_seed(0)
  _, mode, chunk = case.split("_")
  loss = chunked_loss.LigerFusedLinearJSDLoss(
    weight_hard_loss=0.0,
    weight_soft_loss=1.0,
    compiled=mode == "compiled",
    chunk_size=int(chunk),
  )
  hidden = torch.randn(N, STUDENT, requires_grad=True)
  head = (0.05 * torch.randn(V, STUDENT)).requires_grad_()
  teacher, teacher_head = (
    torch.randn(N, TEACHER),
    0.05 * torch.randn(V, TEACHER),
  )
  labels = torch.zeros(N, dtype=torch.long)

  def step():
    hidden.grad = head.grad = None
    loss(hidden, head, teacher, teacher_head, labels).backward()
    if gpu:
      torch.cuda.synchronize()

  def memory():
    return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()

  return step, memory


def measure(case: str, chunk: int, steps: int, gpu: bool) -> None:
  """Prints the least seconds of a step, and the growth of the peak."""
  step, memory = liger(case, gpu) if case in PEERS else ours(case, chunk, gpu)
  if gpu:
    clock, before = time.perf_counter, memory()[1]
    peak = lambda: memory()[0]
    step()
  else:
    clock, peak = time.process_time, turns.peak_of_process
    step()
    turns.forget_peak()
    before = turns.resident_bytes()
  seconds = []
  for _ in range(steps):
    begin = clock()
    step()
    seconds.append(clock() - begin)
  extra = peak() - before
  print(json.dumps({"seconds": min(seconds), "extra_bytes": extra}))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--case", default=None)
  parser.add_argument("--gpu", action="store_true")
  parser.add_argument("--cases", default=",".join(OURS + PEERS))
  parser.add_argument("--chunk", type=int, default=256)
  parser.add_argument("--steps", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--json", type=pathlib.Path, default=None)
  parser.add_argument("--peer_python", default=sys.executable)
  options = parser.parse_args()
  if options.case:
    measure(options.case, options.chunk, options.steps, options.gpu)
    return
  cases = options.cases.split(",")
  probe = [options.peer_python, "-c", "import torch, liger_kernel.chunked_loss"]
  if subprocess.run(probe, capture_output=True).returncode:
    print(
      "expected torch and liger-kernel for the comparison, got a Python without"
      " them; set --peer_python. Measuring ours alone."
    )
    cases = [case for case in cases if case not in PEERS]
  results: dict[str, list[dict]] = {case: [] for case in cases}
  for _ in range(options.repeats):
    for case in cases:
      command = [
        options.peer_python if case in PEERS else sys.executable,
        *("-m", "tests.benchmarks.fused_loss"),
        f"--case={case}",
        f"--chunk={options.chunk}",
        f"--steps={options.steps}",
        *(["--gpu"] if options.gpu else []),
      ]
      done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=turns.ROOT
      )
      results[case].append(json.loads(done.stdout.splitlines()[-1]))
      print(case, results[case][-1], flush=True)
  result: dict = {"settings": {"chunk": options.chunk, "gpu": options.gpu}}
  for case, measured in results.items():
    result[f"{case} s"] = min(m["seconds"] for m in measured)
    result[f"{case} bytes"] = max(m["extra_bytes"] for m in measured)
  turns.save(options, result | {"measurements": results})


if __name__ == "__main__":
  main()
