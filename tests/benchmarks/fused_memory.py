"""Temporary memory of the fused loss and the dense one, compiled for a TPU.

JSD(½) with its gradient, of the rows that a device has, at GSM8K's length of 320;
V = 32128, bfloat16 hidden states of T5-small's and T5-XL's widths, float32 heads.
Needs libtpu, and no TPU.

Run: python -m tests.benchmarks.fused_memory [--topology=v5e:1x1] [--rows=32]
"""

import argparse
import json

V, STUDENT, TEACHER = 32128, 512, 2048


def temporaries(device, chunk: int, rows: int, length: int) -> int:
  """Bytes, of the dense loss if `chunk` is 0."""
  import jax
  import jax.numpy as jnp

  from gkd_jax import divergences, losses

  sharding = jax.sharding.SingleDeviceSharding(device)
  shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(
    sizes, dtype, sharding=sharding
  )
  settings = {"divergence": divergences.get("jsd", beta=0.5)}

  def loss(hidden, head, teacher, teacher_head, weights):
    if chunk:
      total, weight, _ = losses.fused_distillation_loss(
        hidden,
        head,
        teacher,
        teacher_head,
        weights,
        chunk_size=chunk,
        **settings,
      )
    else:
      total, weight, _ = losses.distillation_loss(
        teacher @ teacher_head, hidden @ head, weights, **settings
      )
    return total / weight

  arguments = (
    shape(jnp.bfloat16, rows, length, STUDENT),
    shape(jnp.float32, STUDENT, V),
    shape(jnp.bfloat16, rows, length, TEACHER),
    shape(jnp.float32, TEACHER, V),
    shape(jnp.float32, rows, length),
  )
  step = jax.jit(jax.value_and_grad(loss, (0, 1)))
  stats = step.lower(*arguments).compile().memory_analysis()
  return stats.temp_size_in_bytes


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", default="v5e:1x1")
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument("--length", type=int, default=320)
  parser.add_argument("--chunks", default="0,128,256,512,1024")
  options = parser.parse_args()
  from gkd_jax.planning import topologies

  devices, _ = topologies.devices(options.topology)
  dense = None
  for chunk in map(int, options.chunks.split(",")):
    found = temporaries(devices[0], chunk, options.rows, options.length)
    dense = found if chunk == 0 else dense
    row = {"chunk": chunk, "temporary_bytes": found}
    if dense:
      row["times_less"] = round(dense / found, 2)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
