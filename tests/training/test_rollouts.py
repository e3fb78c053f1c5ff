"""Outputs sampled, decoded and judged between two steps."""

import pathlib

import jax
import numpy as np
import pytest
import remote_files
import toy_decoder_only
import toy_models
import toy_rollouts

from gkd_jax import data, files
from gkd_jax.training import rollouts

ROOT = pathlib.Path(__file__).parents[2]


def text_of(tokens):
  """Decoded by hand: the symbols up to EOS; ids without one are left out."""
  tokens = [int(t) for t in tokens]
  tokens = tokens[: tokens.index(1)] if 1 in tokens else tokens
  return "".join(toy_rollouts.SYMBOLS[t - 3] for t in tokens if 3 <= t < 18)


def test_a_reward_reads_the_texts_of_prompts_outputs_and_examples():
  seen = []

  def reward(*texts):
    seen.append(texts)
    return toy_rollouts.score(*texts)

  batch = toy_models.batch()
  model, params, _ = toy_rollouts.rl(reward)
  got = toy_rollouts.make(model, [batch]).next(5, params)
  ((inputs, outputs, examples),) = seen
  assert [toy_rollouts.symbols(x) for x in inputs] == [
    text_of(row) for row in batch["encoder_input_tokens"] for _ in range(2)
  ]
  assert [toy_rollouts.symbols(x) for x in outputs] == [
    text_of(row) for row in got["decoder_target_tokens"]
  ]
  assert [toy_rollouts.symbols(x["targets"]) for x in examples] == [
    text_of(row) for row in batch["decoder_target_tokens"] for _ in range(2)
  ]
  assert [x["inputs"] for x in examples] == inputs
  # The outputs are those of this step's key, as the step itself would draw them.
  key = jax.random.fold_in(jax.random.key(7), 5)
  expected = jax.jit(model.roll_out)(params, batch, key)
  for name, value in expected.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
  r = np.array(toy_rollouts.score(inputs, outputs, examples)).reshape(8, 2)
  np.testing.assert_allclose(got["rewards"], r.reshape(-1), rtol=1e-6)
  a = r - r[:, ::-1]  # of two samples, the other one is the baseline
  np.testing.assert_allclose(
    got["advantages"],
    a.reshape(-1, 1) * got["decoder_loss_weights"],
    atol=1e-5,
  )
  assert np.abs(a).max() > 1


