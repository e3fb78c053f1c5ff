"""From a teacher and examples to the records of its outputs.

The random numbers of an output come from (seed, example index, sample number)
alone: the sample number is folded into the key, and the example's index is the
name of its row's stream (`sampling`).
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import seqio

from gkd_jax import decoding, losses, partitioning
from gkd_jax.evaluation import evaluate

# What the targets of the written examples are.
OUTPUTS, REFERENCES = "outputs", "references"


@dataclasses.dataclass(frozen=True)
class Shards:
  """How a teacher's outputs are stored.

  Attributes:
    num_shards: files; a run that is stopped loses what it has of one.
    num_samples: outputs for each input, one unless they are sampled.
    targets: "outputs": what the teacher writes. "references": the task's own
      targets as they are, with the teacher's scores and laws of them.
    top_k: store the teacher's k likeliest tokens at each target and the mass of
      all others; 0 stores none.
    top_k_dtype: "float16" or "float32", of the stored log-probs.
    teacher_temperature: divides the teacher's logits in the stored laws.

  Raises:
    ValueError: a setting is out of range.
  """

  num_shards: int = 8
  num_samples: int = 1
  targets: str = OUTPUTS
  top_k: int = 0
  top_k_dtype: str = "float16"
  teacher_temperature: float = 1.0

  def __post_init__(self):
    for name, least in (("num_shards", 1), ("num_samples", 1), ("top_k", 0)):
      if getattr(self, name) < least:
        raise ValueError(
          f"expected {name} of at least {least}, got {getattr(self, name)};"
          f" set {name.upper()}"
        )
    for name, known in (
      ("targets", (OUTPUTS, REFERENCES)),
      ("top_k_dtype", ("float16", "float32")),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f"expected {name} of {' or '.join(map(repr, known))}, got"
          f" {getattr(self, name)!r}; set {name.upper()}"
        )
    if self.teacher_temperature <= 0:
      raise ValueError(
        "expected a teacher_temperature above 0, got"
        f" {self.teacher_temperature}; set TEACHER_TEMPERATURE"
      )
    if self.targets == REFERENCES and self.num_samples > 1:
      raise ValueError(
        "expected one target for each input with TARGETS = 'references', got"
        f" {self.num_samples}; set NUM_SAMPLES"
      )


def draws(model: Any, temperature: float) -> bool:
  """Whether several outputs of one input differ.

  Args:
    model: with T5X's protocol.
    temperature: see `records`.
  """
  parameters = inspect.signature(model.decode_fn).parameters
  if "temperature" not in parameters:
    return False
  default = parameters["temperature"].default
  options = model.default_decoder_params
  return bool(temperature or options.get("temperature", default))


def records(
  model: Any,
  params: Any,
  task: seqio.Task,
  rows: Sequence[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
  shards: Shards,
  *,
  first_index: int,
  temperature: float,
  seed: int,
  batch_size: int,
  mesh: Any,
) -> Iterator[dict[str, Any]]:
  """Yields the records of `teacher_shards`, sample by sample of each example.

  Args:
    model: the teacher, with T5X's protocol.
    params: its parameters, on the mesh.
    task: gives the vocabularies.
    rows: examples, and their model features.
    shards: what is stored.
    first_index: place of the first row in the split.
    temperature: 0 is greedy, or as the model's `decode_fn` has it.
    seed: of sampling.
    batch_size: rows decoded at a time.
    mesh: rows of a batch are split over its data axis.

  Raises:
    ValueError: a reference holds a padding token, where laws are stored.
  """
  if not rows:
    return
  features = {
    k: np.stack([converted[k] for _, converted in rows]) for k in rows[0][1]
  }
  indices = np.arange(first_index, first_index + len(rows), dtype=np.int32)
  features["example_index"] = indices
  compiled = _compiled(model, shards, temperature, mesh)
  samples = []
  for number in range(shards.num_samples):
    key = jax.random.fold_in(jax.random.key(seed), number)
    parts = [
      jax.tree.map(np.asarray, compiled(params, batch, key))
      for _, batch in evaluate.batches(features, batch_size, mesh)
    ]
    samples.append(
      {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    )
  for i, (example, _) in enumerate(rows):
    for number, result in enumerate(samples):
      row = {k: v[i] for k, v in result.items()}
      numbers = {"example_index": first_index + i, "sample_number": number}
      yield _record(task, example, row, shards) | numbers


def _record(task, example, row, shards):
  """One output of an example, from its row of what `_compiled` gives."""
  targets = example["targets"]
  if shards.targets == OUTPUTS:
    targets = row["tokens"][: np.count_nonzero(row["tokens"])]
  record = {"score": row["score"]}
  for name, ids in (("inputs", example["inputs"]), ("targets", targets)):
    vocabulary = task.output_features[name].vocabulary
    # A vocabulary of numbers alone gives no text.
    text = str(vocabulary.decode(ids.tolist()))
    record |= {name: ids, f"{name}_pretokenized": text}
  if shards.top_k:
    here = row["weights"] > 0
    if np.count_nonzero(here) != len(targets):
      raise ValueError(
        f"expected targets without padding tokens, got {targets.tolist()};"
        " set MIXTURE_OR_TASK_NAME or TOP_K = 0"
      )
    record["top_k_ids"] = row["ids"][here]
    record["top_k_log_probs"] = row["log_probs"][here]
  return record


@functools.lru_cache(maxsize=4)
def _compiled(model, shards: Shards, temperature: float, mesh):
  """The program that gives a batch's outputs, scores and laws."""

  def run(params, batch, key):
    batch = dict(batch)
    indices = batch.pop("example_index")
    if shards.targets == OUTPUTS:
      options, key = _decoding(model, temperature, indices, key)
      tokens, aux = model.predict_batch_with_aux(
        params, batch, key, options, return_all_decodes=False
      )
      # A padding token would end the output for whoever reads it.
      kept = jnp.cumprod((tokens != decoding.PAD_ID).astype(jnp.int32), axis=1)
      result = {"tokens": tokens * kept, "score": aux["scores"]}
      weights = kept.astype(jnp.float32)
      batch |= model.output_features(batch, result["tokens"], weights)
    else:
      result = {"score": model.score_batch(params, batch)}
    if shards.top_k:
      ids, log_probs = losses.top_k_log_probs(
        model.logits(params, batch),
        shards.top_k,
        teacher_temperature=shards.teacher_temperature,
        num_real_tokens=model.num_real_tokens,
      )
      small = model.config.vocab_size <= 2**16
      result |= {
        "ids": ids.astype(jnp.uint16 if small else jnp.int32),
        "log_probs": log_probs.astype(shards.top_k_dtype),
        "weights": model.loss_weights(batch),
      }
    return result

  return partitioning.jit(
    run, mesh, out_shardings=partitioning.replicated(mesh)
  )


def _decoding(model, temperature, indices, key):
  """Options of the decode function, and its key.

  `indices` are the examples' `[B]`. Sampled outputs hold no padding token, as
  in on-policy training.
  """
  parameters = inspect.signature(model.decode_fn).parameters
  defaults = model.default_decoder_params
  options: dict[str, Any] = {"temperature": temperature} if temperature else {}
  if "suppress_ids" in parameters:
    others = tuple(defaults.get("suppress_ids", ()))
    options["suppress_ids"] = (decoding.PAD_ID, *others)
  if "row_ids" not in parameters:
    return options, jax.random.fold_in(key, indices[0])
  # Several decodes, of which the best is kept, have a stream each.
  decodes = int(defaults.get("num_decodes", 1))
  rows = indices[:, None] * decodes + jnp.arange(decodes)[None]
  return options | {"row_ids": rows.reshape(-1)}, key
