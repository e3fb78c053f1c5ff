"""CPU seconds of decoding 64 prompts of which one is long, by slots.

T5 1.1 small, 64 inputs of 64 tokens, float32. Every output ends after 8 tokens but
one, which takes 64. `slots_K`: K rows at a time, refilled (`decode_slots`);
`batches_K`: batches of K rows, each until its last row has ended. `together` is one
batch of 64. The encoder is part of it. Beside the seconds: the share of row-steps
that a row used which had not ended.

Run: python -m tests.benchmarks.refill [--json x.json]. Pin it to a core.
"""

import json

from tests.benchmarks import t5_shapes, turns

ROWS, INPUTS, SHORT, LONG = 64, 64, 8, 64
PLACE = 20  # of the long row
CASES = ("together", "batches_8", "batches_16", "slots_8", "slots_16")


def busy_share(case: str, lengths) -> float:
  """Row-steps of use over all row-steps, from the outputs' lengths."""
  kind, _, number = case.partition("_")
  size = int(number or ROWS)
  if kind == "slots":
    free = [0] * size  # when each slot is free
    for length in lengths:
      slot = free.index(min(free))
      free[slot] += length
    steps = max(free)
  else:
    steps = sum(max(lengths[i : i + size]) for i in range(0, ROWS, size))
  return sum(lengths) / (steps * size)


def measure(case: str, options) -> dict:
  """Measures one way of decoding."""
  device = turns.jax_device()
  import jax
  import jax.numpy as jnp
  import numpy as np

  model = t5_shapes.ours("small")
  params = t5_shapes.our_params(model, 0)
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 32000, (ROWS, INPUTS), np.int32)
  lengths = np.full(ROWS, SHORT)
  lengths[PLACE] = LONG
  kind, _, number = case.partition("_")
  slots = int(number) if kind == "slots" else None
  size = int(number) if kind == "batches" else ROWS

  @jax.jit
  def sample(params, tokens, row_ids, row_lengths, key):
    outputs = jnp.zeros((tokens.shape[0], LONG), jnp.int32)
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": outputs}
    encoded = model.encode(params, batch)
    return model.sample(
      params,
      encoded,
      batch,
      key,
      suppress_ids=(0, 1),
      row_ids=row_ids,
      row_lengths=row_lengths,
      slots=slots,
    ).tokens

  parts = [
    jax.device_put(
      (tokens[i : i + size], np.arange(i, i + size), lengths[i : i + size])
    )
    for i in range(0, ROWS, size)
  ]
  key = jax.random.key(0)
  step = lambda: [sample(params, *part, key) for part in parts]
  outputs = np.concatenate(step())
  assert (np.count_nonzero(outputs, axis=1) == lengths).all()
  return turns.measure(device, step, options.steps) | {
    "busy": busy_share(case, lengths.tolist()),
    "checksum": int(outputs.sum()),
  }


def main() -> None:
  options = turns.parser(__doc__).parse_args()
  if options.case:
    print(json.dumps(measure(options.case, options)))
    return
  measured = turns.take(
    "tests.benchmarks.refill", options, dict.fromkeys(CASES, False)
  )
  result = {"settings": {"rows": ROWS, "short": SHORT, "long": LONG}}
  for name, measurements in measured.items():
    result[f"{name} s"] = turns.least(measurements)
    result[f"{name} busy"] = measurements[0]["busy"]
    result[f"{name} bytes"] = turns.most_bytes(measurements)
  # The same outputs, however they were decoded.
  assert len({m["checksum"] for ms in measured.values() for m in ms}) == 1
  turns.save(options, result | {"measurements": measured})


if __name__ == "__main__":
  main()
