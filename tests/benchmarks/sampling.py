"""Seconds of sampling, ours and Hugging Face's `generate`.

T5 1.1 small, batch 8, 32 new tokens at temperature 1 without filters, EOS
suppressed in both, float32; encoder lengths 64, 256, 512, all tokens real. A
measurement holds the encoder, as `generate` does.

Run: python -m tests.benchmarks.sampling [--json=x.json] [--peer_python=PATH]
PATH is a Python with torch and transformers; by default this one. Pin it to a
core with `taskset -c 0`.
"""

import json

from tests.benchmarks import t5_shapes, turns

BATCH, NEW = 8, 32
LENGTHS = (64, 256, 512)


def ours(length: int, options) -> dict:
  """Measures our sampler."""
  device = turns.jax_device()
  import jax
  import jax.numpy as jnp
  import numpy as np

  model = t5_shapes.ours(options.size, options.dtype)
  params = t5_shapes.our_params(model, 0)
  tokens = np.random.default_rng(0).integers(
    2, 32000, (options.batch, length), np.int32
  )

  def sample(params, tokens, key):
    outputs = jnp.zeros((tokens.shape[0], NEW), jnp.int32)
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": outputs}
    encoded = model.encode(params, batch)
    return model.sample(
      params,
      encoded,
      batch,
      key,
      suppress_ids=(0, 1),
    ).tokens

  arguments = params, tokens, jax.random.key(0)
  compiled = jax.jit(sample).lower(*arguments).compile()
  drawn = np.asarray(compiled(*arguments))
  assert drawn.shape == (options.batch, NEW) and drawn.min() > 1
  return turns.measure(device, lambda: compiled(*arguments), options.steps)


def theirs(length: int, options) -> dict:
  """Measures `generate`."""
  device = turns.torch_device()
  import torch

  model = t5_shapes.theirs(options.size, options.dtype)
  torch.manual_seed(0)
  tokens = torch.randint(2, 32000, (options.batch, length))
  mask = torch.ones_like(tokens)

  def step():
    with torch.inference_mode():
      return model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        suppress_tokens=[0, 1],
        max_new_tokens=NEW,
      )

  assert step().shape == (options.batch, NEW + 1)
  return turns.measure(device, step, options.steps)


def main() -> None:
  parser = turns.parser(__doc__)
  parser.add_argument("--size", default="small", choices=t5_shapes.SIZES)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--batch", type=int, default=BATCH)
  options = parser.parse_args()
  if options.case:
    side, length = options.case.split("_")
    run = ours if side == "ours" else theirs
    print(json.dumps(run(int(length), options)))
    return
  cases = {
    f"{side}_{length}": side != "ours"
    for length in LENGTHS
    for side in ("ours", "hf")
  }
  measured = turns.take(
    "tests.benchmarks.sampling", options, cases, ("size", "dtype", "batch")
  )
  tokens = options.batch * NEW
  result = {
    "settings": {"size": options.size, "dtype": options.dtype, "tokens": tokens}
  }
  for name, measurements in measured.items():
    result[f"{name} tokens/s"] = tokens / turns.least(measurements)
  for length in LENGTHS:
    ours_, hf = (measured.get(f"{side}_{length}") for side in ("ours", "hf"))
    if ours_ and hf:
      result[f"speed {length}"] = turns.least(hf) / turns.least(ours_)
      result[f"memory {length}"] = turns.most_bytes(ours_) / turns.most_bytes(
        hf
      )
  turns.save(options, result | {"measurements": measured})


if __name__ == "__main__":
  main()
