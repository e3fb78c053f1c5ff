"""The dimension key, and the types that modules agree on.

Shapes in docstrings, in trailing comments and in the suffixes of local names
use these letters, everywhere in the package:

  | letter | meaning                                             |
  |--------|-----------------------------------------------------|
  | `B`    | batch: rows of one (micro)batch, over all devices   |
  | `N`    | samples or beams per prompt                         |
  | `S`    | encoder length, in tokens                           |
  | `T`    | decoder length, in tokens                           |
  | `V`    | vocabulary, padding to a round size included        |
  | `D`    | width of the residual stream (`emb_dim`)            |
  | `H`    | attention heads                                     |
  | `K`    | width of one head (`head_dim`)                      |
  | `F`    | width of the MLP's hidden layer (`mlp_dim`)         |

`[...]` stands for any leading dimensions, `[]` for a scalar. p is the teacher
and q the student, in that order in every signature.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

PyTree = Any
"""Nested containers of arrays: parameters, a KV cache, an optimizer state."""
Batch = Mapping[str, jax.Array]
"""Feature name (T5X's, e.g. `decoder_target_tokens`) to an array `[B, ...]`."""
TOP_K_IDS, TOP_K_LOG_PROBS = "top_k_ids", "top_k_log_probs"
"""Features of a batch with a teacher's stored top-k log-probs: ids `[B, T, k]`, and
log-probs `[B, T, k + 1]`, the last of all other tokens together."""

ADVANTAGES, REWARDS = "advantages", "rewards"
"""Features of a batch whose outputs a reward has scored: `[B, T]` and `[B]`."""

FROM_DATA = "from_data"
"""Feature of a batch that a step adds, `[B]` bool: whether a row's outputs are the
data's. Without it none are."""

INPUT_MASK = "encoder_input_mask"
"""Feature of a batch of data in which 0 is a token: 1 at each token of
`encoder_input_tokens`, 0 at padding. Other batches have none."""

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name to `(sum, weight)`, both `[]` float32: sums add up over microbatches,
devices and steps, and are divided by the summed weight once, at the end."""


Encoded = tuple[PyTree, PyTree]
"""A model's parameters and its encoded inputs, from `TransformerModel.encode`."""


class SpecialTokens(NamedTuple):
  """The ids that a vocabulary and a model give a meaning; T5's by default.

  Which positions of a row count is never read from these ids, but from the masks
  and weights that the data or the sampler make. What does not count is 0.

  Attributes:
    eos: each of these ids ends a sequence; () never ends one.
    pad: an id that stands for no token, and may be one of `eos`; None: the
      vocabulary has none.
    start: what the decoder reads before the first token.
    zero_is_padding: whether T5X's rule `token > 0` finds the tokens of the data.
      Where it does not, batches have `INPUT_MASK`.
  """

  eos: tuple[int, ...] = (1,)
  pad: int | None = 0
  start: int = 0
  zero_is_padding: bool = True

  @property
  def eos_id(self) -> int | tuple[int, ...]:
    """The argument of `DecodeFn`: an id, several, or -1, which is no token's."""
    return self.eos[0] if len(self.eos) == 1 else self.eos or -1

  @property
  def never_sampled(self) -> tuple[int, ...]:
    """PAD, unless it ends sequences: training samples texts."""
    if self.pad is None or self.pad in self.eos:
      return ()
    return (self.pad,)

  @classmethod
  def of(cls, vocabulary: Any) -> "SpecialTokens":
    """Returns a vocabulary's; `start` is 0, as seqio's converters have it.

    Args:
      vocabulary: seqio's. One with several EOS has them as `eos_ids`.
    """
    read = lambda name: _token_id(vocabulary, name)
    several = getattr(vocabulary, "eos_ids", None) or (read("eos_id"),)
    eos = tuple(int(i) for i in several if i is not None)
    pad, tokenizer = read("pad_id"), getattr(vocabulary, "tokenizer", None)
    if hasattr(tokenizer, "pad_id"):
      # seqio says 0 of every SentencePiece model.
      pad = _token_id(tokenizer, "pad_id")
    if pad == read("unk_id"):
      pad = None
    return cls(eos, pad, zero_is_padding=pad == 0 and 0 not in eos)


T5_TOKENS = SpecialTokens()


def _token_id(of: Any, name: str) -> int | None:
  """Returns an id, a number or SentencePiece's method; None: there is none."""
  try:
    value: Any = getattr(of, name, None)
  except NotImplementedError:  # seqio's `bos_id`
    return None
  value = value() if callable(value) else value
  return None if value is None or value < 0 else int(value)


class StepInputs(NamedTuple):
  """What a training step tells the loss, besides parameters and batch.

  Attributes:
    source: whose outputs: "data", "student", or "mixed" (a coin per row).
    step: `[]` int32, for schedules.
    key: `[]` random key of this step.
    row_ids: `[B]` int32, place of each row in the whole batch.
  """

  source: str
  step: jax.Array
  key: jax.Array
  row_ids: jax.Array


class Int8Matrix(NamedTuple):
  """A matrix in a quarter of float32's memory.

  Attributes:
    values: `[D, V]` int8.
    scales: `[V]` float32; column v is `values[:, v] * scales[v]`.
  """

  values: jax.Array
  scales: jax.Array


class TokensToLogits(Protocol):
  """One step of incremental decoding."""

  def __call__(
    self, tokens: jax.Array, cache: PyTree, /
  ) -> tuple[jax.Array, PyTree]:
    """Reads one token per row and scores the next one.

    Args:
      tokens: `[B]` int32, the token of each row at the current position.
      cache: what the model keeps between steps, positions included; any tree.

    Returns:
      `(logits, cache)`: `[B, V]` logits of the next token in any float type,
      and the cache after this step, with the same shapes and types.
    """
    ...


class TransformerModel(Protocol):
  """What distillation needs of a student and of a teacher.

  `models.BaseTransformerModel` adds T5X's losses, scores and predictions. T is
  the decoder's length, prompts in decoder rows included.
  """

  num_real_tokens: int | None
  """Token ids from here on are vocabulary padding; None: no padding."""

  FEATURE_CONVERTER_CLS: Any
  """seqio's feature converter: a name in seqio, or a class. Student and teacher
  have the same."""

  @property
  def special_tokens(self) -> SpecialTokens:
    """What ends a sequence, and what the decoder reads first."""
    ...

  def with_special_tokens(self, special_tokens: SpecialTokens) -> Any:
    """Returns this model with other special tokens."""
    ...

  @property
  def config(self) -> Any:
    """The network's configuration: `vocab_size`, `dropout_rate` and sizes."""
    ...

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """Returns freshly drawn `params`, and `params_axes`, their logical axes.

    Args:
      rng: random key.
      input_shapes: feature name to shape, at least those of the input tokens.
      input_types: feature name to dtype, int32 by default.
    """
    ...

  def encode(
    self, params: Any, batch: Batch, dropout_rng: jax.Array | None = None
  ) -> PyTree:
    """Returns the encoded inputs, which sampling and the loss share.

    That is `[B, S, D]`, or an empty tree where there is no encoder. Dropout only
    with a key.
    """
    ...

  def decoder_logits(
    self,
    params: Any,
    encoded: Any,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
  ) -> jax.Array:
    """Returns teacher-forced logits `[B, T, V]` of the batch's outputs."""
    ...

  def decoder_hidden(
    self,
    params: Any,
    encoded: Any,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
  ) -> jax.Array:
    """Returns hidden states `[B, T, D]`; times `output_head` they are the logits.

    With a `final_softcap` they are the logits before it.
    """
    ...

  @property
  def final_softcap(self) -> float | None:
    """c of c tanh(x / c) on the output's logits; None: there is none."""
    ...

  def output_head(self, params: Any) -> Any:
    """Returns the head `[D, V]`; see `losses.fused_distillation_loss`."""
    ...

  def decoder_params(self, params: Any) -> Any:
    """Returns the parameters that the decoder and its head read."""
    ...

  def start_decoding(
    self,
    params: Any,
    encoded: Any,
    batch: Batch,
    *,
    num_decodes: int = 1,
    slots: int | None = None,
  ) -> tuple[TokensToLogits, PyTree, dict[str, Any]]:
    """Returns the decode step, its initial cache and arguments for each row.

    Args:
      params: of the network.
      encoded: from `encode`.
      batch: features; outputs in them are not read.
      num_decodes: N, rows of the cache for each prompt.
      slots: see `decoding.sample`.

    Returns:
      A step, the cache before the first token, and the arguments of
      `decoding.sample` that depend on the rows: `row_axes` and, where rows
      differ in where they start or end, `start_tokens` and `row_lengths`.
    """
    ...

  def has_inputs(self, batch: Batch) -> jax.Array:
    """Returns whether each row holds an example, `[B]` bool, not just padding."""
    ...

  def output_features(
    self, batch: Batch, tokens: jax.Array, weights: jax.Array
  ) -> dict[str, jax.Array]:
    """Returns the features that change when the rows get other outputs.

    Args:
      batch: features before.
      tokens: `[B, T]` int32, from `GKDModel.draw`.
      weights: `[B, T]` float32, from `GKDModel.draw`.
    """
    ...

  def loss_weights(self, batch: Batch) -> jax.Array:
    """Returns loss weights `[B, T]` float32, 0 at prompts and padding."""
    ...


class DecodeFn(Protocol):
  """What `decoding.sample` and `decoding.beam_search` have in common."""

  def __call__(
    self,
    tokens_to_logits: TokensToLogits,
    cache: PyTree,
    key: jax.Array | None,
    /,
    *,
    batch_size: int,
    max_decode_length: int,
    num_decodes: int,
    eos_id: int | Sequence[int],
    row_axes: PyTree | None,
    **options: Any,
  ) -> tuple[jax.Array, jax.Array]:
    """Decodes N outputs for each of B prompts.

    Args:
      tokens_to_logits: of B N rows; row b N + n is prompt b's n-th.
      cache: the model's state before the first token, of B N rows; those of one
        prompt are equal.
      key: random key, None where nothing is drawn.
      batch_size: B.
      max_decode_length: T, EOS included.
      num_decodes: N.
      eos_id: the token that ends an output, or several.
      row_axes: tree of the cache's structure: the axis of each leaf's rows, -1
        for a leaf without rows; None where nothing moves rows.
      **options: the decode function's own.

    Returns:
      Tokens `[B, N, T]` and scores `[B, N]` in ascending order; or, as `sample`
      does, tokens and their log-probs in nats, `[B N, T]` each.
    """
    ...


class Reward(Protocol):
  """How good outputs are, judged on the host from decoded texts."""

  def __call__(
    self,
    inputs: Sequence[str],
    outputs: Sequence[str],
    examples: Sequence[Mapping[str, Any]],
    /,
  ) -> Sequence[float | None]:
    """Judges each output.

    Args:
      inputs: B decoded inputs.
      outputs: B decoded outputs; one input may come several times.
      examples: B examples, at least `inputs` and `targets`, decoded; a task
        without references has an empty text there. `ended` is whether the
        output has ended, and was not cut at its longest length.

    Returns:
      `[B]` floats, the higher the better. None or NaN for an output that cannot
      be judged, which is then not reinforced.
    """
    ...


class Divergence(Protocol):
  """A divergence D(p ‖ q) between two next-token distributions, by position."""

  def __call__(
    self, teacher_log_probs: jax.Array, student_log_probs: jax.Array, /
  ) -> jax.Array:
    """Returns the divergence of the student from the teacher.

    Args:
      teacher_log_probs: `[..., V]` log p, normalised, in nats.
      student_log_probs: `[..., V]` log q, normalised, in nats.

    Returns:
      `[...]` float32, nats per position.
    """
    ...


class Schedule(Protocol):
  """A number that depends on the training step."""

  def __call__(self, step: int | jax.Array, /) -> Any:
    """Returns the value at `step`, a float32 scalar.

    Args:
      step: `[]` updates made so far; a Python integer on the host, or a traced
        integer in a compiled step.
    """
    ...
