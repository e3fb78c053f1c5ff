"""T5X's decoder-only model protocol on our network.

A row is seqio's (`PrefixLMFeatureConverter`): prompt, output, padding, in S + T
positions for lengths {'inputs': S, 'targets': T}. For prompt 9 4 1 and output 3 1
in a row of 7:

  decoder_target_tokens     9 4 1 3 1 0 0
  decoder_input_tokens      0 9 4 1 3 1 0
  decoder_causal_attention  1 1 1 1 0 0 0   one more than the prompt has tokens
  decoder_loss_weights      0 0 0 1 1 0 0

The output's first token is predicted at position n, where the prompt's last token
is the input; n = 3 is the prompt's length. A sampled output replaces the row's own
from position n on and may fill the row.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax import checks, decoding, network, types
from gkd_jax.decoding import sampling
from gkd_jax.models import base_model, random_keys
from gkd_jax.network import projections


class DecoderOnlyModel(base_model.BaseTransformerModel):
  """A decoder-only transformer with T5X's model protocol.

  The loss counts outputs only: a prompt's tokens have weight 0, whatever
  `decoder_loss_weights` says.

  Args:
    module: the network.
    vocabulary: see `output_vocabulary` of `BaseTransformerModel`.
    optimizer_def: kept for T5X's gin files; the trainer takes its own.
    decode_fn: how `predict_batch` decodes: `decoding.sample`,
      `decoding.beam_search`, or another `types.DecodeFn` that takes
      `start_tokens` and `row_lengths`, since each row goes on from its own
      prompt and has its own room. None is greedy.
    inputs_bidirectional_attention: True for a prefix LM, whose prompt is read in
      both directions. False for causal attention everywhere.
    feature_converter_cls: a name in seqio, or a class. By default a prompt and
      an output make a row, or an output alone where the lengths name no inputs.
    max_output_length: longest sampled or predicted output; None: a row's end.
    **settings: see `BaseTransformerModel`.

  Raises:
    ValueError: `max_output_length` is below 1, or a `decode_fn` that cannot go on
      from prompts.
  """

  FEATURE_CONVERTER_CLS: Any = "DecoderFeatureConverter"

  def __init__(
    self,
    module: network.DecoderWrapper,
    vocabulary: Any = None,
    optimizer_def: Any = None,
    decode_fn: types.DecodeFn | None = None,
    *,
    inputs_bidirectional_attention: bool = False,
    feature_converter_cls: Any = None,
    max_output_length: int | None = None,
    **settings: Any,
  ):
    super().__init__(
      module, vocabulary, vocabulary, optimizer_def, decode_fn, **settings
    )
    self.inputs_bidirectional_attention = inputs_bidirectional_attention
    if feature_converter_cls is not None:
      self.FEATURE_CONVERTER_CLS = feature_converter_cls
    self.max_output_length = max_output_length
    checks.boolean(inputs_bidirectional_attention, "PREFIX_LM")
    checks.whole(
      max_output_length, "models.DecoderOnlyModel.max_output_length", none=True
    )
    _check_decode_fn(self.decode_fn)

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """See `types.TransformerModel`; reads `decoder_input_tokens` alone."""
    dtype = (input_types or {}).get("decoder_input_tokens", jnp.int32)
    tokens = jnp.ones(input_shapes["decoder_input_tokens"], dtype)
    return self.module.init(rng, tokens, tokens, enable_dropout=False)

  def encode(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None = None
  ) -> tuple:
    """Returns an empty tuple: prompt and output are one decoder row."""
    del params, batch, dropout_rng
    return ()

  def decoder_logits(
    self,
    params: Any,
    encoded: tuple,
    batch: types.Batch,
    dropout_rng: jax.Array | None = None,
  ) -> jax.Array:
    """Returns teacher-forced logits `[B, T, V]` of whole rows."""
    del encoded
    return self._decoder(params, batch, dropout_rng)

  def decoder_hidden(
    self,
    params: Any,
    encoded: tuple,
    batch: types.Batch,
    dropout_rng: jax.Array | None = None,
  ) -> jax.Array:
    """See `types.TransformerModel.decoder_hidden`."""
    del encoded
    return self._decoder(params, batch, dropout_rng, return_hidden=True)

  def _decoder(self, params, batch, dropout_rng, **options):
    return self.module.apply(
      {"params": params},
      batch["decoder_input_tokens"],
      self._marked(batch["decoder_target_tokens"]),
      batch.get("decoder_segment_ids"),
      batch.get("decoder_positions"),
      self._causal_attention(batch),
      enable_dropout=dropout_rng is not None,
      rngs=random_keys.rngs(dropout_rng),
      **options,
    )

  def output_head(self, params: Any) -> projections.Head:
    """See `types.TransformerModel.output_head`."""
    decoder = params["decoder"]
    if self.config.logits_via_embedding:
      return projections.head(decoder["token_embedder"], tied=True)
    return projections.head(decoder["logits_dense"], tied=False)

  def logits(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None = None
  ) -> jax.Array:
    """Returns teacher-forced logits `[B, T, V]` of whole rows."""
    return self.decoder_logits(params, (), batch, dropout_rng)

  def _causal_attention(self, batch):
    if not self.inputs_bidirectional_attention:
      return None
    return _prompt_mask(batch)

  def loss_weights(self, batch: types.Batch) -> jax.Array:
    """Returns loss weights `[B, T]`, float32, 0 on prompts and padding."""
    weights = super().loss_weights(batch)
    if "decoder_causal_attention" not in batch:
      return weights
    mask = batch["decoder_causal_attention"] > 0
    # The last position of a prompt's mask has the output's first token as its
    # target; each one before it has a token of the prompt.
    next_too = mask[:, 1:]
    segments = batch.get("decoder_segment_ids")
    if segments is not None:
      next_too &= segments[:, 1:] == segments[:, :-1]
    of_prompt = mask & jnp.pad(next_too, ((0, 0), (0, 1)))
    return jnp.where(of_prompt, 0.0, weights)

  def start_decoding(
    self,
    params: Any,
    encoded: tuple,
    batch: types.Batch,
    *,
    num_decodes: int = 1,
    slots: int | None = None,
  ) -> tuple[types.TokensToLogits, types.PyTree, dict[str, Any]]:
    """See `types.TransformerModel.start_decoding`.

    All prompts go through the network together, once, and leave their keys and
    values in the cache. The batch has `decoder_input_tokens` and, if there are
    prompts, `decoder_causal_attention`, unpacked.

    Raises:
      ValueError: packed rows.
    """
    del encoded
    make = lambda factor: self._prefill(
      params, decoding.repeat_rows(dict(batch), factor)
    )
    axes = None
    if num_decodes > 1 or slots is not None:
      axes = decoding.row_axes(make)
    prefilled = decoding.repeat_rows(make(1), num_decodes, axes)
    rows = {
      "start_tokens": prefilled.start_tokens,
      "row_lengths": prefilled.row_lengths,
      "row_axes": axes and axes.cache,
    }
    step = functools.partial(self._step, self._decoding_params(params))
    return step, prefilled.cache, rows

  def _step(self, params, tokens, cache):
    """`types.TokensToLogits`."""
    logits, updated = self._decoding_module.apply(
      {"params": params, "cache": cache},
      tokens[:, None],
      tokens[:, None],
      enable_dropout=False,
      decode=True,
      mutable=["cache"],
    )
    return self._of_real_tokens(logits[:, 0]), updated["cache"]

  def _prefill(self, params, batch):
    """Runs the prompts through the network; returns where each output begins."""
    if "decoder_segment_ids" in batch:
      raise ValueError(
        "expected unpacked rows for decoding, got decoder_segment_ids;"
        " set PACK = False"
      )
    mask, lengths = _prompt_mask(batch), _prompt_lengths(batch)
    prompts = batch["decoder_input_tokens"] * mask
    _, made = self._decoding_module.apply(
      {"params": self._unstacked(params)},
      prompts,
      # As targets they mark the positions that count: the prompt's, and the one
      # at which its last token is read.
      mask,
      decoder_causal_attention=self._causal_attention(batch),
      enable_dropout=False,
      prefill=True,
      prefill_lengths=lengths,
      mutable=["cache"],
    )
    room = prompts.shape[1] - lengths
    if self.max_output_length is not None:
      room = jnp.minimum(room, self.max_output_length)
    last = jnp.take_along_axis(prompts, lengths[:, None], axis=1)[:, 0]
    return _Prefilled(made["cache"], last, room)

  def has_inputs(self, batch: types.Batch) -> jax.Array:
    """See `types.TransformerModel.has_inputs`."""
    return jnp.any(_prompt_mask(batch) > 0, axis=1)

  def output_features(
    self, batch: types.Batch, tokens: jax.Array, weights: jax.Array
  ) -> dict[str, jax.Array]:
    """See `types.TransformerModel`; puts each output right after its prompt."""
    place = jnp.arange(tokens.shape[1])[None] - _prompt_lengths(batch)[:, None]

    def after_prompt(outputs):
      moved = jnp.take_along_axis(outputs, jnp.maximum(place, 0), axis=1)
      return jnp.where(place >= 0, moved, 0)

    prompts = jnp.where(place < 0, batch["decoder_target_tokens"], 0)
    targets = prompts + after_prompt(tokens)
    return {
      "decoder_target_tokens": targets,
      "decoder_input_tokens": sampling.shift_right(
        targets, self.special_tokens.start
      ),
      "decoder_loss_weights": after_prompt(weights),
    }


class _Prefilled(NamedTuple):
  """The state after the prompts.

  Attributes:
    cache: of the network; the next position of each row is its prompt's length.
    start_tokens: `[B]` int32, to feed first: each prompt's last token.
    row_lengths: `[B]` int32, longest output of each row.
  """

  cache: types.PyTree
  start_tokens: jax.Array
  row_lengths: jax.Array


def _check_decode_fn(decode_fn):
  parameters = inspect.signature(decode_fn).parameters
  missing = {"start_tokens", "row_lengths"} - set(parameters)
  if missing:
    raise ValueError(
      "expected a decode function that takes start_tokens and row_lengths, got"
      f" one without {', '.join(sorted(missing))}; set DECODE_FN = None or"
      " @beam_search.beam_search"
    )


def _prompt_mask(batch):
  """`decoder_causal_attention`, int32 `[B, T]`; rows of an output alone have none."""
  if "decoder_causal_attention" in batch:
    return batch["decoder_causal_attention"]
  # One position more than the prompt, which is empty.
  return jnp.zeros_like(batch["decoder_input_tokens"]).at[:, 0].set(1)


def _prompt_lengths(batch):
  """Returns each prompt's length in tokens, int32 `[B]`; 0 for padding."""
  return jnp.maximum(jnp.sum(_prompt_mask(batch), axis=1) - 1, 0)
