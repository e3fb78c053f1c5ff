"""A T5 entailment model as a reward.

Such a model (for example that of the TRUE mixture, Honovich et al., arXiv
2204.04991) reads "premise: ... hypothesis: ..." and answers "1" or "0". The
reward is the probability of "1", that the document entails the summary, as in
the GKD paper's RL experiment after Roit et al. (arXiv 2306.00186).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import checkpoints, checks, partitioning, types

OVER = ("vocabulary", "answers")


class EntailmentReward:
  """A `types.Reward`: the probability that the input entails the output.

  The scorer makes a mesh equal to that of training and is sharded by the same
  rules as the teacher. Texts are tokenized with the scorer's vocabulary, not
  the student's.

  Args:
    model: the scorer, an `EncoderDecoderModel`.
    checkpoint_path: its parameters, see `checkpoints.load_params`.
    vocabulary: its seqio vocabulary.
    input_length: S; the premise is truncated if both texts are longer.
    batch_size: rows scored at a time, on all devices together.
    answers: texts of "entailed" and "not entailed", of which the first tokens
      are compared.
    over: softmax over the "vocabulary", or over the two "answers".
    input_prefix: prefix of the task's inputs that is removed.
    num_partitions: devices of the model axis.
    shard_params_over_data: shard parameters over the data axis too.

  Raises:
    ValueError: if a setting is out of range, the answers begin with the same
      token, or the checkpoint is another model's.
  """

  def __init__(
    self,
    model: types.TransformerModel,
    checkpoint_path: str,
    vocabulary: Any,
    *,
    input_length: int = 512,
    batch_size: int = 32,
    answers: tuple[str, str] = ("1", "0"),
    over: str = "vocabulary",
    input_prefix: str = "",
    num_partitions: int = 1,
    shard_params_over_data: bool = False,
  ):
    _check(checkpoint_path, vocabulary, answers, input_prefix)
    self._mesh = partitioning.make_mesh(num_partitions)
    data_axis = partitioning.row_shards(self._mesh)
    checks.whole(batch_size, "SCORER_BATCH_SIZE")
    if batch_size % data_axis:
      raise ValueError(
        f"expected a scorer's batch size that is a multiple of {data_axis}"
        f" data-parallel devices, got {batch_size}; set SCORER_BATCH_SIZE"
      )
    checks.whole(input_length, "SCORER_INPUT_LENGTH", least=2)
    checks.one_of(over, "SCORER_OVER", OVER)
    firsts = [vocabulary.encode(answer)[0] for answer in answers]
    if firsts[0] == firsts[1]:
      raise ValueError(
        f"expected answers whose first tokens differ, got {answers}, which both"
        f" begin with {firsts[0]}; set SCORER_ANSWERS"
      )
    stated = checkpoints.load_special_tokens(
      checkpoint_path, setting="SCORER_CHECKPOINT_PATH"
    )
    tokens = types.SpecialTokens.of(vocabulary)
    model = model.with_special_tokens(
      tokens._replace(start=stated.start if stated else 0)
    )
    self._vocabulary, self._length = vocabulary, input_length
    self._rows = batch_size // jax.process_count()
    self._prefix = input_prefix
    self._params = checkpoints.load_placed(
      checkpoint_path,
      *partitioning.abstract_params(
        model,
        partitioning.input_shapes({"inputs": 2, "targets": 1}),
        self._mesh,
        partitioning.parameter_rules(shard_params_over_data),
      ),
      setting="SCORER_CHECKPOINT_PATH",
      of="scorer",
    )
    self._score = partitioning.jit(
      functools.partial(entailment, model, answers=tuple(firsts), over=over),
      self._mesh,
      out_shardings=partitioning.batch_sharding(self._mesh),
    )

  def __call__(
    self,
    inputs: Sequence[str],
    outputs: Sequence[str],
    examples: Sequence[Mapping[str, Any]],
  ) -> np.ndarray:
    """Returns probabilities `[B]`, float32; see `types.Reward`."""
    del examples
    tokens = np.stack(
      [
        encode_pair(
          premise.removeprefix(self._prefix),
          hypothesis,
          self._vocabulary,
          self._length,
        )
        for premise, hypothesis in zip(inputs, outputs, strict=True)
      ]
    )
    scores = [
      self._score_rows(tokens[start : start + self._rows])
      for start in range(0, len(tokens), self._rows)
    ]
    return np.concatenate(scores)

  def _score_rows(self, tokens):
    missing = self._rows - len(tokens)
    batch = partitioning.put_batch(
      {"tokens": np.pad(tokens, ((0, missing), (0, 0)))}, self._mesh
    )
    scores = self._score(self._params, batch["tokens"])
    return partitioning.local_rows(scores)[: len(tokens)]


def _check(checkpoint_path, vocabulary, answers, input_prefix):
  """Refuses settings of wrong types, before anything is read."""
  checks.path(checkpoint_path, "SCORER_CHECKPOINT_PATH")
  if not hasattr(vocabulary, "vocab_size"):
    checks.refuse(
      "a vocabulary such as @seqio.SentencePieceVocabulary()",
      vocabulary,
      "SCORER_VOCABULARY",
    )
  are_texts = isinstance(answers, list | tuple) and all(
    isinstance(answer, str) and answer for answer in answers
  )
  if not are_texts or len(answers) != 2:
    checks.refuse("two texts such as ('1', '0')", answers, "SCORER_ANSWERS")
  if not isinstance(input_prefix, str):
    checks.refuse("a text in quotes", input_prefix, "SCORER_INPUT_PREFIX")


def entailment(
  model: types.TransformerModel,
  params: Any,
  tokens: jax.Array,
  *,
  answers: tuple[int, int],
  over: str = "vocabulary",
) -> jax.Array:
  """Computes the probability that the answer begins with the first token.

  Args:
    model: an `EncoderDecoderModel`.
    params: its parameters.
    tokens: `[B, S]` int32, premise and hypothesis.
    answers: token ids of "entailed" and "not entailed".
    over: softmax over the "vocabulary" or the two "answers".

  Returns:
    `[B]` float32.
  """
  start = jnp.full((tokens.shape[0], 1), model.special_tokens.start)
  # Up to EOS, the last token that is not 0.
  left = jnp.flip(jnp.cumsum(jnp.flip(tokens != 0, 1), axis=1), 1)
  batch = {
    "encoder_input_tokens": tokens,
    types.INPUT_MASK: (left > 0).astype(jnp.int32),
    "decoder_input_tokens": start,
    "decoder_target_tokens": jnp.ones_like(start),  # marks it as used
  }
  logits = model.logits(params, batch)[:, 0].astype(jnp.float32)
  if over == "answers":
    return jax.nn.sigmoid(logits[:, answers[0]] - logits[:, answers[1]])
  return jax.nn.softmax(logits)[:, answers[0]]


def encode_pair(
  premise: str, hypothesis: str, vocabulary: Any, length: int
) -> np.ndarray:
  """Encodes "premise: ... hypothesis: ..." as `[length]` tokens with EOS.

  If these are too many, the premise is truncated first, then the hypothesis.

  Args:
    premise: a text.
    hypothesis: the text that may follow from it.
    vocabulary: a seqio vocabulary.
    length: S.
  """
  head, tail = f"premise: {premise}", f"hypothesis: {hypothesis}"
  tokens = list(vocabulary.encode(f"{head} {tail}"))
  room = length - 1
  if len(tokens) > room:
    tail_tokens = list(vocabulary.encode(f" {tail}"))[:room]
    head_tokens = list(vocabulary.encode(head))[: room - len(tail_tokens)]
    tokens = head_tokens + tail_tokens
  row = np.zeros(length, np.int32)
  row[: len(tokens) + 1] = [*tokens, vocabulary.eos_id]
  return row
