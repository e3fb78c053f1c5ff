"""T5X's model protocol, shared by encoder-decoders and decoder-only models.

A subclass computes logits, says which positions of a row are outputs, and starts
decoding; losses, scores, samples and predictions follow from these.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import checks, decoding, losses, partitioning, types
from gkd_jax.models import outputs, random_keys
from gkd_jax.network import layer_loops, projections

# Where the sequences of a step come from.
DATA, STUDENT, MIXED = "data", "student", "mixed"


class BaseTransformerModel:
  """A network with T5X's losses, scores and predictions.

  Args:
    module: the network.
    input_vocabulary: for callers that decode; not read here.
    output_vocabulary: likewise, but for its special tokens.
    optimizer_def: for T5X's gin files; not read here.
    decode_fn: how `predict_batch` decodes: `decoding.sample`,
      `decoding.beam_search`, or another `types.DecodeFn`. None is
      `decoding.sample` at temperature 0 (greedy).
    default_decoder_params: options of `decode_fn`, including `num_decodes` and
      `return_all_decodes`, that `predict_batch_with_aux` may override.
    num_real_tokens: token ids from here on are vocabulary padding (T5 has 32,100
      pieces and 32,128 logits). They are never decoded and have no mass in the
      divergence. The cross-entropy and `score_batch` include them, as in T5X.
      None: no padding.
    label_smoothing: share of the target mass on the other tokens.
    z_loss: factor of log(Z)^2, per token.
    length_normalization: of `train_loss`: "token" (mean over target tokens) or
      "sequence" (mean over sequences of the mean over tokens).
    loss_normalizing_factor: divides `loss_fn`'s sum; None leaves it a sum.
    special_tokens: EOS, PAD and the decoder's start; by default those of
      `output_vocabulary`, or T5's without one. A run sets those of its task.

  Raises:
    ValueError: `num_real_tokens` is not within 2..vocab_size.
  """

  teacher = None
  needs_rewards = False
  features_have_known_shapes = True

  def __init__(
    self,
    module: Any,
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
    special_tokens: types.SpecialTokens | None = None,
  ):
    decoding.check_options(default_decoder_params, decode_fn)
    projections.check_module(module)
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
    self._special_tokens = special_tokens
    checks.whole(
      num_real_tokens,
      "NUM_REAL_TOKENS",
      least=2,
      most=self.config.vocab_size,
      none=True,
    )

  @property
  def config(self) -> Any:
    """The network's configuration."""
    return self.module.config

  @property
  def final_softcap(self) -> float | None:
    """See `types.TransformerModel.final_softcap`."""
    return getattr(self.config, "final_softcap", None)

  @property
  def student(self) -> Any:
    """The model that is trained: itself."""
    return self

  @property
  def special_tokens(self) -> types.SpecialTokens:
    """See `types.TransformerModel.special_tokens`."""
    if self._special_tokens is None:  # a vocabulary's file is read when needed
      vocabulary = self.output_vocabulary
      self._special_tokens = (
        types.T5_TOKENS
        if vocabulary is None
        else types.SpecialTokens.of(vocabulary)
      )
    return self._special_tokens

  def with_special_tokens(self, special_tokens: types.SpecialTokens) -> Any:
    """Returns this model with other special tokens."""
    if special_tokens == self.special_tokens:
      return self  # what was compiled for it is used again
    model = copy.copy(self)
    model._special_tokens = special_tokens
    return model

  def logits(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None = None
  ) -> jax.Array:
    """Returns teacher-forced logits `[B, T, V]`, `encode` included."""
    raise NotImplementedError

  def decoder_params(self, params: Any) -> Any:
    """See `types.TransformerModel.decoder_params`; here all of them."""
    return params

  def loss_weights(self, batch: types.Batch) -> jax.Array:
    """See `types.TransformerModel.loss_weights`."""
    weights = batch.get("decoder_loss_weights")
    if weights is None:
      if not self.special_tokens.zero_is_padding:
        raise ValueError(
          "expected decoder_loss_weights, as 0 is a token of the vocabulary, got"
          f" {', '.join(sorted(batch))}; set FEATURE_CONVERTER_CLS"
        )
      weights = batch["decoder_target_tokens"] > 0
    return weights.astype(jnp.float32)

  def _marked(self, tokens):
    """Returns decoder targets `[B, T]` of which `> 0` says what counts.

    Where 0 is a token all positions count: padding is at a row's end, where causal
    attention hides it from what is before.
    """
    if self.special_tokens.zero_is_padding:
      return tokens
    return jnp.ones_like(tokens)

  @property
  def sources(self) -> tuple[str, ...]:
    """The data alone: there is no teacher."""
    return (DATA,)

  def source_of_step(self, seed: int, step: int) -> str:
    """Returns "data": SFT trains on the data at every step."""
    del seed, step
    return DATA

  def train_loss(
    self,
    params: Any,
    teacher_params: Any,
    batch: types.Batch,
    inputs: types.StepInputs,
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns the cross-entropy on the data (SFT) and its metrics.

    Args:
      params: of the network.
      teacher_params: not read.
      batch: T5X's features, `[B, ...]`.
      inputs: source "data" and the key; the rest is not read.

    Returns:
      The sum in nats over tokens or sequences, and metrics as (sum, weight),
      "loss" among them.

    Raises:
      ValueError: another source.
    """
    del teacher_params
    if inputs.source != DATA:
      raise ValueError(
        f"expected source {DATA!r} for SFT, got {inputs.source!r}"
      )
    key = random_keys.dropout_key(
      self.config.dropout_rate, inputs.key, inputs.row_ids
    )
    loss, weight, metrics = self._cross_entropy(
      params, batch, key, self.length_normalization
    )
    return loss, metrics | {"loss": (loss, weight)}

  def _cross_entropy(self, params, batch, dropout_rng, normalization):
    targets = batch["decoder_target_tokens"]
    return losses.cross_entropy_loss(
      self.logits(params, batch, dropout_rng),
      targets,
      self.loss_weights(batch),
      label_smoothing=self.label_smoothing,
      z_loss=self.z_loss,
      length_normalization=normalization,
      segment_ids=batch.get("decoder_segment_ids"),
    )

  def loss_fn(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns T5X's loss, the cross-entropy summed over target tokens, and metrics."""
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
    """Returns the best output of each row `[B, T]`, zeros after its end."""
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
    """Returns outputs and their scores.

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
      Tokens `[B, T]`, and `[B]` each of "scores": the summed log-probs of a
      sample in nats, or the scores of `beam_search`; "lengths" in tokens, EOS
      included; and "ended": False for an output that was cut. With
      `return_all_decodes`, tokens `[B, N, T]` and the rest `[B, N]`, by score,
      ascending.

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
    tokens, aux = self._decode(
      params, batch, rng, num_decodes=num_decodes, options=options
    )
    if return_all:
      return tokens, aux
    return tokens[:, -1], {name: x[:, -1] for name, x in aux.items()}

  def with_decode_fn(
    self, decode_fn: types.DecodeFn | None = None, **default_decoder_params: Any
  ) -> Any:
    """Returns this model with another `decode_fn` and its options; None is greedy."""
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

  @property
  def _decoding_module(self):
    """The network for decoding, whose layers are not scanned."""
    return layer_loops.unrolled(self.module)

  def _unstacked(self, params):
    """Returns the parameters of `_decoding_module`."""
    if not layer_loops.is_scanned(self.module):
      return params
    return layer_loops.unstacked(params)

  def _decoding_params(self, params):
    """Returns the parameters of a decoding loop, gathered once, before it."""
    one = {f"{name}_input_tokens": (1, 1) for name in ("encoder", "decoder")}

    def axes():
      variables = jax.eval_shape(
        lambda: self.get_initial_variables(jax.random.key(0), one)
      )
      return partitioning.logical_axes(variables["params_axes"])

    return self._unstacked(partitioning.gather(params, axes))

  def _of_real_tokens(self, logits):
    """Returns logits `[B, V]` with vocabulary padding masked, so it is never decoded."""
    return losses.mask_vocab_padding(
      logits, self.num_real_tokens, fill_value=-jnp.inf
    )

  def start_decoding(
    self,
    params: Any,
    encoded: types.PyTree,
    batch: types.Batch,
    *,
    num_decodes: int = 1,
    slots: int | None = None,
  ) -> tuple[types.TokensToLogits, types.PyTree, dict[str, Any]]:
    """See `types.TransformerModel.start_decoding`."""
    raise NotImplementedError

  def sample(
    self,
    params: Any,
    encoded: types.PyTree,
    batch: types.Batch,
    key: jax.Array | None,
    **options: Any,
  ) -> decoding.SampleResult:
    """Samples one output for each row's input, `[B, T]` tokens and log-probs.

    Args:
      params: of the network.
      encoded: from `encode`.
      batch: features; outputs in them are not read. T is the length of
        `decoder_input_tokens`.
      key: random key; may be None at temperature 0.
      **options: of `decoding.sample`.
    """
    step, cache, rows = self.start_decoding(
      params, encoded, batch, slots=options.get("slots")
    )
    batch_size, length = batch["decoder_input_tokens"].shape
    return decoding.sample(
      step,
      cache,
      key,
      batch_size=batch_size,
      max_decode_length=length,
      eos_id=self.special_tokens.eos_id,
      **rows,
      **options,
    )

  def _decode(self, params, batch, key, *, num_decodes, options):
    """Decodes with `decode_fn`; see `predict_batch_with_aux` for all N outputs."""
    step, cache, rows = self.start_decoding(
      params,
      self.encode(params, batch),
      batch,
      num_decodes=num_decodes,
      slots=options.get("slots"),
    )
    batch_size, length = batch["decoder_input_tokens"].shape
    axes = rows.pop("row_axes", None)
    eos_id = self.special_tokens.eos_id
    tokens, scores = decoding.decode(
      functools.partial(self.decode_fn, **rows),
      step,
      cache,
      key,
      batch_size=batch_size,
      num_decodes=num_decodes,
      options=options,
      max_decode_length=length,
      eos_id=eos_id,
      row_axes=axes,
    )
    return tokens, {"scores": scores} | outputs.ends(
      tokens, eos_id, rows.get("row_lengths")
    )

  def score_batch(self, params: Any, batch: types.Batch) -> jax.Array:
    """Returns the log-prob of each row's targets, `[B]`, nats summed over tokens."""
    weights = self.loss_weights(batch)
    picked = losses.target_log_probs(
      losses.log_probs(self.logits(params, batch)),
      batch["decoder_target_tokens"],
      weights,
    )
    return jnp.sum(picked * weights, axis=-1)


_GREEDY = functools.partial(decoding.sample, temperature=0.0)
