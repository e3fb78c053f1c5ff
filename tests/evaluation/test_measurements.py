"""Divergence by position and calibration over a split, against float64 numpy."""

import jax
import loss_batches
import numpy as np
import pytest
import toy_decoder_only
import toy_models

from gkd_jax import checkpoints, partitioning
from gkd_jax.decoding import sampling
from gkd_jax.evaluation import evaluate, measurements

SETTINGS = {
  "sampling_temperature": 0.8,
  "sampling_top_k": 9,
  "student_temperature": 0.7,
  "teacher_temperature": 1.3,
}


class Split:
  """Rows in batches, as an evaluator gives them."""

  def __init__(self, features, batch_size, mesh):
    self._arguments = features, batch_size, mesh

  def batches(self):
    return evaluate.batches(*self._arguments)


def measure(gkd, features, batch_size):
  """Of a model, and both parameters, on two devices."""
  model, params, teacher_params = gkd
  mesh = partitioning.make_mesh(devices=jax.devices()[:2])
  params, teacher_params = jax.device_put(
    (params, teacher_params), partitioning.replicated(mesh)
  )
  split = Split(features, batch_size, mesh)
  return measurements.measure(
    split, mesh, model, params, teacher_params, seed=3
  )


def expected_of(gkd, features):
  """Lists by position of forward KL, reverse KL and acceptance; lengths."""
  model, params, teacher_params = gkd
  logits = [
    jax.jit(m.logits)(w, features)
    for m, w in ((model.teacher, teacher_params), (model.student, params))
  ]
  log_p, log_q = (
    loss_batches.log_softmax64(x / t)
    for x, t in zip(np.asarray(logits, np.float64), (1.3, 0.7), strict=True)
  )
  p, q = np.exp(log_p), np.exp(log_q)
  forward = (p * (log_p - log_q)).sum(-1)
  reverse = (q * (log_q - log_p)).sum(-1)
  accepted = np.minimum(p, q).sum(-1)
  by_position = {}
  weights = np.asarray(features["decoder_loss_weights"])
  for row in range(len(weights)):
    for place, column in enumerate(np.flatnonzero(weights[row])):
      by_position.setdefault(place, []).append(
        [x[row, column] for x in (forward, reverse, accepted)]
      )
  return [np.array(by_position[i]) for i in sorted(by_position)]


def assert_table(table, scores, source, expected):
  assert table["count"] == [len(x) for x in expected]
  for i, name in enumerate(("forward_kl", "reverse_kl")):
    means = [x[:, i].mean() for x in expected]
    np.testing.assert_allclose(table[name], means, rtol=2e-4)
  tokens = np.concatenate(expected)
  for i, name in enumerate(("forward_kl", "reverse_kl", "acceptance")):
    mean = tokens[:, i].mean()
    assert scores[f"{source}/{name}"] == pytest.approx(mean, rel=2e-4)
  length = len(tokens) / len(expected[0])
  assert scores[f"{source}/length"] == pytest.approx(length)


@pytest.fixture(scope="module")
def measured():
  gkd = toy_models.gkd(**SETTINGS)
  features = toy_models.batch(rows=10)
  return gkd, features, measure(gkd, features, 10)


def test_on_data(measured):
  gkd, features, (scores, tables) = measured
  assert_table(tables["data"], scores, "data", expected_of(gkd, features))


def test_on_the_students_own_samples(measured):
  gkd, features, (scores, tables) = measured
  model, params, _ = gkd
  tokens = np.asarray(
    jax.jit(model.sample_batch)(params, features, jax.random.key(3))
  )
  weights = np.asarray(sampling.sequence_weights(tokens))
  assert len(set(weights.sum(1))) > 1  # some samples end early
  own = features | {
    "decoder_target_tokens": tokens,
    "decoder_input_tokens": np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
    "decoder_loss_weights": weights,
  }
  assert_table(
    tables["student_samples"],
    scores,
    "student_samples",
    expected_of(gkd, own),
  )


