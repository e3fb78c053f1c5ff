"""The decode loop: exact rows, one random stream per row, no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_fakes
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax import decoding
from gkd_jax.decoding import sampling

VOCAB = sampling_fakes.VOCAB
EOS = sampling_fakes.EOS

# --- Rows, ends and lengths -------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_end_at_eos_and_stay_zero(temperature):
  script = [[5, 4, 1, 3, 2], [1, 5, 5, 5, 5], [2, 3, 4, 5, 1], [3, 0, 2, 2, 2]]
  result = decoding.sample(
    sampling_fakes.scripted(script),
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
    ([[1, 1, 1, 1], [1, 1, 1, 1]], {"eos_id": ()}, 4),
    ([[5, 2, 5, 5], [5, 5, 4, 5]], {"eos_id": (2, 4)}, 3),
    ([[5, 0, 5, 5], [0, 5, 5, 5]], {"eos_id": 0}, 2),
    ([[5, 5, 5, 5], [4, 1, 5, 5]], {"active": [False, True]}, 2),
    ([[5, 5, 5, 5], [4, 1, 5, 5]], {"active": [False, False]}, 0),
  ],
)
def test_loop_stops_when_every_row_has_ended(script, settings, steps):
  if "active" in settings:
    settings = {**settings, "active": jnp.array(settings["active"])}
  fed = []
  model = sampling_fakes.scripted(script)

  def counted(tokens, cache):
    jax.debug.callback(lambda tokens: fed.append(tokens.tolist()), tokens)
    return model(tokens, cache)

  decoding.sample(
    counted,
    jnp.int32(0),
    None,
    batch_size=2,
    max_decode_length=4,
    temperature=0,
    **settings,
  )
  jax.effects_barrier()
  assert len(fed) == steps


def test_model_is_fed_the_start_token_then_what_was_drawn():
  fed = []

  def model(tokens, position):
    jax.debug.callback(lambda tokens: fed.append(tokens.tolist()), tokens)
    return sampling_fakes.scripted([[5, 4, 3], [2, 1, 3]])(tokens, position)

  for start_tokens in (None, jnp.array([4, 2])):
    decoding.sample(
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
  everyone = sampling_fakes.sample_markov(sampling_fakes.random_table(), key)
  some = sampling_fakes.sample_markov(
    sampling_fakes.random_table(), key, active=active
  )
  for whole, part in zip(everyone, some, strict=True):
    np.testing.assert_array_equal(part, np.where(active[:, None], whole, 0))


# --- Greedy -------------------------------------------------------------------


def test_greedy_takes_the_likeliest_and_scores_it_at_temperature_one():
  table = sampling_fakes.random_table(1).at[:, EOS].set(-9.0)
  result = sampling_fakes.sample_markov(
    table, None, temperature=0.0, top_k=2, top_p=0.3
  )
  distribution = jax.nn.log_softmax(np.asarray(table, np.float32), axis=-1)
  last = 0
  for t in range(5):
    best = int(np.argmax(table[last]))
    np.testing.assert_array_equal(result.tokens[:, t], best)
    np.testing.assert_allclose(
      result.log_probs[:, t], distribution[last, best], 1e-5
    )
    last = best


def test_greedy_takes_the_lowest_id_of_equal_ones_and_no_random_number():
  table = jnp.zeros((VOCAB, VOCAB)).at[:, jnp.array([3, 5])].set(2.0)
  greedy = sampling_fakes.sample_markov(table, None, temperature=0)
  np.testing.assert_array_equal(greedy.tokens, 3)

  def program(**settings):
    decode = functools.partial(sampling_fakes.uncompiled, table, **settings)
    return jax.jit(decode).lower(jax.random.key(0)).as_text()

  assert "threefry" not in program(temperature=0)
  assert "threefry" in program()


@pytest.mark.parametrize(
  "temperature",
  [1e-3, 1e-45, jnp.float32(1e-3), jnp.float32(1e-38), jnp.float32(0.0)],
)
def test_small_temperatures_are_greedy(temperature):
  table = sampling_fakes.random_table(2, scale=30.0)
  key = jax.random.key(0)
  cold = sampling_fakes.sample_markov(
    table, key, temperature=temperature, suppress_ids=(1,)
  )
  greedy = sampling_fakes.sample_markov(
    table, None, temperature=0, suppress_ids=(1,)
  )
  np.testing.assert_array_equal(cold.tokens, greedy.tokens)
  np.testing.assert_allclose(cold.log_probs, 0.0, atol=1e-6)


def test_array_temperatures_share_one_program_and_equal_numbers():
  traces = []

  def model(tokens, table):
    traces.append(None)
    return sampling_fakes.markov(tokens, table)

  @sampling_fakes.quick_jit
  def decode(temperature):
    return decoding.sample(
      model,
      sampling_fakes.random_table(),
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
    static = sampling_fakes.sample_markov(
      sampling_fakes.random_table(), jax.random.key(5), temperature=temperature
    )
    np.testing.assert_array_equal(result.tokens, static.tokens)
    np.testing.assert_allclose(result.log_probs, static.log_probs, rtol=1e-5)
  assert np.isnan(results[3].log_probs[:, 0]).all()


# --- One random stream per row ------------------------------------------------


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_same_key_same_tokens_and_another_key_others(generator):
  key = jax.random.key(7, impl=generator)
  table = sampling_fakes.random_table().at[:, EOS].set(-9.0)
  first, again = (
    sampling_fakes.sample_markov(table, key).tokens for _ in range(2)
  )
  np.testing.assert_array_equal(first, again)
  other = sampling_fakes.sample_markov(table, jax.random.fold_in(key, 1)).tokens
  assert (first != other).mean() > 0.4


def test_all_words_of_a_wide_key_count():
  table = sampling_fakes.random_table().at[:, EOS].set(-9.0)
  rows = {
    tuple(
      np.asarray(
        sampling_fakes.sample_markov(
          table, jax.random.wrap_key_data(data, impl="rbg")
        ).tokens
      ).ravel()
    )
    for data in jnp.eye(4, dtype=jnp.uint32)
  }
  assert len(rows) == 4


def test_raw_keys_are_keys():
  np.testing.assert_array_equal(
    sampling_fakes.sample_markov(
      sampling_fakes.random_table(), jax.random.PRNGKey(3)
    ).tokens,
    sampling_fakes.sample_markov(
      sampling_fakes.random_table(), jax.random.key(3)
    ).tokens,
  )


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_rows_do_not_depend_on_order_or_neighbours(generator):
  key = jax.random.key(7, impl=generator)
  table = sampling_fakes.random_table()
  whole = sampling_fakes.sample_markov(table, key)
  order = jnp.array([5, 2, 7])
  # Nor on the length that there is room for.
  part = sampling_fakes.sample_markov(
    table, key, batch_size=3, max_decode_length=7, row_ids=order
  )
  np.testing.assert_array_equal(part.tokens[:, :5], whole.tokens[order])
  np.testing.assert_allclose(
    part.log_probs[:, :5], whole.log_probs[order], rtol=1e-6, atol=1e-7
  )


def test_microbatches_in_a_scan_give_the_rows_of_the_batch():
  key = jax.random.key(7)
  table = sampling_fakes.random_table()
  whole = sampling_fakes.sample_markov(table, key)

  @sampling_fakes.quick_jit
  def in_microbatches(row_ids):
    def body(carry, row_ids):
      return carry, sampling_fakes.uncompiled(
        table, key, batch_size=2, row_ids=row_ids
      )

    return jax.lax.scan(body, None, row_ids)[1]

  parts = in_microbatches(jnp.arange(8).reshape(4, 2))
  np.testing.assert_array_equal(parts.tokens.reshape(8, 5), whole.tokens)


# Rows of very different lengths: a table for each row, with its own EOS logit.
def uneven_tables():
  tables = jnp.stack([sampling_fakes.random_table(seed) for seed in range(8)])
  return tables.at[:, :, EOS].set(jnp.linspace(-9.0, 9.0, 8)[:, None])


def uneven(tokens, tables):
  rows = jnp.take_along_axis(tables, tokens[:, None, None], axis=1)
  return rows[:, 0], tables


@functools.cache
def decode_uneven(model):
  return sampling_fakes.quick_jit(
    lambda tables: decoding.sample(
      model,
      tables,
      jax.random.key(7),
      batch_size=8,
      max_decode_length=12,
      top_k=5,
      top_p=0.95,
    )
  )


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4)])
def test_sharded_batch_gives_the_same_rows(shape):
  alone = decode_uneven(uneven)(uneven_tables())
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

  sharded = decode_uneven(vocab_sharded)(jax.device_put(uneven_tables(), rows))
  assert len(sharded.tokens.sharding.device_set) == 8
  np.testing.assert_array_equal(sharded.tokens, alone.tokens)
  np.testing.assert_allclose(
    sharded.log_probs, alone.log_probs, rtol=1e-5, atol=1e-6
  )


def test_pmap_gives_the_same_rows():
  @functools.partial(jax.pmap, devices=jax.devices()[:4])
  def decode(tables, row_ids):
    return decoding.sample(
      uneven,
      tables,
      jax.random.key(7),
      batch_size=2,
      max_decode_length=12,
      row_ids=row_ids,
      top_k=5,
      top_p=0.95,
    ).tokens

  tokens = decode(
    uneven_tables().reshape(4, 2, VOCAB, VOCAB), jnp.arange(8).reshape(4, 2)
  )
  alone = decode_uneven(uneven)(uneven_tables())
  np.testing.assert_array_equal(tokens.reshape(8, 12), alone.tokens)


# --- Gradients ----------------------------------------------------------------


@pytest.mark.parametrize("stopped", [True, False])
def test_no_gradient_flows_through_sampling(stopped):
  table = sampling_fakes.random_table(9)

  def supervised(table, tokens):
    weights = sampling.sequence_weights(tokens)
    log_probs = jax.nn.log_softmax(table)[sampling.shift_right(tokens), tokens]
    return -(weights * log_probs).sum()

  @sampling_fakes.quick_jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def on_policy(table):
    source = jax.lax.stop_gradient(table) if stopped else table
    result = decoding.sample(
      # The table comes in both ways, in the cache and closed over.
      lambda tokens, cache: (source[tokens] + cache, 0.5 * cache),
      source.sum(axis=0)[None, :],
      jax.random.key(4),
      batch_size=8,
      max_decode_length=5,
      temperature=jnp.exp(source[0, 0]),
    )
    loss = supervised(table, result.tokens) + result.log_probs.sum()
    return loss - jax.lax.stop_gradient(result.log_probs.sum()), result.tokens

  (value, tokens), gradient = on_policy(table)
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


@pytest.mark.parametrize("slots", [None, 2])
def test_rows_end_at_each_of_several_eos(slots):
  script = jnp.array([[3, 2, 5, 5], [4, 5, 5, 5], [3, 3, 3, 4], [3, 0, 3, 3]])

  def model(tokens, cache):
    rows, position = cache
    wanted = jnp.take_along_axis(rows, position[:, None], axis=1)[:, 0]
    logits = 60.0 * jax.nn.one_hot(wanted, sampling_fakes.VOCAB)
    return logits, (rows, position + 1)

  tokens, _ = decoding.sample(
    model,
    (script, jnp.zeros(4, jnp.int32)),
    None,
    batch_size=4,
    max_decode_length=4,
    temperature=0,
    eos_id=(2, 4),
    slots=slots,
    row_axes=(0, 0),
  )
  np.testing.assert_array_equal(
    tokens, [[3, 2, 0, 0], [4, 0, 0, 0], [3, 3, 3, 4], [3, 0, 3, 3]]
  )
  np.testing.assert_array_equal(
    sampling.sequence_weights(tokens, (2, 4)).sum(axis=1), [2, 1, 4, 4]
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
    sampling_fakes.sample_markov(
      sampling_fakes.random_table(), jax.random.key(0), **settings
    )


def test_drawing_needs_a_key():
  with pytest.raises(ValueError, match=r"random key at temperature 1\.0.* key"):
    sampling_fakes.sample_markov(sampling_fakes.random_table(), None)
