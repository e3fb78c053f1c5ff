"""T5X's encoder-decoder model protocol on our network."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import decoding, losses, network, sampling, types

EOS_ID = 1

# Where the sequences of a step come from.
DATA, STUDENT, MIXED = "data", "student", "mixed"


class EncoderDecoderModel:
  """A T5 with T5X's model protocol.

  Args:
    module: the network.
    input_vocabulary: kept for callers that decode; not read here.
    output_vocabulary: as `input_vocabulary`.
    optimizer_def: kept for T5X's gin files; the trainer takes its own.
    decode_fn: how `predict_batch` decodes: `sampling.sample`,
      `beam_search.beam_search`, or another `types.DecodeFn`. None is
      `sampling.sample` at temperature 0 (greedy).
    default_decoder_params: options of `decode_fn` where `predict_batch_with_aux`
      is given no others, `num_decodes` and `return_all_decodes` among them.
    num_real_tokens: token ids from here on are padding of the vocabulary (T5
      has 32,100 pieces and 32,128 logits). They are never decoded, and GKD's
      divergence leaves them out; the cross-entropy and `score_batch` do not, as
      in T5X. None: there are none.
    label_smoothing: share of the target mass on the other tokens.
    z_loss: factor of log(Z)^2, per token.
    length_normalization: of `train_loss`: "token" (mean over target tokens) or
      "sequence" (mean over sequences of the mean over tokens).
    loss_normalizing_factor: divides `loss_fn`'s sum; None leaves it a sum.

  Raises:
    ValueError: `num_real_tokens` is not within 2..vocab_size.
  """

  def __init__(
    self,
    module: network.Transformer,
    input_vocabulary: Any = None,
    output_vocabulary: Any = None,
    optimizer_def: Any = None,
    decode_fn: types.DecodeFn | None = None,
    *,
    default_decoder_params: Mapping[str, Any] | None = None,
    num_real_tokens: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    length_normalization: str = "token",
    loss_normalizing_factor: float | None = None,
  ):
    self.module = module
    self.input_vocabulary = input_vocabulary
    self.output_vocabulary = output_vocabulary
    self.optimizer_def = optimizer_def
    self.decode_fn = decode_fn or _GREEDY
    self.default_decoder_params = dict(default_decoder_params or {})
    self.num_real_tokens = num_real_tokens
    self.label_smoothing = label_smoothing
    self.z_loss = z_loss
    self.length_normalization = length_normalization
    self.loss_normalizing_factor = loss_normalizing_factor
    vocab_size = self.config.vocab_size
    if num_real_tokens is not None and not 2 <= num_real_tokens <= vocab_size:
      raise ValueError(
        f"expected num_real_tokens within 2..{vocab_size}, the vocab_size, got"
        f" {num_real_tokens}; set NUM_REAL_TOKENS"
      )

  @property
  def config(self) -> network.T5Config:
    """The network's sizes."""
    return self.module.config

  @property
  def student(self) -> "EncoderDecoderModel":
    """The model that is trained: this one."""
    return self

  teacher = None

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """Returns freshly drawn `params`, and `params_axes`, their logical axes.

    Args:
      rng: key.
      input_shapes: feature name to shape, at least those of
        `encoder_input_tokens` and `decoder_input_tokens`.
      input_types: feature name to dtype, int32 by default.
    """
    types_ = input_types or {}
    encoder, decoder = (
      jnp.ones(input_shapes[name], types_.get(name, jnp.int32))
      for name in ("encoder_input_tokens", "decoder_input_tokens")
    )
    return self.module.init(
      rng, encoder, decoder, decoder, enable_dropout=False
    )

  def encode(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None = None
  ) -> jax.Array:
    """Encoded inputs `[B, S, D]`; dropout only with a key."""
    return self.module.apply(
      {"params": params},
      batch["encoder_input_tokens"],
      batch.get("encoder_segment_ids"),
      dropout_rng is not None,
      rngs=_rngs(dropout_rng),
      method="encode",
    )

  def decoder_logits(
    self,
    params: Any,
    encoded: jax.Array,
    batch: types.Batch,
    dropout_rng: jax.Array | None = None,
  ) -> jax.Array:
    """Teacher-forced logits `[B, T, V]` on the batch's decoder tokens."""
    return self.module.apply(
      {"params": params},
      encoded,
      batch["encoder_input_tokens"],
      batch["decoder_input_tokens"],
      batch["decoder_target_tokens"],
      batch.get("encoder_segment_ids"),
      batch.get("decoder_segment_ids"),
      batch.get("decoder_positions"),
      dropout_rng is not None,
      rngs=_rngs(dropout_rng),
      method="decode",
    )

  def logits(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None = None
  ) -> jax.Array:
    """Teacher-forced logits `[B, T, V]`, encoder included."""
    encoder_key, decoder_key = split_key(dropout_rng)
    encoded = self.encode(params, batch, encoder_key)
    return self.decoder_logits(params, encoded, batch, decoder_key)

  def sample(
    self,
    params: Any,
    encoded: jax.Array,
    encoder_input_tokens: jax.Array,
    key: jax.Array | None,
    *,
    max_decode_length: int,
    **sampling_options,
  ) -> sampling.SampleResult:
    """Samples one output per row; see `sampling.sample` for the options."""
    step = functools.partial(
      self._step, params, encoded, encoder_input_tokens, max_decode_length
    )
    batch_size = encoder_input_tokens.shape[0]
    return sampling.sample(
      step,
      _new_cache(step, batch_size),
      key,
      batch_size=batch_size,
      max_decode_length=max_decode_length,
      eos_id=EOS_ID,
      **sampling_options,
    )

  def _step(self, params, encoded, encoder_input_tokens, length, tokens, cache):
    """`types.TokensToLogits` of these inputs; without a cache, makes it."""
    variables = {"params": params} | ({"cache": cache} if cache else {})
    logits, updated = self.module.apply(
      variables,
      encoded,
      encoder_input_tokens,
      tokens[:, None],
      tokens[:, None],
      enable_dropout=False,
      decode=True,
      max_decode_length=length,
      mutable=["cache"],
      method="decode",
    )
    logits = logits[:, 0]
    if self.num_real_tokens is not None:
      is_real = jnp.arange(logits.shape[-1]) < self.num_real_tokens
      logits = jnp.where(is_real[None], logits, -jnp.inf)
    return logits, updated["cache"]

  def _decode(
    self,
    params,
    encoded,
    encoder_input_tokens,
    key,
    *,
    max_decode_length,
    num_decodes,
    options,
  ):
    """`decoding.decode` with `decode_fn`: tokens `[B, N, T]`, scores `[B, N]`."""
    step = functools.partial(self._step, params)

    def of_rows(factor):
      # This many rows for each prompt; keys and values of the encoded inputs
      # are computed for one, as they are equal.
      inputs = decoding.widen((encoded, encoder_input_tokens), factor)
      return functools.partial(step, *inputs, max_decode_length)

    batch_size = encoder_input_tokens.shape[0]
    cache, axes = _new_cache(of_rows(1), batch_size), None
    if num_decodes > 1:
      axes = decoding.row_axes(
        lambda factor: _new_cache(of_rows(factor), factor * batch_size)
      )
      cache = decoding.widen(cache, num_decodes, axes)
    return decoding.decode(
      self.decode_fn,
      of_rows(num_decodes),
      cache,
      key,
      batch_size=batch_size,
      num_decodes=num_decodes,
      options=options,
      max_decode_length=max_decode_length,
      eos_id=EOS_ID,
      row_axes=axes,
    )

  def train_loss(
    self,
    params: Any,
    teacher_params: Any,
    batch: types.Batch,
    *,
    source: str,
    step: jax.Array,
    key: jax.Array,
    row_ids: jax.Array,
  ) -> tuple[jax.Array, jax.Array, types.Metrics]:
    """Cross-entropy on the data (SFT): (loss_sum, weight_sum, metrics).

    Args:
      params: of the network.
      teacher_params: not read.
      batch: T5X's features, `[B, ...]`.
      source: "data"; nothing else is possible without a teacher.
      step: not read.
      key: of this step and microbatch.
      row_ids: not read.
    """
    del teacher_params, step, row_ids
    if source != DATA:
      raise ValueError(f"expected source {DATA!r} for SFT, got {source!r}")
    dropout_key = key if self.config.dropout_rate > 0 else None
    return self._cross_entropy(
      params, batch, dropout_key, self.length_normalization
    )

  def _cross_entropy(self, params, batch, dropout_rng, normalization):
    targets = batch["decoder_target_tokens"]
    return losses.cross_entropy_loss(
      self.logits(params, batch, dropout_rng),
      targets,
      loss_weights(batch),
      label_smoothing=self.label_smoothing,
      z_loss=self.z_loss,
      length_normalization=normalization,
      segment_ids=batch.get("decoder_segment_ids"),
    )

  def loss_fn(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None
  ) -> tuple[jax.Array, types.Metrics]:
    """T5X's loss: cross-entropy summed over target tokens, and metrics."""
    loss, _, metrics = self._cross_entropy(params, batch, dropout_rng, "token")
    if self.loss_normalizing_factor is not None:
      loss = loss / self.loss_normalizing_factor
    return loss, metrics

  def eval_fn(
    self, params: Any, batch: types.Batch
  ) -> tuple[jax.Array, types.Metrics]:
    """`loss_fn` without dropout."""
    return self.loss_fn(params, batch, None)

  def predict_batch(
    self, params: Any, batch: types.Batch, rng: jax.Array | None = None
  ) -> jax.Array:
    """The best output of each row `[B, T]`, zeros after EOS."""
    return self.predict_batch_with_aux(
      params, batch, rng, return_all_decodes=False
    )[0]

  def predict_batch_with_aux(
    self,
    params: Any,
    batch: types.Batch,
    rng: jax.Array | None = None,
    decoder_params: Mapping[str, Any] | None = None,
    return_all_decodes: bool | None = None,
    num_decodes: int | None = None,
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Outputs and their scores.

    Args:
      params: of the network.
      batch: the output length is that of `decoder_input_tokens`.
      rng: key; may be None where nothing is drawn.
      decoder_params: options of `decode_fn`, over `default_decoder_params`.
      return_all_decodes: return all N outputs, not the best. By default what
        the two dictionaries hold, else False.
      num_decodes: N, samples or beams for each row. By default what the two
        dictionaries hold, else 1.

    Returns:
      Tokens `[B, T]`, and `{"scores": [B]}`: the summed log-probs of a sample
      in nats, or the scores of `beam_search`. With `return_all_decodes`, tokens
      `[B, N, T]` and scores `[B, N]` in ascending order.

    Raises:
      ValueError: N below 1, or an option that `decode_fn` does not take.
    """
    options = self.default_decoder_params | dict(decoder_params or {})
    of_options = options.pop("num_decodes", 1)
    if num_decodes is None:
      num_decodes = int(of_options)
    of_options = options.pop("return_all_decodes", False)
    return_all = (
      of_options if return_all_decodes is None else return_all_decodes
    )
    if num_decodes < 1:
      raise ValueError(
        f"expected at least 1 decode, got {num_decodes}; set num_decodes"
      )
    tokens, scores = self._decode(
      params,
      self.encode(params, batch),
      batch["encoder_input_tokens"],
      rng,
      max_decode_length=batch["decoder_input_tokens"].shape[1],
      num_decodes=num_decodes,
      options=options,
    )
    if return_all:
      return tokens, {"scores": scores}
    return tokens[:, -1], {"scores": scores[:, -1]}

  def with_decode_fn(
    self, decode_fn: types.DecodeFn | None = None, **default_decoder_params: Any
  ) -> "EncoderDecoderModel":
    """This model with another `decode_fn` and its options; None is greedy."""
    chosen = decode_fn or _GREEDY
    if (chosen, default_decoder_params) == (
      self.decode_fn,
      self.default_decoder_params,
    ):
      return self  # what was compiled for it is used again
    model = copy.copy(self)
    model.decode_fn = chosen
    model.default_decoder_params = default_decoder_params
    return model

  def score_batch(self, params: Any, batch: types.Batch) -> jax.Array:
    """Log-prob of each row's targets, `[B]`, nats summed over tokens."""
    log_probs = jax.nn.log_softmax(self.logits(params, batch))
    targets = batch["decoder_target_tokens"]
    picked = jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)
    return jnp.sum(picked[:, :, 0] * loss_weights(batch), axis=-1)


def loss_weights(batch: types.Batch) -> jax.Array:
  """Returns the loss weights `[B, T]`, float32; without the feature, 1 where a target stands."""
  weights = batch.get("decoder_loss_weights")
  if weights is None:
    weights = batch["decoder_target_tokens"] > 0
  return weights.astype(jnp.float32)


_GREEDY = functools.partial(sampling.sample, temperature=0.0)


def _new_cache(step, rows):
  """The cache of a `_step` before the first token, cross-attention included."""
  return step(jnp.zeros((rows,), jnp.int32), None)[1]


def _rngs(key: jax.Array | None) -> dict[str, jax.Array]:
  return {} if key is None else {"dropout": key}


def split_key(key: jax.Array | None) -> tuple:
  """Two keys from one, or twice None: dropout on both sides or on neither."""
  return (None, None) if key is None else tuple(jax.random.split(key))
