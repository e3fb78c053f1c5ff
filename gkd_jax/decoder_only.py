"""T5X's decoder-only model protocol on our network.

A row is seqio's (`PrefixLMFeatureConverter`): the prompt, the output right after
it, then padding, in S + T positions for lengths {'inputs': S, 'targets': T}. With
prompt 9 4 1 and output 3 1 in a row of 7:

  decoder_target_tokens     9 4 1 3 1 0 0
  decoder_input_tokens      0 9 4 1 3 1 0
  decoder_causal_attention  1 1 1 1 0 0 0   one more than the prompt has tokens
  decoder_loss_weights      0 0 0 1 1 0 0

The output's first token is predicted at position n, where the prompt's last token
is read; n = 3 is the prompt's length. A sampled output of a row takes the place of
the one that it holds, from its own n on, and may fill the row.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import base_model, decoder_only_network, sampling, types


class DecoderOnlyModel(base_model.BaseTransformerModel):
  """A decoder-only transformer with T5X's model protocol.

  The loss is on outputs alone: a prompt's tokens have no weight, whatever
  `decoder_loss_weights` says.

  Args:
    module: the network.
    vocabulary: kept for callers that decode; not read here.
    optimizer_def: kept for T5X's gin files; the trainer takes its own.
    inputs_bidirectional_attention: True for a prefix LM, whose prompt is read in
      both directions. False for causal attention everywhere.
    feature_converter_cls: a name in seqio, or a class. By default a prompt and
      an output make a row, or an output alone where the lengths name no inputs.
    max_output_length: longest sampled or predicted output; None: a row's end.
    label_smoothing: share of the target mass on the other tokens.
    z_loss: factor of log(Z)^2, per token.
    length_normalization: of `train_loss`: "token" (mean over target tokens) or
      "sequence" (mean over sequences of the mean over tokens).
    loss_normalizing_factor: divides `loss_fn`'s sum; None leaves it a sum.

  Raises:
    ValueError: `max_output_length` is below 1.
  """

  FEATURE_CONVERTER_CLS: Any = "DecoderFeatureConverter"

  def __init__(
    self,
    module: decoder_only_network.DecoderWrapper,
    vocabulary: Any = None,
    optimizer_def: Any = None,
    *,
    inputs_bidirectional_attention: bool = False,
    feature_converter_cls: Any = None,
    max_output_length: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    length_normalization: str = "token",
    loss_normalizing_factor: float | None = None,
  ):
    self.module = module
    self.input_vocabulary = self.output_vocabulary = vocabulary
    self.optimizer_def = optimizer_def
    self.inputs_bidirectional_attention = inputs_bidirectional_attention
    if feature_converter_cls is not None:
      self.FEATURE_CONVERTER_CLS = feature_converter_cls
    self.max_output_length = max_output_length
    self.label_smoothing = label_smoothing
    self.z_loss = z_loss
    self.length_normalization = length_normalization
    self.loss_normalizing_factor = loss_normalizing_factor
    if max_output_length is not None and max_output_length < 1:
      raise ValueError(
        f"expected a longest output of at least 1, got {max_output_length};"
        " set models.DecoderOnlyModel.max_output_length"
      )

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
    """Nothing: prompt and output are one row, and go through it together."""
    del params, batch, dropout_rng
    return ()

  def decoder_logits(
    self,
    params: Any,
    encoded: tuple,
    batch: types.Batch,
    dropout_rng: jax.Array | None = None,
  ) -> jax.Array:
    """Teacher-forced logits `[B, T, V]` of whole rows."""
    del encoded
    return self.module.apply(
      {"params": params},
      batch["decoder_input_tokens"],
      batch["decoder_target_tokens"],
      batch.get("decoder_segment_ids"),
      batch.get("decoder_positions"),
      self._causal_attention(batch),
      enable_dropout=dropout_rng is not None,
      rngs=base_model.rngs(dropout_rng),
    )

  def logits(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None = None
  ) -> jax.Array:
    """Teacher-forced logits `[B, T, V]` of whole rows."""
    return self.decoder_logits(params, (), batch, dropout_rng)

  def _causal_attention(self, batch):
    if not self.inputs_bidirectional_attention:
      return None
    return _prompt_mask(batch)

  def loss_weights(self, batch: types.Batch) -> jax.Array:
    """Weights of the loss `[B, T]`, float32, 0 on prompts and padding."""
    weights = base_model.loss_weights(batch)
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

  def sample(
    self,
    params: Any,
    batch: types.Batch,
    key: jax.Array | None,
    **sampling_options,
  ) -> sampling.SampleResult:
    """Samples an output after each row's prompt.

    The prompts go through the network once, together, and leave their keys and
    values in the cache; then one step follows per token of the longest output.

    Args:
      params: of the network.
      batch: `decoder_input_tokens` and `decoder_causal_attention`, unpacked;
        an output in the row is not read.
      key: random key; may be None at temperature 0.
      **sampling_options: of `sampling.sample`.

    Returns:
      Tokens and log-probs, `[B, T]` each, from the output's first token on; zeros
      after EOS and from where the row is full.

    Raises:
      ValueError: packed rows, or rows without a prompt's mask.
    """
    if "decoder_segment_ids" in batch:
      raise ValueError(
        "expected unpacked rows for decoding, got decoder_segment_ids;"
        " set PACK = False"
      )
    prompts = batch["decoder_input_tokens"] * _prompt_mask(batch)
    lengths = _prompt_lengths(batch)
    batch_size, width = prompts.shape
    room = width - lengths
    if self.max_output_length is not None:
      room = jnp.minimum(room, self.max_output_length)

    def step(tokens, cache):
      logits, updated = self.module.apply(
        {"params": params, "cache": cache},
        tokens[:, None],
        tokens[:, None],
        enable_dropout=False,
        decode=True,
        mutable=["cache"],
      )
      return logits[:, 0], updated["cache"]

    last = jnp.take_along_axis(prompts, lengths[:, None], axis=1)[:, 0]
    return sampling.sample(
      step,
      self._prefill(params, batch, prompts, lengths),
      key,
      batch_size=batch_size,
      max_decode_length=width,
      eos_id=base_model.EOS_ID,
      start_tokens=last,
      row_lengths=room,
      **sampling_options,
    )

  def _prefill(self, params, batch, prompts, lengths):
    """The cache of the prompts, each row to go on from its own length."""
    _, made = self.module.apply(
      {"params": params},
      prompts,
      # As targets they mark the positions that count: the prompt's, and the one
      # at which its last token is read.
      _prompt_mask(batch),
      decoder_causal_attention=self._causal_attention(batch),
      enable_dropout=False,
      prefill=True,
      prefill_lengths=lengths,
      mutable=["cache"],
    )
    return made["cache"]

  def sample_outputs(
    self,
    params: Any,
    encoded: tuple,
    batch: types.Batch,
    key: jax.Array,
    **sampling_options,
  ) -> tuple[jax.Array, jax.Array]:
    """See `types.TransformerModel.sample_outputs`."""
    del encoded
    tokens = self.sample(params, batch, key, **sampling_options).tokens
    # Not by EOS alone: a row that is cut has zeros after its end too.
    return tokens, (tokens != sampling.PAD_ID).astype(jnp.float32)

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
      "decoder_input_tokens": sampling.shift_right(targets),
      "decoder_loss_weights": after_prompt(weights),
    }

  def predict_batch_with_aux(
    self,
    params: Any,
    batch: types.Batch,
    rng: jax.Array | None = None,
    decoder_params: Mapping[str, Any] | None = None,
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Outputs and their scores.

    Args:
      params: of the network.
      batch: see `sample`.
      rng: key; may be None for greedy decoding.
      decoder_params: options of `sampling.sample`; greedy by default.

    Returns:
      Tokens `[B, T]`, the outputs without their prompts, and
      `{"scores": [B]}`: the summed log-probs in nats.
    """
    options = {"temperature": 0.0} | dict(decoder_params or {})
    tokens, log_probs = self.sample(params, batch, rng, **options)
    return tokens, {"scores": jnp.sum(log_probs, axis=-1)}


def _prompt_mask(batch):
  """`decoder_causal_attention`, int32 `[B, T]`."""
  if "decoder_causal_attention" not in batch:
    raise ValueError(
      "expected rows of a prompt and an output, got none with"
      " decoder_causal_attention; set TASK_FEATURE_LENGTHS to the lengths of"
      " 'inputs' and 'targets'"
    )
  return batch["decoder_causal_attention"]


def _prompt_lengths(batch):
  """Tokens of each prompt, int32 `[B]`; 0 for a row of padding."""
  return jnp.maximum(jnp.sum(_prompt_mask(batch), axis=1) - 1, 0)
