"""docs/performance.md holds what the benchmarks' files say; what these set up."""

import pathlib

import golden_t5x
import jax
import numpy as np
import pytest

from tests.benchmarks import buckets, growth, refill, report

ROOT = pathlib.Path(__file__).parents[2]


FILES = sorted((ROOT / "docs/results/performance").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_tables_are_those_of_the_files(path):
  text = (ROOT / "docs/performance.md").read_text()
  made = f"<!-- {path.stem} -->\n\n{report.section(path)}\n\n<!-- end -->"
  assert made in text, (
    "expected docs/performance.md as the files have it; run python -m"
    " tests.benchmarks.report --into=docs/performance.md"
    " docs/results/performance/*.json"
  )


def test_slope_of_a_power():
  points = [(x, 7 * x**1.5) for x in (1, 2, 4, 16)]
  assert growth.slope(points) == pytest.approx(1.5)


def test_arithmetic_of_a_step_by_hand():
  # One row, one token each way, one layer, student 64 and teacher 128 wide.
  def forward(d):
    encoder = 4 * d * d + 3 * d * 2 * d + 2 * d  # projections, MLP, attention
    decoder = encoder + 4 * d * d + 2 * d  # cross-attention besides
    return 2 * encoder, 2 * decoder + 2 * d * 10

  (encoder, decoder), teacher = forward(64), forward(128)
  sizes = growth.Sizes(1, 1, 1, 10, 64, 1)
  expected = 3 * encoder + 4 * decoder + sum(teacher)
  assert growth.flops(sizes) == expected


def test_busy_share_by_hand():
  # 64 rows: together they take 4 steps, by twos 1 and 4 steps in turn. In two
  # slots the last of 63 short rows ends at step 32, the long one then at 35.
  lengths = [1, 1, 4, 1] * 16
  assert refill.busy_share("together", lengths) == 7 / 16
  assert refill.busy_share("batches_2", lengths) == 7 / 10
  assert refill.busy_share("slots_2", [1] * 63 + [4]) == 67 / (2 * 35)


def test_outputs_of_the_buckets_benchmark_end_where_it_says():
  plain, params, _ = golden_t5x.model("t5_1_1_tiny")
  model = buckets.ending_early(plain, plain)
  inputs = np.full((buckets.ROWS, 3), 5, np.int32)
  outputs = np.zeros((buckets.ROWS, buckets.LENGTH), np.int32)
  batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": outputs}

  @jax.jit
  def draw(params, key):
    return model.draw(params, plain.encode(params, batch), batch, key)

  tokens, weights, log_probs = draw(params, jax.random.key(0))
  assert tokens.shape == (buckets.ROWS, buckets.LENGTH) == log_probs.shape
  first, last = tokens[:, : buckets.END - 1], tokens[:, buckets.END - 1]
  assert first.min() > 1 and np.all(last == 1)
  assert not np.any(tokens[:, buckets.END :])
  np.testing.assert_array_equal(weights.sum(axis=1), buckets.END)
