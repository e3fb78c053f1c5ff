"""Beam search: T5X's numbers, exhaustive search in float64, cases by hand."""

import functools
import itertools

import beam_models
import beam_oracle
import golden_t5x
import jax
import jax.numpy as jnp
import loss_batches
import numpy as np
import pytest

from gkd_jax import decoding
from gkd_jax.decoding import sampling

EOS = 1

# --- Models without a network, and what they should give ---------------------


def distribution(weights, prefix):
  """Float64 log-probs after a prefix, for one prompt's weights."""
  fed = (0, *prefix)
  logits = sum(np.float64(weights[t, token]) for t, token in enumerate(fed))
  return loss_batches.log_softmax64(logits)


def every_output(weights, alpha):
  """All outputs that end within the length, `{tokens: score}`, float64."""
  length, vocab = weights.shape[0], weights.shape[1]
  others = [v for v in range(vocab) if v != EOS]
  scores = {}
  for size in range(length):
    for prefix in itertools.product(others, repeat=size):
      tokens = (*prefix, EOS)
      total = sum(
        distribution(weights, tokens[:t])[v] for t, v in enumerate(tokens)
      )
      padded = tokens + (0,) * (length - len(tokens))
      scores[padded] = total / ((5 + len(tokens)) / 6) ** alpha
  return scores


def narrow_search(weights, alpha, num_decodes):
  """The search as it is described, one prompt, tokens padded."""
  length = weights.shape[0]
  outputs = beam_oracle.best_outputs(
    functools.partial(distribution, weights), length, alpha, num_decodes
  )
  return [(y + (0,) * (length - len(y)), score) for y, score in outputs]


def assert_outputs(result, b, expected):
  """Prompt b's last slots hold `expected`, the others nothing."""
  empty = result.tokens.shape[1] - len(expected)
  np.testing.assert_array_equal(result.tokens[b, :empty], 0)
  np.testing.assert_array_equal(result.scores[b, :empty], -1e7)
  np.testing.assert_array_equal(
    result.tokens[b, empty:], [y for y, _ in expected]
  )
  np.testing.assert_allclose(
    result.scores[b, empty:], [s for _, s in expected], rtol=1e-5
  )


def sure(token):
  return 60.0 * np.eye(4)[token]


# --- T5X's numbers -----------------------------------------------------------


@functools.cache
def golden_beams(name, alpha):
  model, params, batch = golden_t5x.model(
    name,
    decode_fn=decoding.beam_search,
    default_decoder_params={"num_decodes": 4, "alpha": alpha},
  )
  decode = functools.partial(
    model.predict_batch_with_aux, return_all_decodes=True
  )
  tokens, aux = jax.jit(decode)(params, batch)
  return np.asarray(tokens), np.asarray(aux["scores"])


@pytest.mark.parametrize("name", golden_t5x.NAMES)
def test_tokens_and_scores_equal_t5x(name):
  numbers, _ = golden_t5x.load(name)
  tokens, scores = golden_beams(name, 0.6)
  np.testing.assert_array_equal(tokens, numbers["beam"])
  np.testing.assert_allclose(scores, numbers["beam_scores"], rtol=1e-5)


def test_scores_are_those_of_score_batch():
  model, params, batch = golden_t5x.model("t5_1_1_tiny")
  tokens, scores = golden_beams("t5_1_1_tiny", 0.6)
  lengths = sampling.sequence_weights(tokens.reshape(16, -1)).sum(axis=1)
  lengths = np.asarray(lengths).reshape(4, 4)
  ended = (tokens == EOS).any(axis=2)
  # PAD is a token to the decoder, and padding to `score_batch`.
  plain = ((tokens > 0).sum(axis=2) == lengths).all(axis=1)
  np.testing.assert_array_equal(ended.any(axis=1)[plain], [True, False])
  penalty = np.where(ended, ((5 + lengths) / 6) ** 0.6, 1.0)
  score = jax.jit(model.score_batch)
  for n in range(4):
    targets = tokens[:, n]
    scored = score(
      params,
      {
        "encoder_input_tokens": batch["encoder_input_tokens"],
        "decoder_input_tokens": sampling.shift_right(targets),
        "decoder_target_tokens": targets,
      },
    )
    np.testing.assert_allclose(
      scores[plain, n] * penalty[plain, n], scored[plain], atol=1e-4
    )


# --- Exhaustive search -------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0, -1.0])
def test_a_wide_beam_is_exhaustive_search(alpha):
  weights = beam_models.history_weights(2, 4, 4)
  # 1 + 3 + 9 + 27 outputs end within 4 tokens; 27 * 4 candidates are the most.
  result = beam_models.compiled_search(
    weights, jnp.float32(alpha), num_decodes=54
  )
  for b in range(2):
    expected = every_output(weights[b], alpha)
    expected = sorted(expected.items(), key=lambda x: x[1])
    assert_outputs(result, b, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0, -1.0])
