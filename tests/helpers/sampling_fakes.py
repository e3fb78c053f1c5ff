"""Models without a network, and an own oracle, for the tests of sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import decoding

EOS = 1
VOCAB = 6


def scripted(script):
  """A model whose row b all but surely says `script[b, t]` at step t."""
  script = jnp.asarray(script)

  def tokens_to_logits(tokens, position):
    wanted = jnp.take(script, position, axis=1)
    return 60.0 * jax.nn.one_hot(wanted, VOCAB), position + 1

  return tokens_to_logits


def markov(tokens, table):
  """A model whose next-token logits depend on the last token alone."""
  return table[tokens], table


def random_table(seed=0, vocab=VOCAB, scale=1.5):
  return scale * jax.random.normal(jax.random.key(seed), (vocab, vocab))


def quick_jit(function):
  """Compiles in less than half the time, into slower code."""
  return jax.jit(
    function, compiler_options={"xla_backend_optimization_level": 0}
  )


@functools.cache
def compiled_markov(settings):
  """One program for each combination of settings that are not arrays."""

  def decode(table, key, arrays):
    return decoding.sample(markov, table, key, **dict(settings), **arrays)

  return quick_jit(decode)


def uncompiled(table, key, **settings):
  settings = {"batch_size": 8, "max_decode_length": 5, **settings}
  return decoding.sample(markov, table, key, **settings)


def sample_markov(table, key, **settings):
  settings = {"batch_size": 8, "max_decode_length": 5, **settings}
  arrays = {k: v for k, v in settings.items() if isinstance(v, jax.Array)}
  static = tuple((k, v) for k, v in settings.items() if k not in arrays)
  return compiled_markov(static)(table, key, arrays)


def distribution_by_definition(
  logits, temperature=1.0, top_k=0, top_p=1.0, suppress_ids=()
):
  """Float64 probabilities `[V]`, token by token, from the definitions."""
  logits = np.array(logits, np.float64)
  logits[list(suppress_ids)] = -np.inf
  logits = logits / temperature
  weights = np.exp(logits - logits.max())

  def likelier(i):
    return weights[logits > logits[i]]

  if top_k:
    weights = np.array(
      [
        weight if len(likelier(i)) < top_k else 0.0
        for i, weight in enumerate(weights)
      ]
    )
  total = weights.sum()
  weights = np.array(
    [
      weight if likelier(i).sum() < top_p * total else 0.0
      for i, weight in enumerate(weights)
    ]
  )
  return weights / weights.sum()
