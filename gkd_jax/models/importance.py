"""Importance weights of outputs that the student drew one update earlier.

GKD's loss is a mean over outputs y of the student q. Of outputs of an older
student q', a term counts by how much likelier q makes all tokens that the term
depends on; then the loss, its weight sum and its gradient have the mean under q'
that they have under q. The divergence D_t at position t is a sum over the
vocabulary, and depends on the prefix y_<t, not on the token drawn at t:

  "token":    Σ_t D_t          w_t = Π_{s<t} q(y_s | y_<s) / q'(y_s | y_<s)
  "sequence": Σ_t D_t / L_y    w = Π_{s≤L_y} of the same, as L_y depends on all

Both q and q' are the laws that outputs are drawn from, the sampling temperature
included. Products are cut at a largest weight (truncated importance sampling,
Ionides 2008): it bounds the variance, and where it cuts the mean is too small.
Weights are constants: no gradient flows through them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import decoding, losses, partitioning, types
from gkd_jax.models import base_model
from gkd_jax.partitioning import meshes

# Features of a batch whose outputs an older student drew: their log-probs under
# its law, `[B, T]`, 0 at what is no output; and the weights made of them.
LOG_PROBS, FACTORS = "behaviour_log_probs", "importance"


def factors(
  new_log_probs: jax.Array,
  old_log_probs: jax.Array,
  weights: jax.Array,
  *,
  length_normalization: str,
  largest: float,
) -> jax.Array:
  """The importance weight of each position's divergence.

  >>> new, old = jnp.log(jnp.array([[[0.5, 0.9]], [[0.4, 0.3]]]))
  >>> settings = {"length_normalization": "token", "largest": 9.0}
  >>> [round(float(x), 3) for x in factors(new, old, old < 0, **settings)[0]]
  [1.0, 1.25]
  >>> settings["length_normalization"] = "sequence"
  >>> [round(float(x), 3) for x in factors(new, old, old < 0, **settings)[0]]
  [3.75, 3.75]

  Args:
    new_log_probs: `[B, T]` nats, of the outputs' tokens under q.
    old_log_probs: `[B, T]` nats, under the law q' that drew them.
    weights: `[B, T]`, above 0 at the tokens of an output, which is one per row.
    length_normalization: "sequence" or "token", see `losses.token_weights`.
    largest: where products are cut.

  Returns:
    `[B, T]` float32, 0 where `weights` is.
  """
  used = weights > 0
  ratios = jnp.where(used, new_log_probs - old_log_probs, 0.0)
  if length_normalization == "sequence":
    total = jnp.sum(ratios, axis=1, keepdims=True)
    of_prefix = jnp.broadcast_to(total, ratios.shape)
  else:
    of_prefix = jnp.cumsum(ratios, axis=1) - ratios
  cut = jnp.minimum(jnp.exp(of_prefix.astype(jnp.float32)), largest)
  return jax.lax.stop_gradient(jnp.where(used, cut, 0.0))


def target_log_probs(
  logits: jax.Array,
  targets: jax.Array,
  *,
  num_real_tokens: int | None,
  **settings: Any,
) -> jax.Array:
  """Log-probs `[...]` of tokens under the law that outputs are drawn from.

  Args:
    logits: `[..., V]`, padding of the vocabulary included.
    targets: `[...]` int32; one that is never drawn, such as PAD, gets -inf.
    num_real_tokens: token ids from here on are never drawn.
    **settings: of `decoding.sampling_logits`.
  """
  logits = losses.without_padding(
    logits.astype(jnp.float32), num_real_tokens, no_mass=-jnp.inf
  )
  law = decoding.sampling_logits(logits, **settings)
  # A sum, not a gather, which would join a vocabulary that is split.
  ids = jax.lax.broadcasted_iota(jnp.int32, law.shape, law.ndim - 1)
  chosen = jnp.where(ids == targets[..., None], law, 0.0)
  return jnp.sum(chosen, axis=-1) - jax.nn.logsumexp(law, axis=-1)


def chunked_target_log_probs(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  chunk_size: int,
  **settings: Any,
) -> jax.Array:
  """`target_log_probs` of `hidden @ head`, without whole logits.

  A few positions of all rows at a time, 2 D V operations for each token; what
  is padding in all rows is left out.

  Args:
    hidden: `[B, T, D]`.
    head: `[D, V]`.
    targets: `[B, T]` int32.
    weights: `[B, T]`; where a chunk has none above 0 the result is 0.
    chunk_size: most tokens of a chunk on each data shard, at least one position.
    **settings: of `target_log_probs`.
  """
  rows, length = targets.shape
  _, shards = meshes.rows(partitioning.auto_axes())
  width = min(max(1, chunk_size * shards // rows), length)
  number = -(-length // width)

  def cut(x):
    """`[B, T, ...]` -> `[chunks, B, width, ...]`."""
    missing = number * width - length
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(rows, number, width, *x.shape[2:]), 1, 0)

  dtype = jnp.promote_types(hidden.dtype, head.dtype)
  head = head.astype(dtype)

  def scored(hidden, targets):
    logits = jnp.einsum(
      "btd,dv->btv",
      hidden.astype(dtype),
      head,
      preferred_element_type=jnp.float32,
    )
    logits = partitioning.constrain(logits, "batch", "length", "vocab")
    return target_log_probs(logits, targets, **settings)

  def of_chunk(parts):
    hidden, targets, weights = parts
    nothing = lambda *_: jnp.zeros(targets.shape, jnp.float32)
    return jax.lax.cond(jnp.any(weights > 0), scored, nothing, hidden, targets)

  found = jax.lax.map(of_chunk, (cut(hidden), cut(targets), cut(weights)))
  return jnp.moveaxis(found, 0, 1).reshape(rows, -1)[:, :length]


def draw(
  model: Any, params: Any, batch: types.Batch, key: jax.Array
) -> types.Batch:
  """The batch with the student's outputs, to train on after another update.

  Args:
    model: `GKDModel`.
    params: the student's.
    batch: features `[B, ...]`; outputs in them are not read.
    key: of the step that trains on the batch, which `train_loss` gets: the
      outputs are those that it would draw with these parameters.

  Returns:
    Features `[B, ...]`, `LOG_PROBS` among them.

  Raises:
    ValueError: a packed batch.
  """
  base_model.check_unpacked(batch)
  _, sample_key, _ = jax.random.split(key, 3)  # as in `train_loss`
  tokens, weights, log_probs = model.sample_outputs(params, batch, sample_key)
  # A row of padding alone (the last batch of a data set) has no input.
  present = model.student.has_inputs(batch)[:, None]
  place = model.student.output_features
  new = place(batch, tokens * present, weights * present)
  # They stand where the weights do.
  moved = place(batch, tokens, log_probs)["decoder_loss_weights"]
  return dict(batch) | new | {LOG_PROBS: moved}


def weighted(
  model: Any, params: Any, batch: types.Batch, outputs: jax.Array, chunk: int
) -> tuple[types.Batch, types.Metrics]:
  """A batch drawn by an older student, with the weights of its positions.

  Args:
    model: `GKDModel`.
    params: the student's of now.
    batch: features, `LOG_PROBS` among them.
    outputs: the student's logits `[B, T, V]` on the batch without dropout, as
      outputs are drawn; with a chunk, its hidden states `[B, T, D]`.
    chunk: tokens of a chunk of the fused loss, or 0.

  Returns:
    The batch with `FACTORS`, and metrics: `importance_weight` per token,
    `importance_cut`, the share of tokens whose product was cut, and
    `base_model.output_metrics`'s.
  """
  weights = model.student.loss_weights(batch)
  targets = batch["decoder_target_tokens"]
  settings = {"num_real_tokens": model.student.num_real_tokens}
  settings |= model.sampling
  outputs, head = jax.lax.stop_gradient(
    (outputs, model.student.output_head(params) if chunk else None)
  )
  if chunk:
    new = chunked_target_log_probs(
      outputs, head, targets, weights, chunk_size=chunk, **settings
    )
  else:
    new = target_log_probs(outputs, targets, **settings)
  found = factors(
    new,
    batch[LOG_PROBS],
    weights,
    length_normalization=model.length_normalization,
    largest=model.max_importance_weight,
  )
  number = jnp.sum(weights)
  at_most = (found >= model.max_importance_weight).astype(jnp.float32)
  metrics = base_model.output_metrics(targets, weights) | {
    "importance_weight": (jnp.sum(found * weights), number),
    "importance_cut": (jnp.sum(at_most * weights), number),
  }
  return dict(batch) | {FACTORS: found}, metrics


def check_settings(
  sampling_settings: Mapping[str, Any], granularity: str, largest: float
) -> None:
  """Raises a ValueError for settings that outputs cannot be drawn ahead with.

  Args:
    sampling_settings: temperature, `top_k` and `top_p`.
    granularity: of λ.
    largest: see `factors`.
  """
  if sampling_settings["temperature"] == 0:
    raise ValueError(
      "expected outputs that are drawn, as importance weights are ratios of"
      " their probabilities, got a sampling temperature of 0; set"
      " SAMPLING_TEMPERATURE, or SAMPLE_AHEAD = False"
    )
  filters = sampling_settings["top_k"], sampling_settings["top_p"]
  if filters != (0, 1):
    raise ValueError(
      "expected no filters with SAMPLE_AHEAD, as no weight makes up for a token"
      " that the older student's filter removed, got top_k and top_p of"
      f" {filters}; set models.GKDModel.sampling_top_k = 0 and"
      " models.GKDModel.sampling_top_p = 1.0, or SAMPLE_AHEAD = False"
    )
  if granularity != "step":
    raise ValueError(
      "expected one coin of λ for each step with SAMPLE_AHEAD, got"
      f" {granularity!r}; set STUDENT_DATA_GRANULARITY = 'step'"
    )
  if not largest >= 1:
    raise ValueError(
      "expected a largest importance weight of at least 1, got"
      f" {largest}; set MAX_IMPORTANCE_WEIGHT"
    )
