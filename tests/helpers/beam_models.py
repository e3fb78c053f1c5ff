"""Models without a network, and searches over them, for the tests of beams."""

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import decoding


def history_model(tokens, cache):
  """Logits that depend on all tokens so far, which only the cache remembers."""
  weights, history, position = cache  # [rows, T, V, V], [rows, T], []
  history = jax.lax.dynamic_update_slice_in_dim(
    history, tokens[:, None], position, axis=1
  )
  picked = jnp.take_along_axis(weights, history[:, :, None, None], axis=2)
  so_far = jnp.arange(history.shape[1]) <= position
  logits = jnp.sum(picked[:, :, 0] * so_far[None, :, None], axis=1)
  return logits, (weights, history, position + 1)


def history_weights(batch_size, length, vocab, seed=0):
  shape = (batch_size, length, vocab, vocab)
  return np.float32(np.random.default_rng(seed).normal(size=shape))


def search(weights, alpha, num_decodes, **settings):
  batch_size, length = weights.shape[:2]
  rows = jnp.repeat(weights, num_decodes, axis=0)
  history = jnp.zeros(rows.shape[:2], jnp.int32)
  return decoding.beam_search(
    history_model,
    (rows, history, jnp.int32(0)),
    batch_size=batch_size,
    max_decode_length=length,
    num_decodes=num_decodes,
    alpha=alpha,
    **settings,
  )


compiled_search = jax.jit(search, static_argnames="num_decodes")


def scripted(logits, calls=None):
  """Prompt b's logits at step t are `logits[b][t]`, whatever came before."""
  logits = jnp.asarray(logits, jnp.float32)

  def tokens_to_logits(tokens, position):
    if calls is not None:
      jax.debug.callback(lambda _: calls.append(None), position)
    num_decodes = tokens.shape[0] // logits.shape[0]
    now = jnp.take(logits, position, axis=1)
    return jnp.repeat(now, num_decodes, axis=0), position + 1

  return tokens_to_logits


def run_scripted(logits, calls=None, **settings):
  result = decoding.beam_search(
    scripted(logits, calls),
    jnp.int32(0),
    batch_size=len(logits),
    max_decode_length=len(logits[0]),
    **settings,
  )
  jax.effects_barrier()
  return result
