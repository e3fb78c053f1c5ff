"""Sampling on made-up logits: exact rows, frequencies, and an own oracle."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax import sampling

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
    return sampling.sample(markov, table, key, **dict(settings), **arrays)

  return quick_jit(decode)


def uncompiled(table, key, **settings):
  settings = {"batch_size": 8, "max_decode_length": 5, **settings}
  return sampling.sample(markov, table, key, **settings)


def sample_markov(table, key, **settings):
  settings = {"batch_size": 8, "max_decode_length": 5, **settings}
  arrays = {k: v for k, v in settings.items() if isinstance(v, jax.Array)}
  static = tuple((k, v) for k, v in settings.items() if k not in arrays)
  return compiled_markov(static)(table, key, arrays)


def law_by_definition(
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


SETTINGS = [
  {},
  {"temperature": 0.5},
  {"top_k": 3},
  {"top_p": 0.7},
  {"top_k": 4, "top_p": 0.8, "temperature": 1.5},
  {"suppress_ids": (0, 4)},
  {"suppress_ids": (0,), "top_k": 3, "top_p": 0.9, "temperature": 0.7},
]


# --- Rows, ends and lengths -------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_end_at_eos_and_stay_zero(temperature):
  script = [[5, 4, 1, 3, 2], [1, 5, 5, 5, 5], [2, 3, 4, 5, 1], [3, 0, 2, 2, 2]]
  result = sampling.sample(
    scripted(script),
    jnp.int32(0),
    jax.random.key(0),
    batch_size=4,
    max_decode_length=5,
    temperature=temperature,
  )
  np.testing.assert_array_equal(
    result.tokens,
    [[5, 4, 1, 0, 0], [1, 0, 0, 0, 0], [2, 3, 4, 5, 1], [3, 0, 2, 2, 2]],
  )
  assert result.tokens.dtype == jnp.int32
  after_eos = np.array(
    [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool
  )
  assert result.log_probs.dtype == jnp.float32
  np.testing.assert_array_equal(result.log_probs[after_eos], 0.0)
  np.testing.assert_allclose(result.log_probs[~after_eos], 0.0, atol=1e-6)


@pytest.mark.parametrize(
  ("script", "settings", "steps"),
  [
    ([[5, 1, 5, 5], [1, 5, 5, 5]], {}, 2),
    ([[1, 5, 5, 5], [1, 5, 5, 5]], {}, 1),
    ([[5, 5, 5, 5], [1, 5, 5, 5]], {}, 4),
    ([[5, 5, 5, 1], [1, 5, 5, 5]], {}, 4),
    ([[5, 2, 5, 5], [5, 5, 2, 5]], {"eos_id": 2}, 3),
    ([[1, 1, 1, 1], [1, 1, 1, 1]], {"eos_id": -1}, 4),
    ([[5, 5, 5, 5], [4, 1, 5, 5]], {"active": [False, True]}, 2),
    ([[5, 5, 5, 5], [4, 1, 5, 5]], {"active": [False, False]}, 0),
  ],
)
def test_loop_stops_when_every_row_has_ended(script, settings, steps):
  if "active" in settings:
    settings = {**settings, "active": jnp.array(settings["active"])}
  fed = []
  model = scripted(script)

  def counted(tokens, cache):
    jax.debug.callback(lambda tokens: fed.append(tokens.tolist()), tokens)
    return model(tokens, cache)

  sampling.sample(
    counted,
    jnp.int32(0),
    jax.random.key(0),
    batch_size=2,
    max_decode_length=4,
    **settings,
  )
  jax.effects_barrier()
  assert len(fed) == steps


def test_model_is_fed_the_start_token_then_what_was_drawn():
  fed = []

  def model(tokens, position):
    jax.debug.callback(lambda tokens: fed.append(tokens.tolist()), tokens)
    return scripted([[5, 4, 3], [2, 1, 3]])(tokens, position)

  for start_tokens in (None, jnp.array([4, 2])):
    sampling.sample(
      model,
      jnp.int32(0),
      None,
      batch_size=2,
      max_decode_length=3,
      temperature=0,
      start_tokens=start_tokens,
    )
  jax.effects_barrier()
  assert fed == [[0, 0], [5, 2], [4, 1], [4, 2], [5, 2], [4, 1]]


def test_inactive_rows_are_zero_and_the_others_unchanged():
  key = jax.random.key(3)
  active = jnp.array([True, False, True, True, False, False, True, True])
  everyone = sample_markov(random_table(), key)
  some = sample_markov(random_table(), key, active=active)
  for whole, part in zip(everyone, some, strict=True):
    np.testing.assert_array_equal(part, np.where(active[:, None], whole, 0))


# --- Greedy -------------------------------------------------------------------


def test_greedy_takes_the_likeliest_and_scores_it_at_temperature_one():
  table = random_table(1).at[:, EOS].set(-9.0)
  result = sample_markov(table, None, temperature=0.0, top_k=2, top_p=0.3)
  law = jax.nn.log_softmax(np.asarray(table, np.float32), axis=-1)
  last = 0
  for t in range(5):
    best = int(np.argmax(table[last]))
    np.testing.assert_array_equal(result.tokens[:, t], best)
    np.testing.assert_allclose(result.log_probs[:, t], law[last, best], 1e-5)
    last = best


def test_greedy_takes_the_lowest_id_of_equal_ones_and_no_random_number():
  table = jnp.zeros((VOCAB, VOCAB)).at[:, jnp.array([3, 5])].set(2.0)
  greedy = sample_markov(table, None, temperature=0)
  np.testing.assert_array_equal(greedy.tokens, 3)

  def program(**settings):
    decode = functools.partial(uncompiled, table, **settings)
    return jax.jit(decode).lower(jax.random.key(0)).as_text()

  assert "threefry" not in program(temperature=0)
  assert "threefry" in program()


@pytest.mark.parametrize(
  "temperature",
  [1e-3, 1e-45, jnp.float32(1e-3), jnp.float32(1e-38), jnp.float32(0.0)],
)
def test_small_temperatures_are_greedy(temperature):
  table = random_table(2, scale=3.0)
  key = jax.random.key(0)
  cold = sample_markov(table, key, temperature=temperature, suppress_ids=(1,))
  greedy = sample_markov(table, None, temperature=0, suppress_ids=(1,))
  np.testing.assert_array_equal(cold.tokens, greedy.tokens)
  np.testing.assert_allclose(cold.log_probs, 0.0, atol=1e-6)


def test_array_temperatures_share_one_program_and_equal_numbers():
  traces = []

  def model(tokens, table):
    traces.append(None)
    return markov(tokens, table)

  @quick_jit
  def decode(temperature):
    return sampling.sample(
      model,
      random_table(),
      jax.random.key(5),
      batch_size=8,
      max_decode_length=5,
      temperature=temperature,
    )

  results = [decode(jnp.float32(0.5))]
  first_traces = len(traces)
  results += [decode(jnp.float32(t)) for t in (1.0, 2.0, -1.0)]
  assert len(traces) == first_traces
  for result, temperature in zip(results, (0.5, 1.0, 2.0), strict=False):
    static = sample_markov(
      random_table(), jax.random.key(5), temperature=temperature
    )
    np.testing.assert_array_equal(result.tokens, static.tokens)
    np.testing.assert_allclose(result.log_probs, static.log_probs, rtol=1e-5)
  assert np.isnan(results[3].log_probs[:, 0]).all()


# --- The law ------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_frequencies_and_log_probs_match_the_law(settings):
  logits = jnp.array([0.3, 0.1, 2.0, 1.2, -0.5, 1.9, 0.0, -2.0])
  rows = 8_000

  @quick_jit
  def draw(key):
    return sampling.sample(
      lambda tokens, cache: (jnp.tile(logits, (rows, 1)), cache),
      (),
      key,
      batch_size=rows,
      max_decode_length=1,
      **settings,
    )

  tokens, log_probs = map(np.ravel, draw(jax.random.key(11)))
  law = law_by_definition(logits, **settings)
  counts = np.bincount(tokens, minlength=8)
  assert counts[law == 0].sum() == 0
  possible = law > 0
  assert possible.sum() > 1
  p_value = scipy.stats.chisquare(counts[possible], rows * law[possible]).pvalue
  assert p_value > 1e-3
  np.testing.assert_allclose(log_probs, np.log(law[tokens]), atol=2e-6)


def test_rows_and_positions_are_independent():
  logits = jnp.array([0.0, 0.5, 1.0, -0.5])
  rows, length = 500, 9
  tokens = np.asarray(
    quick_jit(
      lambda key: (
        sampling.sample(
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
  law = law_by_definition(logits)
  expected = np.outer(law, law).ravel()
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
  table = random_table(4).astype(dtype)
  tokens, log_probs = map(
    np.asarray, sample_markov(table, jax.random.key(2), **settings)
  )
  assert len(np.unique(tokens)) > 2
  for row, row_log_probs in zip(tokens, log_probs, strict=True):
    last = 0
    for token, log_prob in zip(row, row_log_probs, strict=True):
      if last == EOS:
        assert log_prob == 0 and token == 0
        continue
      law = law_by_definition(table[last].astype(jnp.float32), **settings)
      np.testing.assert_allclose(log_prob, np.log(law[token]), atol=2e-6)
      last = token


@pytest.mark.parametrize("masked", [-1e9, -np.inf, jnp.finfo(jnp.float32).min])
@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0])
def test_logits_masked_by_the_model_are_no_trouble(masked, temperature):
  table = random_table(6).at[:, jnp.array([0, 1, 3])].set(masked)
  tokens, log_probs = sample_markov(
    table, jax.random.key(0), temperature=temperature, top_p=0.99
  )
  assert np.isin(tokens, [2, 4, 5]).all()
  assert np.isfinite(log_probs).all()


def test_suppressed_tokens_are_never_drawn_however_likely():
  table = random_table(7).at[:, 0].set(1e4)
  for temperature in (0.0, 1.0):
    tokens, log_probs = sample_markov(
      table,
      jax.random.key(1),
      temperature=temperature,
      suppress_ids=(0, 1),
    )
    assert np.isin(tokens, [2, 3, 4, 5]).all()
    # Renormalised over what is left; their own softmax would be exp(-1e4).
    assert (np.asarray(log_probs) > -10).all()


def test_top_k_one_and_tiny_top_p_are_greedy():
  table = random_table(8)
  greedy = sample_markov(table, None, temperature=0)
  for settings in ({"top_k": 1}, {"top_p": 1e-9}):
    result = sample_markov(table, jax.random.key(0), **settings)
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
    # because top-p looks at the renormalised law.
    (2, 0.49, [3]),
    (2, 0.51, [0, 3, 4]),
    (0, 0.49, [0, 3, 4]),
  ],
)
def test_filters_on_a_worked_law(top_k, top_p, kept):
  law = jnp.log(jnp.array([0.2, 0.1, 0.1 + 1e-6, 0.4, 0.2]))
  filtered = sampling.filter_logits(law, top_k=top_k, top_p=top_p)
  np.testing.assert_array_equal(np.flatnonzero(np.isfinite(filtered)), kept)
  np.testing.assert_array_equal(filtered[np.array(kept)], law[np.array(kept)])


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
def test_law_equals_its_definition(
  logits, temperature, top_k, top_p, suppress_ids
):
  settings = {
    "temperature": temperature,
    "top_k": top_k,
    "suppress_ids": tuple(suppress_ids),
  }
  # Where a sum of masses falls on top_p, rounding decides: not a case to test.
  lower = law_by_definition(logits, top_p=top_p - 1e-5, **settings)
  upper = law_by_definition(logits, top_p=min(top_p + 1e-5, 1.0), **settings)
  hypothesis.assume(np.array_equal(lower, upper))
  law = jax.nn.softmax(
    sampling.sampling_logits(jnp.array(logits), top_p=top_p, **settings)
  )
  np.testing.assert_allclose(law, lower, rtol=2e-5, atol=1e-7)


def test_program_sorts_only_when_asked_to():
  def program(**settings):
    decode = functools.partial(uncompiled, random_table(), **settings)
    text = (
      quick_jit(decode).lower(jax.random.key(0)).compile().as_text().lower()
    )
    return "sort(" in text or "topk" in text

  assert not program()
  assert not program(top_k=0, top_p=1.0, temperature=0.7, suppress_ids=(0,))
  assert program(top_k=2)
  assert program(top_p=0.9)


# --- One random stream per row ------------------------------------------------


@pytest.fixture
def key():
  return jax.random.key(7)


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_same_key_same_tokens_and_another_key_others(generator):
  key = jax.random.key(7, impl=generator)
  table = random_table().at[:, EOS].set(-9.0)
  first, again = (sample_markov(table, key).tokens for _ in range(2))
  np.testing.assert_array_equal(first, again)
  other = sample_markov(table, jax.random.fold_in(key, 1)).tokens
  assert (first != other).mean() > 0.4


def test_all_words_of_a_wide_key_count():
  table = random_table().at[:, EOS].set(-9.0)
  rows = {
    tuple(
      np.asarray(
        sample_markov(table, jax.random.wrap_key_data(data, impl="rbg")).tokens
      ).ravel()
    )
    for data in jnp.eye(4, dtype=jnp.uint32)
  }
  assert len(rows) == 4


def test_raw_keys_are_keys():
  np.testing.assert_array_equal(
    sample_markov(random_table(), jax.random.PRNGKey(3)).tokens,
    sample_markov(random_table(), jax.random.key(3)).tokens,
  )


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_rows_do_not_depend_on_order_or_neighbours(generator):
  key = jax.random.key(7, impl=generator)
  table = random_table()
  whole = sample_markov(table, key, max_decode_length=7)
  order = jnp.array([5, 2, 7])
  part = sample_markov(
    table, key, batch_size=3, max_decode_length=7, row_ids=order
  )
  np.testing.assert_array_equal(part.tokens, whole.tokens[order])
  np.testing.assert_allclose(
    part.log_probs, whole.log_probs[order], rtol=1e-6, atol=1e-7
  )
  longer = sample_markov(table, key, max_decode_length=9)
  np.testing.assert_array_equal(longer.tokens[:, :7], whole.tokens)


def test_microbatches_in_a_scan_give_the_rows_of_the_batch(key):
  table = random_table()
  whole = sample_markov(table, key)

  @quick_jit
  def in_microbatches(row_ids):
    def body(carry, row_ids):
      return carry, uncompiled(table, key, batch_size=2, row_ids=row_ids)

    return jax.lax.scan(body, None, row_ids)[1]

  parts = in_microbatches(jnp.arange(8).reshape(4, 2))
  np.testing.assert_array_equal(parts.tokens.reshape(8, 5), whole.tokens)


# Rows of very different lengths: a table for each row, with its own EOS logit.
def uneven_tables():
  tables = jnp.stack([random_table(seed) for seed in range(8)])
  return tables.at[:, :, EOS].set(jnp.linspace(-9.0, 9.0, 8)[:, None])


def uneven(tokens, tables):
  rows = jnp.take_along_axis(tables, tokens[:, None, None], axis=1)
  return rows[:, 0], tables


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4)])
def test_sharded_batch_gives_the_same_rows(shape, key):
  decode = functools.partial(
    sampling.sample, batch_size=8, max_decode_length=12, top_k=5, top_p=0.95
  )
  alone = quick_jit(functools.partial(decode, uneven))(uneven_tables(), key)
  lengths = sampling.sequence_weights(alone.tokens).sum(axis=1)
  assert lengths.min() == 1 and lengths.max() == 12
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()).reshape(shape), ("data", "model")
  )
  rows = NamedSharding(mesh, PartitionSpec("data"))

  def vocab_sharded(tokens, tables):
    logits, tables = uneven(tokens, tables)
    # Three of the six columns lie on one half of the model axis.
    if shape[1] == 2:
      logits = jax.lax.with_sharding_constraint(
        logits, NamedSharding(mesh, PartitionSpec("data", "model"))
      )
    return logits, tables

  sharded = quick_jit(functools.partial(decode, vocab_sharded))(
    jax.device_put(uneven_tables(), rows), key
  )
  assert len(sharded.tokens.sharding.device_set) == 8
  np.testing.assert_array_equal(sharded.tokens, alone.tokens)
  np.testing.assert_allclose(
    sharded.log_probs, alone.log_probs, rtol=1e-5, atol=1e-6
  )


def test_pmap_gives_the_same_rows(key):
  alone = sampling.sample(
    uneven, uneven_tables(), key, batch_size=8, max_decode_length=6
  )

  def decode(tables, row_ids):
    return sampling.sample(
      uneven,
      tables,
      key,
      batch_size=2,
      max_decode_length=6,
      row_ids=row_ids,
    ).tokens

  tokens = jax.pmap(decode, devices=jax.devices()[:4])(
    uneven_tables().reshape(4, 2, VOCAB, VOCAB), jnp.arange(8).reshape(4, 2)
  )
  np.testing.assert_array_equal(tokens.reshape(8, 6), alone.tokens)


# --- Gradients ----------------------------------------------------------------


@pytest.mark.parametrize("stopped", [True, False])
def test_no_gradient_flows_through_sampling(stopped):
  table = random_table(9)

  def supervised(table, tokens):
    weights = sampling.sequence_weights(tokens)
    log_probs = jax.nn.log_softmax(table)[sampling.shift_right(tokens), tokens]
    return -(weights * log_probs).sum()

  @quick_jit
  @jax.value_and_grad
  def on_policy(table):
    source = jax.lax.stop_gradient(table) if stopped else table
    result = sampling.sample(
      # The table comes in both ways, in the cache and closed over.
      lambda tokens, cache: (source[tokens] + cache, 0.5 * cache),
      source.sum(axis=0)[None, :],
      jax.random.key(4),
      batch_size=8,
      max_decode_length=5,
      temperature=jnp.exp(source[0, 0]),
    )
    loss = supervised(table, result.tokens) + result.log_probs.sum()
    return loss - jax.lax.stop_gradient(result.log_probs.sum())

  value, gradient = on_policy(table)
  tokens = sampling.sample(
    lambda tokens, cache: (table[tokens] + cache, 0.5 * cache),
    table.sum(axis=0)[None, :],
    jax.random.key(4),
    batch_size=8,
    max_decode_length=5,
    temperature=jnp.exp(table[0, 0]),
  ).tokens
  expected, expected_gradient = jax.value_and_grad(supervised)(table, tokens)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
  assert np.abs(gradient).max() > 0.1


# --- Weights and inputs from tokens -------------------------------------------


def test_sequence_weights_count_up_to_the_first_eos():
  tokens = jnp.array(
    [[5, 1, 0, 0], [1, 0, 0, 0], [5, 4, 3, 2], [5, 0, 1, 0], [1, 5, 1, 5]]
  )
  expected = np.array(
    [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
  )
  weights = sampling.sequence_weights(tokens)
  assert weights.dtype == jnp.float32
  np.testing.assert_array_equal(weights, expected)
  active = jnp.array([True, False, False, True, True])
  np.testing.assert_array_equal(
    sampling.sequence_weights(tokens, active=active),
    expected * np.asarray(active)[:, None],
  )
  np.testing.assert_array_equal(
    sampling.sequence_weights(tokens[:1], eos_id=5), [[1, 0, 0, 0]]
  )


def test_shift_right_starts_with_pad_and_drops_the_last():
  shifted = sampling.shift_right(jnp.array([[5, 4, 1, 0], [5, 4, 3, 2]]))
  np.testing.assert_array_equal(shifted, [[0, 5, 4, 1], [0, 5, 4, 3]])
  assert shifted.dtype == jnp.int32


# --- Wrong settings -----------------------------------------------------------


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"max_decode_length": 0}, "got 0; set max_decode_length"),
    ({"temperature": -0.5}, "got -0.5; set temperature"),
    ({"temperature": float("nan")}, "got nan; set temperature"),
    ({"top_k": -1}, "got -1; set top_k"),
    ({"top_p": 0.0}, "got 0.0; set top_p"),
    ({"top_p": 1.5}, "got 1.5; set top_p"),
    ({"suppress_ids": (VOCAB,)}, r"0\.\.5 .* got \(6,\); set suppress_ids"),
    ({"suppress_ids": (0, -1)}, r"got \(0, -1\); set suppress_ids"),
    ({"suppress_ids": range(VOCAB)}, "not all of them.* set suppress_ids"),
    ({"row_ids": jnp.arange(3)}, r"row_ids of shape \[8\], got \[3\]"),
    ({"active": jnp.ones((8, 1))}, r"active of shape \[8\], got \[8, 1\]"),
    ({"start_tokens": jnp.arange(9)}, r"start_tokens of shape .* got \[9\]"),
  ],
)
def test_wrong_settings_say_what_to_change(settings, message):
  with pytest.raises(ValueError, match=message):
    sample_markov(random_table(), jax.random.key(0), **settings)


def test_drawing_needs_a_key():
  with pytest.raises(ValueError, match=r"random key at temperature 1\.0.* key"):
    sample_markov(random_table(), None)