def test_a_narrow_beam_is_the_search_as_described(alpha):
  weights = beam_models.history_weights(8, 5, 6)
  result = beam_models.compiled_search(
    weights, jnp.float32(alpha), num_decodes=3
  )
  for b in range(8):
    assert_outputs(result, b, narrow_search(weights[b], alpha, 3))


def test_larger_alpha_gives_longer_outputs():
  weights = beam_models.history_weights(8, 5, 6)
  lengths = [
    sampling.sequence_weights(
      beam_models.compiled_search(
        weights, jnp.float32(alpha), num_decodes=3
      ).tokens[:, -1]
    ).sum()
    for alpha in (-1.0, 0.0, 2.0)
  ]
  assert lengths[0] < lengths[1] < lengths[2]


# --- By hand: ends, ties, stopping -------------------------------------------


def test_outputs_end_at_eos_or_at_the_length():
  distributions = [
    [sure(EOS), sure(2), sure(2), sure(2)],
    [sure(3), sure(0), sure(EOS), sure(2)],
    [sure(3), sure(2), sure(0), sure(EOS)],
  ]
  result = beam_models.run_scripted(distributions, num_decodes=1)
  np.testing.assert_array_equal(
    result.tokens, [[[1, 0, 0, 0]], [[3, 0, 1, 0]], [[3, 2, 0, 1]]]
  )
  assert result.tokens.dtype == jnp.int32
  np.testing.assert_allclose(result.scores, 0.0, atol=1e-6)


def test_live_outputs_and_plain_log_probs_where_none_has_ended():
  # An output that ended counts however unlikely it is: EOS must be impossible.
  first = [-np.inf, -np.inf, np.log(0.7), np.log(0.3)]
  open_ended = [first, [-np.inf, -np.inf, np.log(0.6), np.log(0.4)]]
  ended = [first, np.log([1e-30, 0.5, 0.4, 0.1])]
  result = beam_models.run_scripted(
    [open_ended, ended], num_decodes=2, alpha=1.0
  )
  np.testing.assert_array_equal(
    result.tokens, [[[2, 3], [2, 2]], [[3, 1], [2, 1]]]
  )
  expected = np.log([[0.28, 0.42], [0.15, 0.35]])
  expected[1] /= 7 / 6
  np.testing.assert_allclose(result.scores, expected, rtol=1e-5)


def test_no_eos_where_its_id_is_negative():
  result = beam_models.run_scripted(
    [[sure(1), sure(1)]], num_decodes=1, eos_id=-1, alpha=1.0
  )
  np.testing.assert_array_equal(result.tokens, [[[1, 1]]])


def test_live_outputs_go_on_where_each_of_several_eos_ends_one():
  """One beam, EOS 2 and 3 likelier than all others at first.

  log 0.25 / (7/6)^10 of "4 2" is above log 0.4 of "2", by T5X's score at α = 10.
  """
  now = np.log([[1e-9, 1e-9, 0.4, 0.35, 0.25], [1e-9, 1e-9, 1.0, 1e-9, 1e-9]])
  result = beam_models.run_scripted(
    [now], num_decodes=1, eos_id=(2, 3), alpha=10.0
  )
  np.testing.assert_array_equal(result.tokens, [[[4, 2]]])
  score = np.log(0.25) / (7 / 6) ** 10
  np.testing.assert_allclose(result.scores, [[score]], rtol=1e-5)


def test_ties_go_to_the_worse_ranked_prefix_then_to_the_lower_id():
  # All equal: 0 and 2 stay live, 0 ranked above 2; then the four candidates of
  # 2 fill the 2N places, and (2, EOS) ends rather than (0, EOS).
  result = beam_models.run_scripted(
    np.zeros((1, 2, 4)), num_decodes=2, alpha=0.0
  )
  np.testing.assert_array_equal(result.tokens, [[[2, 1], [1, 0]]])
  np.testing.assert_allclose(result.scores[0], -np.log([16, 4]), rtol=1e-6)


def test_equal_finished_outputs_keep_the_one_that_ended_first():
  half = [-np.inf, 0.0, 0.0, -np.inf]
  then = [-np.inf, 0.0, -np.inf, -np.inf]
  result = beam_models.run_scripted([[half, then]], num_decodes=2, alpha=0.0)
  np.testing.assert_array_equal(result.tokens, [[[2, 1], [1, 0]]])
  np.testing.assert_array_equal(result.scores[0], np.float32(np.log([0.5] * 2)))
  result = beam_models.run_scripted([[half, then]], num_decodes=1, alpha=0.0)
  np.testing.assert_array_equal(result.tokens, [[[1, 0]]])


def test_slots_without_an_output_are_zero():
  only_eos = [-np.inf, 0.0, -np.inf, -np.inf]
  result = beam_models.run_scripted([[only_eos] * 3], num_decodes=3)
  np.testing.assert_array_equal(result.tokens[0, :2], 0)
  np.testing.assert_array_equal(result.tokens[0, 2], [1, 0, 0])
  np.testing.assert_array_equal(result.scores[0], [-1e7, -1e7, 0.0])
  # Fewer live outputs than slots, and none of them ended.
  only_two = [-np.inf, -np.inf, 0.0, -np.inf]
  result = beam_models.run_scripted([[only_two] * 2], num_decodes=2)
  np.testing.assert_array_equal(result.tokens, [[[0, 0], [2, 2]]])
  np.testing.assert_array_equal(result.scores, [[-1e7, 0.0]])


