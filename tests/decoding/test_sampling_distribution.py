"""What is drawn how often: frequencies, filters, log-probs, an own oracle."""

import functools
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_fakes
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax import decoding
from gkd_jax.decoding import distributions

VOCAB = sampling_fakes.VOCAB
EOS = sampling_fakes.EOS

SETTINGS = [
  {},
  {"temperature": 0.5},
  {"top_k": 3},
  {"top_p": 0.7},
  {"top_k": 4, "top_p": 0.8, "temperature": 1.5},
  {"suppress_ids": (0, 4)},
  {"suppress_ids": (0,), "top_k": 3, "top_p": 0.9, "temperature": 0.7},
]


def draw_once(logits, rows, key, **settings):
  """One token, and its log-prob, for each of some rows of logits `[V]`."""

  @sampling_fakes.quick_jit
  def draw(key):
    return decoding.sample(
      lambda tokens, cache: (jnp.tile(logits, (rows, 1)), cache),
      (),
      key,
      batch_size=rows,
      max_decode_length=1,
      **settings,
    )

  return map(np.ravel, draw(key))


# --- The distribution ---------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_frequencies_and_log_probs_match_the_distribution(settings):
  logits = jnp.array([0.3, 0.1, 2.0, 1.2, -0.5, 1.9, 0.0, -2.0])
  rows = 8_000
  tokens, log_probs = draw_once(logits, rows, jax.random.key(11), **settings)
  distribution = sampling_fakes.distribution_by_definition(logits, **settings)
  counts = np.bincount(tokens, minlength=8)
  assert counts[distribution == 0].sum() == 0
  possible = distribution > 0
  assert possible.sum() > 1
  p_value = scipy.stats.chisquare(
    counts[possible], rows * distribution[possible]
  ).pvalue
  assert p_value > 1e-3
  np.testing.assert_allclose(log_probs, np.log(distribution[tokens]), atol=2e-6)


# Two groups and a part of one, and three whole ones, of 128 tokens each.
@pytest.mark.parametrize("vocab", [300, 384])
def test_distribution_of_a_vocabulary_that_is_drawn_from_by_groups(vocab):
  logits = 1.5 * jax.random.normal(jax.random.key(5), (vocab,))
  rows = 40_000
  settings = {"suppress_ids": (0, 7)}
  tokens, log_probs = draw_once(logits, rows, jax.random.key(13), **settings)
  distribution = sampling_fakes.distribution_by_definition(logits, **settings)
  counts = np.bincount(tokens, minlength=vocab)
  assert counts.size == vocab and counts[[0, 7]].sum() == 0
  often = rows * distribution > 5
  observed = [*counts[often], counts[~often].sum()]
  expected = [*rows * distribution[often], rows * distribution[~often].sum()]
  assert len(expected) > 150
  assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3
  np.testing.assert_allclose(log_probs, np.log(distribution[tokens]), atol=4e-6)


def test_small_vocabularies_are_drawn_from_as_jax_does():
  logits = 2.0 * jax.random.normal(jax.random.key(6), (64, 128))
  key = jax.random.key(14)
  tokens = decoding.sample(
    lambda tokens, cache: (logits, cache),
    (),
    key,
    batch_size=64,
    max_decode_length=1,
  ).tokens
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = jax.vmap(jax.random.fold_in)(
    fold(key, jnp.arange(64)), jnp.zeros(64, int)
  )
  expected = jax.vmap(jax.random.categorical)(keys, logits)
  np.testing.assert_array_equal(tokens[:, 0], expected)


def test_vocabulary_split_over_devices_is_drawn_from_where_it_lies():
  table = sampling_fakes.random_table(3, vocab=512)
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()).reshape(2, 4), ("data", "model")
  )
  split = NamedSharding(mesh, PartitionSpec("data", "model"))

  def decode(constrain):
    def step(tokens, table):
      return constrain(table[tokens]), table

    return sampling_fakes.quick_jit(
      lambda table: decoding.sample(
        step,
        table,
        jax.random.key(7),
        batch_size=8,
        max_decode_length=6,
        suppress_ids=(0,),
      )
    )

  alone = decode(lambda x: x)(table)
  sharded = decode(lambda x: jax.lax.with_sharding_constraint(x, split))
  table = jax.device_put(
    table, NamedSharding(mesh, PartitionSpec(None, "model"))
  )
  compiled = sharded.lower(table).compile()
  np.testing.assert_array_equal(compiled(table).tokens, alone.tokens)
  # Arrays of a device's 4 rows: none holds a row's 512 logits.
  arrays = re.findall(r"f32\[4,([\d,]+)\]", compiled.as_text())
  sizes = {math.prod(map(int, sizes.split(","))) for sizes in arrays}
  assert 128 in sizes and max(sizes) < 512, sizes