def test_examples_say_what_each_adds_to_the_means(measured):
  gkd, features, (scores, tables) = measured
  model, params, _ = gkd
  tokens = np.asarray(
    jax.jit(model.sample_batch)(params, features, jax.random.key(3))
  )
  lengths = sampling.sequence_weights(tokens).sum(1)
  ended = (tokens == 1).any(1)
  assert 0 < ended.sum() < len(ended)
  assert [*tables["examples"]] == [*range(len(tokens))]
  examples = [*tables["examples"].values()]
  assert [x["student_samples/ended"] for x in examples] == [
    [end, 1] for end in ended
  ]
  assert [x["student_samples/length"][0] for x in examples] == lengths.tolist()
  assert [x["student_samples/forward_kl"][1] for x in examples] == (
    lengths.tolist()
  )
  for name in examples[0]:
    total, weight = np.sum([x[name] for x in examples], axis=0)
    assert scores[name] == pytest.approx(total / weight, rel=1e-5), name


def test_prompts_alone_are_measured_on_samples(measured):
  gkd, features, (scores, _) = measured
  prompts = features | {
    name: np.zeros_like(features[name])
    for name in (
      "decoder_target_tokens",
      "decoder_input_tokens",
      "decoder_loss_weights",
    )
  }
  got, tables = measure(gkd, prompts, 10)
  assert {k: pytest.approx(x) for k, x in got.items()} == {
    k: x for k, x in scores.items() if k.startswith("student_samples/")
  }
  assert tables.keys() == {"student_samples", "examples"}


def test_calibration_is_at_temperature_1_and_by_token(measured):
  (model, params, _), features, (scores, tables) = measured
  probs = np.exp(
    loss_batches.log_softmax64(jax.jit(model.student.logits)(params, features))
  )
  counted = features["decoder_loss_weights"] > 0
  confidence = probs.max(-1)[counted]
  right = (probs.argmax(-1) == features["decoder_target_tokens"])[counted]
  gap = 0.0
  for m in range(15):
    here = (confidence > m / 15) & (confidence <= (m + 1) / 15)
    gap += abs((right[here] - confidence[here]).sum())
    assert tables["calibration"]["count"][m] == here.sum()
  assert scores["ece"] == pytest.approx(100 * gap / counted.sum(), rel=1e-4)
  assert 5 < scores["ece"] < 95


def test_batches_do_not_matter_and_fillers_do_not_count(measured):
  gkd, features, (scores, tables) = measured
  # Of 10 rows in batches of 4, the last holds two rows of padding.
  other, other_tables = measure(gkd, features, 4)
  assert other == pytest.approx(scores, rel=1e-5)
  for source in ("data", "student_samples"):
    assert other_tables[source]["count"] == tables[source]["count"]


def test_positions_of_a_decoder_only_model_begin_after_the_prompt():
  gkd = toy_decoder_only.gkd(**SETTINGS)
  features = toy_decoder_only.batch()
  scores, tables = measure(gkd, features, 8)
  assert_table(tables["data"], scores, "data", expected_of(gkd, features))
  counts = tables["student_samples"]["count"]
  # Every row has an output; none has more room than a row without its prompt.
  assert counts[0] == 8 and len(counts) <= toy_decoder_only.WIDTH - 1
  assert scores["student_samples/length"] == pytest.approx(sum(counts) / 8)


def test_without_a_teacher_calibration_alone():
  model = toy_models.model(8)
  gkd = model, toy_models.params(model, 1), None
  scores, tables = measure(gkd, toy_models.batch(), 8)
  assert set(scores) == {"ece"} and set(tables) == {"calibration"}
  with pytest.raises(ValueError, match="set EVAL_SPLIT"):
    measure(gkd, {}, 8)


def test_a_teacher_of_other_shapes(tmp_path):

  model, params, teacher_params = toy_models.gkd()
  mesh = partitioning.make_mesh()
  with pytest.raises(ValueError, match="set TEACHER_CHECKPOINT_PATH"):
    measurements.load_teacher(model, None, mesh)
  for name, tree in (("wrong", params), ("right", teacher_params)):
    checkpoints.save_safetensors(tmp_path / name, tree, {"vocab_size": 16})
  with pytest.raises(ValueError, match="TEACHER_CHECKPOINT_PATH"):
    measurements.load_teacher(model, str(tmp_path / "wrong"), mesh)
  loaded = measurements.load_teacher(model, str(tmp_path / "right"), mesh)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool((a == b).all()), loaded, teacher_params)
  )