# log p(EOS) = -0.3133 at once, or -1.3133 for five times 2 and EOS.
SHORT_OR_LONG = [
  [-60.0, 0.0, -1.0, -60.0],
  *[sure(2)] * 4,
  sure(EOS),
]
TWO_ENDS = [[-60.0, 0.0, 0.0, -60.0], sure(EOS), *[sure(2)] * 4]


@pytest.mark.parametrize(
  ("distributions", "settings", "steps", "best"),
  [
    ([[sure(EOS)] * 6], {"num_decodes": 1}, 1, [1]),
    ([[sure(2)] * 6], {"num_decodes": 1}, 6, [2] * 6),
    # The slowest prompt decides.
    (
      [[sure(EOS)] * 6, [sure(2), sure(3), *[sure(EOS)] * 4]],
      {"num_decodes": 1},
      3,
      [2, 3, 1],
    ),
    # Both slots must be taken.
    ([TWO_ENDS], {"num_decodes": 1, "alpha": 0.0}, 2, [1]),
    ([TWO_ENDS], {"num_decodes": 2, "alpha": 1.0}, 2, [2, 1]),
    # -1.3133 / (12/6)^2 = -0.33 cannot win any more, / (12/6)^3 = -0.16 can:
    # as -1.3133 / (11/6)^3 = -0.21.
    ([SHORT_OR_LONG], {"num_decodes": 1, "alpha": 0.0}, 1, [1]),
    ([SHORT_OR_LONG], {"num_decodes": 1, "alpha": 2.0}, 1, [1]),
    ([SHORT_OR_LONG], {"num_decodes": 1, "alpha": 3.0}, 6, [2] * 5 + [1]),
    # Nothing is live.
    ([[[-np.inf, 0, -np.inf, -np.inf]] * 6], {"num_decodes": 2}, 1, [1]),
  ],
)
def test_loop_stops_when_no_live_output_can_win(
  distributions, settings, steps, best
):
  calls = []
  result = beam_models.run_scripted(distributions, calls, **settings)
  assert len(calls) == steps
  padded = best + [0] * (6 - len(best))
  np.testing.assert_array_equal(result.tokens[-1, -1], padded)


def test_a_beam_of_one_is_greedy_where_eos_is_first_or_nowhere():
  # Where EOS comes second, a beam of one may still end there and win.
  weights = 3 * beam_models.history_weights(8, 6, 5)
  weights[..., EOS] = -9.0
  for b in range(7):
    weights[b, b % 6, :, EOS] += 99.0
  cache = (jnp.asarray(weights), jnp.zeros((8, 6), jnp.int32), jnp.int32(0))
  greedy = decoding.sample(
    beam_models.history_model,
    cache,
    None,
    batch_size=8,
    max_decode_length=6,
    temperature=0.0,
  )
  lengths = sampling.sequence_weights(greedy.tokens).sum(axis=1)
  assert set(np.asarray(lengths)) == {1, 2, 3, 4, 5, 6}
  result = beam_models.compiled_search(weights, jnp.float32(0.0), num_decodes=1)
  np.testing.assert_array_equal(result.tokens[:, 0], greedy.tokens)
  np.testing.assert_allclose(
    result.scores[:, 0], greedy.log_probs.sum(axis=1), rtol=1e-5, atol=1e-5
  )


def test_start_tokens_are_fed_first():
  table = np.full((4, 4), -60.0)
  table[[0, 2, 3], [EOS, 3, EOS]] = 0.0

  def markov(tokens, cache):
    return jnp.asarray(table, jnp.float32)[tokens], cache

  result = decoding.beam_search(
    markov,
    (),
    batch_size=2,
    max_decode_length=3,
    num_decodes=1,
    start_tokens=jnp.array([0, 2]),
  )
  np.testing.assert_array_equal(result.tokens, [[[1, 0, 0]], [[3, 1, 0]]])


def test_each_prompt_is_searched_to_its_own_length():
  """As alone with that length, EOS rare enough for prompts that none ends in."""
  weights = beam_models.history_weights(4, 5, 8, seed=4)
  weights[:2, :, :, EOS] -= 9.0
  weights[0, 1:, :, EOS] += 30.0  # what comes after its length must not count
  room, num_decodes = (1, 3, 2, 5), 3
  result = beam_models.search(
    weights, 0.6, num_decodes, row_lengths=jnp.repeat(jnp.array(room), 3)
  )
  for b, length in enumerate(room):
    expected = [
      (y + (0,) * (5 - length), score)
      for y, score in narrow_search(weights[b, :length], 0.6, num_decodes)
    ]
    assert_outputs(result, b, expected)
  assert not np.any(np.asarray(result.tokens[:2]) == EOS)