def test_rows_and_positions_are_independent():
  logits = jnp.array([0.0, 0.5, 1.0, -0.5])
  rows, length = 500, 9
  tokens = np.asarray(
    sampling_fakes.quick_jit(
      lambda key: (
        decoding.sample(
          lambda tokens, cache: (jnp.tile(logits, (rows, 1)), cache),
          (),
          key,
          batch_size=rows,
          max_decode_length=length,
          eos_id=-1,
        ).tokens
      )
    )(jax.random.key(12))
  )
  distribution = sampling_fakes.distribution_by_definition(logits)
  expected = np.outer(distribution, distribution).ravel()
  pairs = {
    "next position": (tokens[:, 0::2][:, :4], tokens[:, 1::2]),
    "next row": (tokens[0::2], tokens[1::2]),
    "next row, next position": (tokens[0::2, 0::2][:, :4], tokens[1::2, 1::2]),
  }
  for name, (first, second) in pairs.items():
    counts = np.bincount((first * 4 + second).ravel(), minlength=16)
    p_value = scipy.stats.chisquare(counts, counts.sum() * expected).pvalue
    assert p_value > 1e-3, name


@pytest.mark.parametrize(
  ("settings", "dtype"),
  [(SETTINGS[0], jnp.bfloat16), (SETTINGS[-1], jnp.float32)],
)
def test_log_probs_follow_the_tokens_of_their_row(settings, dtype):
  table = sampling_fakes.random_table(4).astype(dtype)
  tokens, log_probs = map(
    np.asarray,
    sampling_fakes.sample_markov(table, jax.random.key(2), **settings),
  )
  assert len(np.unique(tokens)) > 2
  for row, row_log_probs in zip(tokens, log_probs, strict=True):
    last = 0
    for token, log_prob in zip(row, row_log_probs, strict=True):
      if last == EOS:
        assert log_prob == 0 and token == 0
        continue
      distribution = sampling_fakes.distribution_by_definition(
        table[last].astype(jnp.float32), **settings
      )
      np.testing.assert_allclose(
        log_prob, np.log(distribution[token]), atol=2e-6
      )
      last = token


@pytest.mark.parametrize("masked", [-1e9, -np.inf, jnp.finfo(jnp.float32).min])
@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0])
def test_logits_masked_by_the_model_are_no_trouble(masked, temperature):
  table = sampling_fakes.random_table(6).at[:, jnp.array([0, 1, 3])].set(masked)
  tokens, log_probs = sampling_fakes.sample_markov(
    table, jax.random.key(0), temperature=temperature, top_p=0.99
  )
  assert np.isin(tokens, [2, 4, 5]).all()
  assert np.isfinite(log_probs).all()


def test_suppressed_tokens_are_never_drawn_however_likely():
  table = sampling_fakes.random_table(7).at[:, 0].set(1e4)
  for temperature in (0.0, 1.0):
    tokens, log_probs = sampling_fakes.sample_markov(
      table,
      jax.random.key(1),
      temperature=temperature,
      suppress_ids=(0, 1),
    )
    assert np.isin(tokens, [2, 3, 4, 5]).all()
    # Renormalised over what is left; their own softmax would be exp(-1e4).
    assert (np.asarray(log_probs) > -10).all()


def test_top_k_one_and_tiny_top_p_are_greedy():
  table = sampling_fakes.random_table(8)
  greedy = sampling_fakes.sample_markov(table, None, temperature=0)
  for settings in ({"top_k": 1}, {"top_p": 1e-9}):
    result = sampling_fakes.sample_markov(table, jax.random.key(0), **settings)
    np.testing.assert_array_equal(result.tokens, greedy.tokens)
    np.testing.assert_allclose(result.log_probs, 0.0, atol=1e-6)


