"""How the CPU seconds of an on-policy step grow with batch, lengths, sizes.

One setting is doubled at a time, the others stay: batch 8, 64 inputs, 32 outputs,
vocabulary 8192, student 256 and teacher 512 wide, two layers on each side. Beside
the slope of log seconds over log setting stands that of the arithmetic: of the
multiplications and additions in all matrix products, counted from the sizes alone.
Below it the step grows slower than its arithmetic.

Run: python -m tests.benchmarks.growth [--json=x.json]. Pin it to a core with
`taskset -c 0`; it takes some minutes.
"""

import argparse
import functools
import math
import pathlib
from typing import Any, NamedTuple

from tests.benchmarks import turns


class Sizes(NamedTuple):
  """What a step is measured at; the teacher is twice the student's width."""

  batch: int = 8
  inputs: int = 64
  outputs: int = 32
  vocabulary: int = 8192
  width: int = 256
  layers: int = 2


AXES = {
  "batch": (4, 8, 16, 32),
  "inputs": (64, 128, 256, 512),
  "outputs": (16, 32, 64, 128),
  "vocabulary": (4096, 8192, 16384, 32768),
  "width": (128, 256, 512),
  "layers": (1, 2, 4),
}


def flops(sizes: Sizes) -> float:
  """Multiplications and additions in the matrix products of a step.

  The student encodes once, samples, and goes forward and backward, which is three
  times the forward products; the teacher goes forward once.
  """
  b, s, t, v = sizes.batch, sizes.inputs, sizes.outputs, sizes.vocabulary

  def forward(width):
    """Of the encoder, and of decoder and head."""
    block = 4 * width**2 + 3 * width * 2 * width  # attention, gated MLP
    encoder = s * block + 2 * s * s * width
    # Self-attention and MLP, then queries and outputs, keys and values.
    decoder = t * (block + 2 * width**2) + 2 * s * width**2
    decoder += 2 * t * (t + s) * width
    each = 2 * b * sizes.layers
    return each * encoder, each * decoder + 2 * b * t * width * v

  student, teacher = forward(sizes.width), forward(2 * sizes.width)
  return 3 * sum(student) + student[1] + sum(teacher)


def seconds(sizes: Sizes, steps: int) -> float:
  """Least CPU seconds of a step."""
  device = turns.jax_device()
  import jax
  import numpy as np

  from gkd_jax import models, network, optimizers, training

  def model(width):
    config = network.T5Config(
      vocab_size=sizes.vocabulary,
      emb_dim=width,
      num_heads=width // 64,
      num_encoder_layers=sizes.layers,
      num_decoder_layers=sizes.layers,
      mlp_dim=2 * width,
      mlp_activations=("gelu", "linear"),
      dropout_rate=0.0,
    )
    return models.EncoderDecoderModel(network.Transformer(config))

  def params(of, seed):
    shapes = {"encoder_input_tokens": (1, 8), "decoder_input_tokens": (1, 8)}
    draw = lambda key: of.get_initial_variables(key, shapes)["params"]
    return jax.jit(draw)(jax.random.key(seed))

  student, teacher = model(sizes.width), model(2 * sizes.width)
  gkd = models.GKDModel(student, teacher, "jsd", beta=0.5)
  gkd.sampling["suppress_ids"] = (0, 1)  # every output has all its tokens
  optimizer = optimizers.adamw(1e-4)
  create = lambda tree: training.create(tree, optimizer.transform)
  state = jax.jit(create)(params(student, 0))
  teacher_params = params(teacher, 1)
  step = functools.partial(
    training.train_step,
    model=gkd,
    optimizer=optimizer,
    seed=0,
    source="student",
  )
  draw = lambda length: np.random.default_rng(0).integers(
    2, sizes.vocabulary, (sizes.batch, length), np.int32
  )
  targets = draw(sizes.outputs)
  batch = {
    "encoder_input_tokens": draw(sizes.inputs),
    "decoder_target_tokens": targets,
    "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
  }
  step = jax.jit(step, donate_argnums=(0,))
  compiled = step.lower(state, teacher_params, batch).compile()

  def one():
    nonlocal state
    state, metrics = compiled(state, teacher_params, batch)
    return state, metrics

  return min(turns.measure(device, one, steps)["seconds"])


def slope(points: list[tuple[float, float]]) -> float:
  """Of the least-squares line through log y over log x."""
  x, y = ([math.log(value) for value in c] for c in zip(*points, strict=True))
  mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
  over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
  return over / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=3)
  parser.add_argument("--axes", default=",".join(AXES))
  parser.add_argument("--json", type=pathlib.Path, default=None)
  options = parser.parse_args()
  measure = functools.cache(seconds)
  result: dict[str, Any] = {"settings": Sizes()._asdict(), "axes": {}}
  for axis in options.axes.split(","):
    rows = []
    for value in AXES[axis]:
      sizes = Sizes()._replace(**{axis: value})
      rows.append((value, measure(sizes, options.steps), flops(sizes)))
      print(axis, *rows[-1], flush=True)
    result["axes"][axis] = {
      "rows": rows,
      "slope of seconds": slope([(x, s) for x, s, _ in rows]),
      "slope of arithmetic": slope([(x, f) for x, _, f in rows]),
    }
  turns.save(options, result)


if __name__ == "__main__":
  main()
