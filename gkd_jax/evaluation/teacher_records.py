"""Records of a teacher's outputs on examples.

The random numbers of an output depend only on seed, example index and sample
number: the sample number is folded into the key, and the example index selects
the row's stream (see `decoding.sample`).
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

from gkd_jax import checks, data, losses, models, partitioning
from gkd_jax.data import vocabularies
from gkd_jax.evaluation import evaluate

# Values of `Shards.targets`.
OUTPUTS, REFERENCES = "outputs", "references"


@dataclasses.dataclass(frozen=True)
class Shards:
  """How a teacher's outputs are stored.

  Attributes:
    num_shards: number of files; an interrupted run loses its unfinished file.
    num_samples: outputs for each input, 1 unless they are sampled.
    targets: "outputs" for the teacher's outputs; "references" for the task's own
      targets, with the teacher's scores and top-k log-probs.
    top_k: number of most likely tokens to store at each target, with their
      log-probs and that of all other tokens together; 0 stores none.
    top_k_dtype: "float16" or "float32", of the stored log-probs.
    teacher_temperature: divides the logits before the stored log-probs.

  Raises:
    ValueError: if a setting is out of range.
  """

  num_shards: int = 8
  num_samples: int = 1
  targets: str = OUTPUTS
  top_k: int = 0
  top_k_dtype: str = "float16"
  teacher_temperature: float = 1.0

  def __post_init__(self):
    checks.whole(self.num_shards, "NUM_SHARDS")
    checks.whole(self.num_samples, "NUM_SAMPLES")
    checks.whole(self.top_k, "TOP_K", least=0)
    checks.one_of(self.targets, "TARGETS", (OUTPUTS, REFERENCES))
    checks.one_of(self.top_k_dtype, "TOP_K_DTYPE", ("float16", "float32"))
    checks.number(
      self.teacher_temperature,
      "TEACHER_TEMPERATURE",
      above=0,
      what="a teacher_temperature",
    )
    if self.targets == REFERENCES and self.num_samples > 1:
      raise ValueError(
        "expected one target for each input with TARGETS = 'references', got"
        f" {self.num_samples}; set NUM_SAMPLES"
      )


def is_stochastic(model: Any, temperature: float) -> bool:
  """Returns whether decoding is random, so that outputs of one input differ.

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


def check_num_samples(model: Any, number: int, temperature: float) -> None:
  """Refuses several outputs of an input where all of them are equal.

  Args:
    model: with T5X's protocol.
    number: outputs of each input.
    temperature: see `records`.

  Raises:
    ValueError: if there are several, and decoding is not random.
  """
  if number > 1 and not is_stochastic(model, temperature):
    raise ValueError(
      f"expected one output for each input without sampling, got {number} at"
      f" temperature {temperature}; set SAMPLING_TEMPERATURE, or"
      " NUM_SAMPLES = 1"
    )


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
  """Yields the records of `teacher_shards`, all samples of an example in turn.

  Args:
    model: the teacher, with T5X's protocol.
    params: its parameters, on the mesh.
    task: gives the vocabularies.
    rows: examples and their model features.
    shards: what is stored.
    first_index: index of the first row in the split.
    temperature: 0 decodes greedily, or with the model's `decode_fn`.
    seed: of sampling.
    batch_size: rows decoded at a time.
    mesh: rows of a batch are split over its data axis.

  Raises:
    ValueError: if log-probs are stored and a reference contains padding.
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
      record = _record(task, example, row, shards, model.special_tokens)
      yield record | numbers


def _record(task, example, row, shards, special_tokens):
  """Returns the record of one output; `row` is its row of `_compiled`."""
  if shards.targets == OUTPUTS:
    targets = row["tokens"][: row["length"]]
  else:
    targets = example["targets"]
  record = {"score": row["score"], "ended": int(row["ended"])}
  inputs = task.output_features["inputs"].vocabulary
  outputs = data.target_vocabulary(task)
  for name, ids, text in (
    (
      "inputs",
      example["inputs"],
      vocabularies.prompt_text(inputs, example["inputs"]),
    ),
    ("targets", targets, vocabularies.text(outputs, targets, special_tokens)),
  ):
    # A vocabulary without text decodes to numbers.
    record |= {name: ids, f"{name}_pretokenized": str(text)}
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
  """Returns the jitted function of a batch's outputs, scores and log-probs."""

  def run(params, batch, key):
    batch = dict(batch)
    indices = batch.pop("example_index")
    if shards.targets == OUTPUTS:
      options, key = _decoding(model, temperature, indices, key)
      tokens, aux = model.predict_batch_with_aux(
        params, batch, key, options, return_all_decodes=False
      )
      kept = jnp.arange(tokens.shape[1])[None] < aux["lengths"][:, None]
      if model.special_tokens.zero_is_padding:
        # Readers end an output at the first padding token.
        kept &= jnp.cumprod((tokens != 0).astype(jnp.int32), axis=1) > 0
      tokens, weights = tokens * kept, kept.astype(jnp.float32)
      eos_id = model.special_tokens.eos_id
      result = {
        "tokens": tokens,
        "length": jnp.sum(kept, axis=1),
        "score": aux["scores"],
        "ended": models.has_eos(tokens, weights, eos_id),
      }
      batch |= model.output_features(batch, tokens, weights)
    else:
      score = model.score_batch(params, batch)
      result = {"score": score, "ended": jnp.ones_like(score, bool)}
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
  """Returns the options of the decode function, and its key.

  `indices` `[B]` are those of the examples. PAD is not sampled, as in
  on-policy training.
  """
  options: dict[str, Any] = {"temperature": temperature} if temperature else {}
  if "suppress_ids" in inspect.signature(model.decode_fn).parameters:
    others = tuple(model.default_decoder_params.get("suppress_ids", ()))
    options["suppress_ids"] = (*model.special_tokens.never_sampled, *others)
  streams, key = evaluate.random_streams(model, indices, key)
  return options | streams, key