@pytest.mark.parametrize(
  ("top_k", "top_p", "kept"),
  [
    (0, 1.0, [0, 1, 2, 3, 4]),
    (9, 1.0, [0, 1, 2, 3, 4]),
    (1, 1.0, [3]),
    (2, 1.0, [0, 3, 4]),  # 0 and 4 tie for the second place.
    (3, 1.0, [0, 3, 4]),
    (0, 0.39, [3]),
    (0, 0.41, [0, 3, 4]),
    (0, 0.81, [0, 2, 3, 4]),
    (0, 0.91, [0, 1, 2, 3, 4]),
    # Of the 0.8 that top-k leaves, token 3 has 0.5: enough by itself only
    # because top-p looks at the renormalised distribution.
    (2, 0.49, [3]),
    (2, 0.51, [0, 3, 4]),
    (0, 0.49, [0, 3, 4]),
  ],
)
def test_filters_on_a_worked_distribution(top_k, top_p, kept):
  distribution = jnp.log(jnp.array([0.2, 0.1, 0.1 + 1e-6, 0.4, 0.2]))
  filtered = distributions.filter_logits(distribution, top_k=top_k, top_p=top_p)
  np.testing.assert_array_equal(np.flatnonzero(np.isfinite(filtered)), kept)
  np.testing.assert_array_equal(
    filtered[np.array(kept)], distribution[np.array(kept)]
  )


@pytest.mark.parametrize(
  "filters", [{"top_k": 2}, {"top_p": 0.65}, {"top_k": 3, "top_p": 0.7}]
)
def test_a_token_that_was_sampled_keeps_a_log_prob(filters):
  """Another program's last bits had it among the kept ones."""
  ulp = 2.0**-7  # of bfloat16 between 1 and 2
  logits = np.array([1.0, 2.0, 1.0 + ulp, 0.5])
  for token, kept in ((0, [0, 1, 2]), (1, [1, 2]), (2, [1, 2])):
    log_probs = decoding.sampling_log_probs(
      jnp.array(logits, jnp.bfloat16), keep=jnp.array(token), **filters
    )
    total = np.log(np.sum(np.exp(logits[kept])))
    expected = np.full(4, -np.inf)
    expected[kept] = logits[kept] - total
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5)
  # Suppressed tokens are not sampled, and not kept.
  log_probs = decoding.sampling_log_probs(
    jnp.array(logits), keep=jnp.array(0), suppress_ids=(0,), **filters
  )
  assert np.isneginf(log_probs[0])


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(
  # Halves make ties frequent.
  logits=st.lists(
    st.integers(-8, 8).map(lambda n: n / 2), min_size=7, max_size=7
  ),
  temperature=st.floats(0.1, 5.0),
  top_k=st.integers(0, 8),
  top_p=st.floats(0.01, 1.0),
  suppress_ids=st.sets(st.integers(0, 6), max_size=6),
)
def test_distribution_equals_its_definition(
  logits, temperature, top_k, top_p, suppress_ids
):
  settings = {
    "temperature": temperature,
    "top_k": top_k,
    "suppress_ids": tuple(suppress_ids),
  }
  # Where a sum of masses falls on top_p, rounding decides: not a case to test.
  lower = sampling_fakes.distribution_by_definition(
    logits, top_p=top_p - 1e-5, **settings
  )
  upper = sampling_fakes.distribution_by_definition(
    logits, top_p=min(top_p + 1e-5, 1.0), **settings
  )
  hypothesis.assume(np.array_equal(lower, upper))
  distribution = jax.nn.softmax(
    decoding.sampling_logits(jnp.array(logits), top_p=top_p, **settings)
  )
  np.testing.assert_allclose(distribution, lower, rtol=2e-5, atol=1e-7)


def test_program_sorts_only_when_asked_to():
  def program(**settings):
    decode = functools.partial(
      sampling_fakes.uncompiled, sampling_fakes.random_table(), **settings
    )
    text = (
      sampling_fakes.quick_jit(decode)
      .lower(jax.random.key(0))
      .compile()
      .as_text()
      .lower()
    )
    return "sort(" in text or "topk" in text

  assert not program()
  assert not program(top_k=0, top_p=1.0, temperature=0.7, suppress_ids=(0,))
  assert program(top_k=2)
  assert program(top_p=0.9)
