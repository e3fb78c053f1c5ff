"""Seconds and peak memory of an on-policy step whose outputs end early.

Student T5 1.1 small, teacher base, batch 8, 64 inputs, T = 128, float32, no dropout,
JSD(½), AdamW, the fused loss by 128 tokens. Every output has 32 tokens, the last of
them EOS. `whole`: the decoders over all 128 positions; `buckets`: with
OUTPUT_BUCKETS = (32, 64), which compiles three branches. CPU seconds of compiling
stand beside.

Run: python -m tests.benchmarks.buckets [--json x.json]. Pin it to a core.
"""

import functools
import json
import time

from tests.benchmarks import t5_shapes, turns

ROWS, INPUTS, LENGTH, END, CHUNK = 8, 64, 128, 32, 128
CASES = {"whole": None, "buckets": (32, 64)}


def ending_early(*models_of_pair, **settings):
  """A `GKDModel` whose samples all end after `END` tokens."""
  import jax.numpy as jnp

  from gkd_jax import models
  from gkd_jax.decoding import sampling

  eos_id = 1

  class EndingEarly(models.GKDModel):
    def draw(self, params, encoded, batch, key, **rows):
      tokens, log_probs = self.student.sample(
        params,
        encoded,
        batch,
        key,
        row_ids=rows.get("row_ids"),
        row_lengths=jnp.full((ROWS,), END),
        **self.sampling,
      )
      tokens = tokens.at[:, END - 1].set(eos_id)
      weights = sampling.sequence_weights(tokens, eos_id)
      return tokens, weights, log_probs

  model = EndingEarly(*models_of_pair, **settings)
  model.sampling["suppress_ids"] = (0, 1)
  return model


def measure(case: str, options) -> dict:
  """Measures one way."""
  device = turns.jax_device()
  import jax
  import numpy as np

  from gkd_jax import optimizers, partitioning, training

  student = t5_shapes.ours("small")
  teacher = t5_shapes.ours("base", scan_layers=True)
  model = ending_early(
    student,
    teacher,
    divergence="jsd",
    beta=0.5,
    loss_chunk_size=CHUNK,
    output_buckets=CASES[case],
  )
  optimizer = optimizers.adamw(1e-4, weight_decay=0.01)
  teacher_params = t5_shapes.our_params(teacher, 1)
  create = lambda params: training.create(params, optimizer.transform)
  state = jax.jit(create)(t5_shapes.our_params(student, 0))
  step = partitioning.jit(
    functools.partial(
      training.train_step,
      model=model,
      optimizer=optimizer,
      seed=0,
      source="student",
    ),
    partitioning.make_mesh(),
    donate_argnums=(0,),
  )
  draw = np.random.default_rng(0).integers
  batch = {"encoder_input_tokens": draw(2, 32000, (ROWS, INPUTS), np.int32)}
  for name in ("target_tokens", "input_tokens", "loss_weights"):
    batch[f"decoder_{name}"] = np.zeros((ROWS, LENGTH), np.int32)
  batch = jax.device_put(batch)
  lowered = step.lower(state, teacher_params, batch)
  begin = time.process_time()
  compiled = lowered.compile()
  compiling = time.process_time() - begin
  losses = []  # after the first step the samples differ, by rounding

  def one():
    nonlocal state
    state, metrics = compiled(state, teacher_params, batch)
    losses.append(metrics["loss"])
    return metrics

  result = turns.measure(device, one, options.steps)
  return result | {
    "compiling": compiling,
    "loss": float(losses[0][0] / losses[0][1]),
  }


def main() -> None:
  options = turns.parser(__doc__).parse_args()
  if options.case:
    print(json.dumps(measure(options.case, options)))
    return
  measured = turns.take(
    "tests.benchmarks.buckets", options, dict.fromkeys(CASES, False)
  )
  result = {"settings": {"batch": ROWS, "T": LENGTH, "outputs": END}}
  for name, measurements in measured.items():
    result[f"{name} s"] = turns.least(measurements)
    result[f"{name} bytes"] = turns.most_bytes(measurements)
    result[f"{name} compiling"] = min(m["compiling"] for m in measurements)
    result[f"{name} loss"] = measurements[0]["loss"]
  if len(measured) == len(CASES):
    for kind, of in (("seconds", "s"), ("memory", "bytes")):
      ratio = result[f"buckets {of}"] / result[f"whole {of}"]
      result[f"{kind}, buckets over whole"] = ratio
  turns.save(options, result | {"measurements": measured})


if __name__ == "__main__":
  main()