def test_rows_of_a_decoder_only_model():
  seen = []

  def reward(*texts):
    seen.append(texts)
    return toy_rollouts.score(*texts)

  batch = toy_decoder_only.batch()
  model, params, _ = toy_rollouts.rl(reward, toys=toy_decoder_only)
  got = toy_rollouts.make(model, [batch]).next(0, params)
  ((inputs, outputs, examples),) = seen
  pairs = toy_decoder_only.pairs()
  several = lambda rows: [text_of(row) for row in rows for _ in range(2)]
  assert [toy_rollouts.symbols(x) for x in inputs] == several(
    a for a, _ in pairs
  )
  assert [toy_rollouts.symbols(x["targets"]) for x in examples] == several(
    b for _, b in pairs
  )
  for i, output in enumerate(outputs):
    start = len(pairs[i // 2][0])
    row = got["decoder_target_tokens"][i]
    assert row[:start].tolist() == pairs[i // 2][0]
    assert toy_rollouts.symbols(output) == text_of(row[start:])
    assert not got["advantages"][i, :start].any()


def test_prompts_need_no_eos():
  row = {
    "decoder_target_tokens": np.array([[5, 6, 7, 1, 0]]),
    "decoder_loss_weights": np.array([[0, 0, 1, 1, 0]]),
  }
  assert [x.tolist() for x in rollouts.prompts(row)] == [[5, 6]]
  assert [x.tolist() for x in rollouts.targets(row)] == [[7, 1]]


def test_rewards_that_are_missing_and_outputs_that_were_cut():
  seen = []

  def reward(inputs, outputs, examples):
    seen.append([example["ended"] for example in examples])
    numbers = toy_rollouts.score(inputs, outputs, examples)
    numbers[0], numbers[6], numbers[7] = None, float("nan"), -float("inf")
    return numbers

  model, params, _ = toy_rollouts.rl(reward, cut_penalty=2.0)
  batch = toy_models.batch()
  got = toy_rollouts.make(model, [batch]).next(0, params)
  tokens = got["decoder_target_tokens"]
  ended = (tokens == 1).any(axis=1)
  assert seen == [ended.tolist()] and 0 < ended.sum() < 16
  r = got["rewards"].astype(np.float64)
  np.testing.assert_array_equal(np.flatnonzero(np.isnan(r)), [0, 6, 7])
  used = (r - 2.0 * ~ended).reshape(8, 2)
  a = used - used[:, ::-1]  # of two samples, the other one is the baseline
  # A prompt with one reward has no baseline for it.
  a[[0, 3]] = 0.0
  np.testing.assert_allclose(
    got["advantages"],
    a.reshape(-1, 1) * got["decoder_loss_weights"],
    atol=1e-5,
  )
  model.max_missing_rewards = 0.18
  with pytest.raises(ValueError, match=r"82% .* 19% of them; set REWARD or"):
    toy_rollouts.make(model, [batch]).next(0, params)


def test_whitened_rewards_and_a_running_mean():
  batch = toy_models.batch()
  model, params, _ = toy_rollouts.rl(
    baseline="running_mean", baseline_decay=0.5, samples_per_prompt=1
  )
  batches = toy_rollouts.make(model, [batch])
  means, values = [], 0.0
  for step in range(3):
    got = batches.next(step, params)
    used = got["decoder_loss_weights"] > 0
    b = (got["rewards"][:, None] - got["advantages"])[used]
    np.testing.assert_allclose(b, values, atol=1e-5)
    means.append(got["rewards"].astype(np.float64).mean())
    values = np.average(means, weights=0.5 ** np.arange(step + 1)[::-1])
  assert np.ptp(means) > 0.05
  model, params, _ = toy_rollouts.rl(
    whiten_rewards=True, baseline="none", samples_per_prompt=1
  )
  got = toy_rollouts.make(model, [batch]).next(0, params)
  r = got["rewards"].astype(np.float64)
  np.testing.assert_allclose(
    got["advantages"][:, 0], (r - r.mean()) / r.std(), atol=1e-5
  )


def train(model, batches, state, teacher, steps, run):
  for step in steps:
    batch = batches.next(step, state.params)
    state, _ = run(state, teacher, batch)
  return state


def test_a_resumed_run_is_the_same_to_the_bit():
  model, params, teacher = toy_rollouts.rl(
    baseline="running_mean", samples_per_prompt=1
  )
  data_batches = [toy_models.batch(seed=seed) for seed in range(3)]
  step, optimizer = toy_models.sgd_step(model, "student")
  run = jax.jit(step)
  batches = toy_rollouts.make(model, data_batches)
  first = train(
    model, batches, toy_models.state(params, optimizer), teacher, range(2), run
  )
  folder = files.absolute(remote_files.new())
  batches.save_state(folder)
  expected = train(model, batches, first, teacher, range(2, 4), run)
  resumed = toy_rollouts.make(model, data_batches)
  resumed.restore_state(folder)
  got = train(model, resumed, first, teacher, range(2, 4), run)
  for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
    np.testing.assert_array_equal(a, b)
  (folder / "running_mean.json").unlink()
  with pytest.raises(ValueError, match="set BASELINE"):
    resumed.restore_state(folder)


def test_other_models_get_the_batches_of_the_data(tmp_path):
  batch = toy_models.batch()
  for model in (
    toy_models.gkd()[0],
    toy_rollouts.rl(alpha=1.0, samples_per_prompt=1)[0],
  ):
    batches = toy_rollouts.make(model, [batch])
    assert batches.next(0, None) is batch
    batches.save_state(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["position"]


@pytest.mark.parametrize(
  "bad", [[1.0], 2.0, None, [[1.0] * 16], ["good"] * 16, [[1.0], []] * 8]
)
def test_a_reward_of_another_shape(bad):
  model, params, _ = toy_rollouts.rl(lambda *_: bad)
  with pytest.raises(ValueError, match=r"each of 16 outputs.*set REWARD"):
    toy_rollouts.make(model, [toy_models.batch()]).next(0, params)


def judge(reward):
  model, *_ = toy_rollouts.rl(reward, max_missing_rewards=0.25)
  return rollouts.Judge(model, data.load_task("arithmetic_cot"))


def test_a_reward_is_tried_on_references_and_on_prompts_without_them():
  batch = toy_models.batch()
  weights = np.array(batch["decoder_loss_weights"])
  alone = [bool(text_of(row)) for row in batch["encoder_input_tokens"]]
  weights[alone.index(True)] = 0  # a prompt of some symbols, alone
  judged = judge(toy_rollouts.score).try_on(
    batch | {"decoder_loss_weights": weights}
  )
  expected = []
  for prompt, target, weight in zip(
    batch["encoder_input_tokens"],
    batch["decoder_target_tokens"],
    weights,
    strict=True,
  ):
    a, b = len(text_of(prompt)), len(text_of(target[weight > 0]))
    expected.append((b or a) + 0.1 * a + 0.01 * b)
  np.testing.assert_allclose(judged, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("rewards", "said"),
  [
    (lambda *_: 1 / 0, r"ZeroDivisionError: division by zero \(test_roll"),
    (lambda *_: [1.0] * 7, r"one reward for each of 8 outputs, .*\(7,\)"),
    (lambda *_: [[1.0]] * 8, r"each of 8 outputs, .* shape \(8, 1\)"),
    (lambda *_: [1.0] * 5 + [None, np.nan, np.inf], "infinite number for 38%"),
  ],
  ids=["raises", "too few", "of another shape", "missing"],
)
def test_a_reward_that_fails_is_refused_when_it_is_tried(rewards, said):
  with pytest.raises(ValueError, match=f"^expected .*{said}.*; set REWARD"):
    judge(rewards).try_on(toy_models.batch())
