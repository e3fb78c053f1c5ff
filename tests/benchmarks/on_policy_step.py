"""Seconds and peak memory of a whole on-policy step, ours and in PyTorch.

Student T5 1.1 small, teacher base, batch 8, 64 to 32 tokens, float32, no dropout:
the student samples, the teacher judges, JSD(½), AdamW. EOS is suppressed in both,
so that every output has 32 tokens. Ours is set to take little memory: the student's
layers are scanned (`--student_layers`), and of them only products with weights are
kept for the backward pass (`--remat_policy`). PyTorch's step is transformers'
`generate`, two forward passes, the divergence on whole logits, and AdamW's fused
kernel. It gives the loss alone, as `ours_without_metrics` does; `ours` gives the
metrics of training. `ours_from_cache` is `ours` with its programs read from the
cache of compiled programs, as any start of `gkd` but a machine's first does: what
compiling leaves in memory is then not there. `data` is our step on fixed outputs of
the same shapes.

Run: python -m tests.benchmarks.on_policy_step [--json=x.json] [--peer_python=PATH]
PATH is a Python with torch and transformers; by default this one. Pin it to a
core with `taskset -c 0`.
"""

import argparse
import functools
import json
import tempfile
from typing import Any

from tests.benchmarks import t5_shapes, turns

INPUTS, NEW = 64, 32
RATE = 1e-4
CASES = {
  "ours": False,
  "ours_without_metrics": False,
  "ours_from_cache": False,
  "data": False,
  "torch": True,
}


def ours(case: str, options) -> dict:
  """Measures our step in one of `CASES`."""
  device = turns.jax_device()
  import jax
  import numpy as np

  from gkd_jax import models, optimizers, partitioning, training

  if case == "ours_from_cache":
    # As `logs.use_cache` does, whose module imports TensorFlow for the data: a
    # peer's data loader is not measured either.
    jax.config.update("jax_compilation_cache_dir", options.cache)
  source = "data" if case == "data" else "student"
  student = t5_shapes.ours(
    options.student,
    options.dtype,
    scan_layers=options.student_layers == "scanned",
    remat_policy=options.remat_policy,
  )
  scan = options.teacher_layers == "scanned"
  teacher = t5_shapes.ours(options.teacher, options.dtype, scan_layers=scan)
  model = models.GKDModel(student, teacher, "jsd", beta=0.5)
  model.sampling["suppress_ids"] = (0, 1)
  optimizer = optimizers.adamw(RATE, weight_decay=0.01)
  teacher_params = t5_shapes.our_params(teacher, 1)
  create = lambda params: training.create(params, optimizer.transform)
  state = jax.jit(create)(t5_shapes.our_params(student, 0))

  def train_step(*arguments):
    state, metrics = training.train_step(
      *arguments, model=model, optimizer=optimizer, seed=0, source=source
    )
    if case == "ours_without_metrics":
      metrics = {"loss": metrics["loss"]}
    return state, metrics

  step = partitioning.jit(
    train_step, partitioning.make_mesh(), donate_argnums=(0,)
  )
  batch = jax.device_put(_random_batch(options.batch))
  compiled = step.lower(state, teacher_params, batch).compile()

  def one():
    nonlocal state
    state, metrics = compiled(state, teacher_params, batch)
    return state, metrics

  result = turns.measure(device, one, options.steps)
  metrics = one()[1]
  assert np.isfinite(metrics["loss"][0]), metrics
  if case in ("ours", "ours_from_cache"):
    total, weight = metrics["sampled_length"]
    assert total / weight == NEW, metrics
  return result


def _random_batch(rows):
  """Features of some rows without padding, `[rows, INPUTS]` and `[rows, NEW]`."""
  import numpy as np

  rng = np.random.default_rng(0)
  draw = lambda length: rng.integers(2, 32000, (rows, length), np.int32)
  targets = draw(NEW)
  return {
    "encoder_input_tokens": draw(INPUTS),
    "decoder_target_tokens": targets,
    "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    "decoder_loss_weights": np.ones_like(targets),
  }


def jsd(teacher_logits, student_logits):
  """JSD(½), nats, the mean over tokens."""
  import torch

  log_p = torch.log_softmax(teacher_logits.float(), -1)
  log_q = torch.log_softmax(student_logits.float(), -1)
  log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
  kl = functools.partial(
    torch.nn.functional.kl_div, log_m, reduction="sum", log_target=True
  )
  return 0.5 * (kl(log_p) + kl(log_q)) / log_p.shape[:-1].numel()


def theirs(options) -> dict:
  """Measures PyTorch's step."""
  device = turns.torch_device()
  import torch

  torch.manual_seed(0)
  student = t5_shapes.theirs(options.student, options.dtype)
  teacher = t5_shapes.theirs(options.teacher, options.dtype)
  teacher.requires_grad_(False)
  optimizer = torch.optim.AdamW(
    student.parameters(), lr=RATE, weight_decay=0.01, fused=True
  )
  tokens = torch.randint(2, 32000, (options.batch, INPUTS))
  mask = torch.ones_like(tokens)

  def one():
    with torch.inference_mode():
      outputs = student.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        suppress_tokens=[0, 1],
        max_new_tokens=NEW,
      )
    decoder_inputs = outputs[:, :-1].clone()
    assert decoder_inputs.shape == (options.batch, NEW)
    forward = lambda model: (
      model(
        input_ids=tokens,
        attention_mask=mask,
        decoder_input_ids=decoder_inputs,
        use_cache=False,
      ).logits
    )
    with torch.no_grad():
      teacher_logits = forward(teacher)
    loss = jsd(teacher_logits, forward(student))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

  return turns.measure(device, one, options.steps)


def _measured(options, carried):
  """Measurements of all cases, the cache of compiled programs filled before."""
  name, cached = "tests.benchmarks.on_policy_step", "ours_from_cache"
  if not options.cases or cached in options.cases.split(","):
    first = vars(options) | {"cases": cached, "repeats": 1, "steps": 1}
    print("to fill the cache: ", end="", flush=True)
    turns.take(name, argparse.Namespace(**first), CASES, carried)
  return turns.take(name, options, CASES, carried)


def main() -> None:
  parser = turns.parser(__doc__)
  for name, size in (("student", "small"), ("teacher", "base")):
    parser.add_argument(f"--{name}", default=size, choices=t5_shapes.SIZES)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--remat_policy", default="minimal")
  for name, form in (("student", "scanned"), ("teacher", "unrolled")):
    parser.add_argument(
      f"--{name}_layers", default=form, choices=("scanned", "unrolled")
    )
  parser.add_argument(
    "--cache", help="folder of compiled programs, for a --case"
  )
  options = parser.parse_args()
  if options.case:
    if options.case == "torch":
      print(json.dumps(theirs(options)))
    else:
      print(json.dumps(ours(options.case, options)))
    return
  settings = ("student", "teacher", "dtype", "batch")
  settings += ("remat_policy", "student_layers", "teacher_layers")
  with tempfile.TemporaryDirectory() as options.cache:
    measured = _measured(options, (*settings, "cache"))
  result: dict[str, Any] = {
    "settings": {name: getattr(options, name) for name in settings}
  }
  for name, measurements in measured.items():
    result[f"{name} s"] = turns.least(measurements)
    result[f"{name} bytes"] = turns.most_bytes(measurements)
  for name, (a, b) in {
    "ours over torch": ("ours", "torch"),
    "ours_without_metrics over torch": ("ours_without_metrics", "torch"),
    "ours_from_cache over torch": ("ours_from_cache", "torch"),
    "on-policy over data": ("ours", "data"),
  }.items():
    if a in measured and b in measured:
      result[f"seconds, {name}"] = result[f"{a} s"] / result[f"{b} s"]
      result[f"memory, {name}"] = result[f"{a} bytes"] / result[f"{b} bytes"]
  turns.save(options, result | {"measurements": measured})


if __name__ == "__main__":
  main()
