"""Sampled outputs end where the vocabulary says, whatever the ids: cases by hand."""

import functools

import jax
import jax.numpy as jnp
import nightly
import numpy as np
import pytest
import token_layouts
import toy_decoder_only
import toy_models

from gkd_jax import decoding, models, types
from gkd_jax.decoding import sampling
from gkd_jax.models import outputs as of_models

HALF = np.log(0.5)
A, B, C = range(token_layouts.FIRST_LETTER, token_layouts.FIRST_LETTER + 3)


def outputs(layout):
  """What is said for three inputs, and by hand what of it is the output."""
  ids = token_layouts.LAYOUTS[layout]
  first, last = ids["eos"][0], ids["eos"][-1]
  # A 0 that is a token stands inside of an output.
  zero = C if 0 in (ids["pad"], *ids["eos"]) else 0
  scripts = {
    "a": [A, B, first, C, C],
    "b": [A, zero, B, last, C],
    "c": [A, A, A, A, A],
  }
  return scripts, [[A, B, first], [A, zero, B, last], [A, A, A, A, A]]


def batch(layout):
  """Rows with the inputs a, b and c, and one that fills the batch up."""
  eos = token_layouts.LAYOUTS[layout]["eos"][0]
  rows = np.array([[A, eos, 0], [B, eos, 0], [C, eos, 0], [0, 0, 0]], np.int32)
  mask = np.array([[1, 1, 0]] * 3 + [[0, 0, 0]], np.int32)
  features = {
    "encoder_input_tokens": rows,
    "decoder_input_tokens": np.zeros((4, 5), np.int32),
    "decoder_target_tokens": np.zeros((4, 5), np.int32),
    "decoder_loss_weights": np.zeros((4, 5), np.int32),
  }
  if not token_layouts.EXPECTED[layout][1]:
    features[types.INPUT_MASK] = mask
  return features


def padded(rows):
  return [row + [0] * (5 - len(row)) for row in rows]


@pytest.mark.parametrize("layout", token_layouts.LAYOUTS)
def test_samples_of_training_end_at_the_vocabulary_s_eos(layout):
  scripts, expected = outputs(layout)
  tokens = token_layouts.special_tokens(layout, start=3)
  student, teacher = (token_layouts.Scripted(scripts, tokens) for _ in range(2))
  model = models.GKDModel(student, teacher, sampling_temperature=0.0)
  given = batch(layout)
  inputs = toy_models.inputs("student", 4)
  encoded = student.encode({}, given)
  got, metrics = model.with_samples({}, encoded, given, inputs)
  weights = [[1] * len(row) + [0] * (5 - len(row)) for row in expected]
  np.testing.assert_array_equal(
    got["decoder_loss_weights"], [*weights, [0] * 5]
  )
  np.testing.assert_array_equal(
    got["decoder_target_tokens"][:3], padded(expected)
  )
  np.testing.assert_array_equal(
    got["decoder_input_tokens"][:3],
    [[3, *row[:4]] for row in padded(expected)],
  )
  of = {name: float(a) / float(b) for name, (a, b) in metrics.items()}
  assert of == {
    "sampled_length": 4.0,
    "sampled_eos": pytest.approx(2 / 3),
    "on_policy_share": 1.0,
  }


@pytest.mark.parametrize("decode_fn", [None, decoding.beam_search])
@pytest.mark.parametrize("layout", token_layouts.LAYOUTS)
def test_predictions_say_how_long_they_are_and_whether_they_ended(
  layout, decode_fn
):
  scripts, expected = outputs(layout)
  model = token_layouts.Scripted(
    scripts,
    token_layouts.special_tokens(layout),
    decode_fn=decode_fn and functools.partial(decode_fn, alpha=0.0),
  )
  # Of two beams, the better one is a script that ends.
  tokens, aux = model.predict_batch_with_aux(
    {}, batch(layout), num_decodes=2 if decode_fn else 1
  )
  assert aux["lengths"][:2].tolist() == [3, 4]
  assert aux["ended"][:2].tolist() == [True, True]
  np.testing.assert_array_equal(tokens[:2], padded(expected)[:2])
  np.testing.assert_allclose(aux["scores"][:2], [3 * HALF, 4 * HALF], rtol=1e-6)
  if not decode_fn:
    assert aux["lengths"][2] == 5 and not aux["ended"][2]
    np.testing.assert_allclose(aux["scores"][2], 5 * HALF, rtol=1e-6)


def test_metrics_of_judged_outputs_count_any_eos():
  targets = jnp.array([[6, 4, 0], [6, 7, 8], [1, 0, 0], [0, 0, 0]])
  weights = jnp.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
  got = of_models.output_metrics(targets, weights, (1, 4))
  assert {k: float(a / b) for k, (a, b) in got.items()} == {
    "sampled_length": 2.0,
    "sampled_eos": pytest.approx(2 / 3),
    "on_policy_share": 1.0,
  }
  # EOS = PAD = 0: what follows an output is no EOS.
  got = of_models.output_metrics(targets, weights, 0)
  assert float(got["sampled_eos"][0]) == 0


# Ids of T5's layout to those of others, and the special tokens of these: permutations
# of the 16 ids.
PERMUTED = {
  "sentencepiece": (
    {1: 2, 2: 1},
    token_layouts.special_tokens("sentencepiece"),
  ),
  "bos_first": (
    {1: 2, 2: 3, 3: 1},
    token_layouts.special_tokens("bos_first"),
  ),
  "start_5": ({0: 5, 5: 0}, types.SpecialTokens((1,), None, 5, False)),
}


def permutation(layout):
  ids = np.arange(toy_models.VOCAB)
  for old, new in PERMUTED[layout][0].items():
    ids[old] = new
  assert sorted(ids) == list(range(toy_models.VOCAB))
  return ids


def permuted_params(params, ids):
  """The parameters of a network that reads and writes other ids."""
  old = np.argsort(ids)
  decoder = params["decoder"] | {
    "logits_dense": {
      "kernel": params["decoder"]["logits_dense"]["kernel"][:, old]
    }
  }
  embedder = {"embedding": params["token_embedder"]["embedding"][old]}
  return params | {"decoder": decoder, "token_embedder": embedder}


def permuted_batch(given, ids):
  inputs, targets = (
    given["encoder_input_tokens"],
    given["decoder_target_tokens"],
  )
  after = lambda x: np.where(x > 0, ids[x], 0)
  new = {
    "encoder_input_tokens": after(inputs),
    types.INPUT_MASK: (inputs > 0).astype(np.int32),
    "decoder_target_tokens": after(targets),
    "decoder_input_tokens": after(given["decoder_input_tokens"]),
  }
  new["decoder_input_tokens"][:, 0] = ids[0]  # the start
  return given | new


def pair(tokens):
  """A pair that never prefers what one of the layouts does not sample."""
  model, student, teacher = toy_models.gkd(sampling_temperature=0.0)
  for params in (student, teacher):
    kernel = params["decoder"]["logits_dense"]["kernel"]
    params["decoder"]["logits_dense"]["kernel"] = kernel.at[:, [0, 3]].set(0)
  return model.with_special_tokens(tokens), student, teacher


@functools.cache
def step(layout):
  """Loss, gradient's norm by array, and the samples of an on-policy step."""
  tokens = PERMUTED[layout][1] if layout else types.T5_TOKENS
  model, student, teacher = pair(tokens)
  given = toy_models.batch()
  if layout:
    ids = permutation(layout)
    student, teacher = (permuted_params(p, ids) for p in (student, teacher))
    given = permuted_batch(given, ids)

  def loss(student):
    inputs = toy_models.inputs("student")
    encoded = model.student.encode(student, given)
    new, sampled = model.with_samples(student, encoded, given, inputs)
    teacher_side = teacher, model.teacher.encode(teacher, given)
    total, metrics = model.outputs_loss(
      (student, encoded), teacher_side, new, inputs.step
    )
    score = model.student.score_batch(student, new)
    of_data = model.student.score_batch(student, given)
    keep = "decoder_target_tokens", "decoder_loss_weights"
    return total, (metrics | sampled, {k: new[k] for k in keep}, score, of_data)

  (total, rest), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    student
  )
  return total, rest, jax.tree.map(jnp.linalg.norm, gradient)


@pytest.mark.parametrize("layout", nightly.of(PERMUTED, ["sentencepiece"]))
def test_an_on_policy_step_is_the_same_up_to_the_ids(layout):
  ids = permutation(layout)
  total, (metrics, new, *scores), gradient = step(None)
  other, (metrics2, new2, *scores2), gradient2 = step(layout)
  weights = np.asarray(new["decoder_loss_weights"])
  lengths = weights.sum(axis=1)
  assert lengths.min() < 7 and 0 < metrics["sampled_eos"][0] < 8
  np.testing.assert_array_equal(new2["decoder_loss_weights"], weights)
  targets = np.asarray(new["decoder_target_tokens"])
  np.testing.assert_array_equal(
    new2["decoder_target_tokens"], np.where(weights > 0, ids[targets], 0)
  )
  np.testing.assert_allclose(other, total, rtol=1e-5)
  np.testing.assert_allclose(scores2, scores, rtol=1e-5)
  for name, pair in metrics.items():
    np.testing.assert_allclose(metrics2[name], pair, rtol=1e-4, err_msg=name)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    gradient2,
    gradient,
  )


def test_the_weights_of_rows_with_eos_0_stop_at_the_room_of_each():
  tokens = jnp.array([[6, 7, 0, 0], [6, 0, 0, 0], [6, 7, 8, 9]])
  room = jnp.array([2, 4, 3])
  np.testing.assert_array_equal(
    sampling.sequence_weights(tokens, 0, row_lengths=room),
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]],
  )


def test_decoder_only_rows_end_at_other_ids_and_keep_a_token_0():
  """Rows of prompts with a 0 inside, which the network must read.

  A model whose ids 0 and 7 are swapped reads and says the same, up to these.
  """
  plain = toy_decoder_only.model()
  params = toy_decoder_only.params(plain, 3)
  pairs = [([7, 5, 1], [3, 1]), ([9, 7, 7, 1], [7, 4, 1]), ([1], [1])]
  rows = toy_decoder_only.rows(pairs)
  swap = np.arange(16)
  swap[[0, 7]] = 7, 0
  decoder = params["decoder"]
  swapped = {
    "decoder": decoder
    | {
      "token_embedder": {
        "embedding": decoder["token_embedder"]["embedding"][swap]
      },
      "logits_dense": {"kernel": decoder["logits_dense"]["kernel"][:, swap]},
    }
  }
  tokens = types.SpecialTokens((1,), None, 7, False)
  other = plain.with_special_tokens(tokens)
  others = toy_decoder_only.rows(
    [(swap[p].tolist(), swap[o].tolist()) for p, o in pairs]
  )
  others["decoder_input_tokens"][:, 0] = 7
  used = rows["decoder_target_tokens"] > 0
  expected = plain.logits(params, rows)
  got = other.logits(swapped, others)[:, :, swap]
  np.testing.assert_allclose(got[used], expected[used], atol=1e-5)
  sample = lambda model, params, rows: jax.jit(
    lambda p, b: model.sample(p, (), b, None, temperature=0.0).tokens
  )(params, rows)
  outputs = np.asarray(sample(plain, params, rows))
  others = np.asarray(sample(other, swapped, others))
  lengths = sampling.sequence_weights(
    outputs, 1, row_lengths=12 - np.array([3, 4, 1])
  )
  np.testing.assert_array_equal(
    np.where(lengths > 0, others, 0), np.where(lengths > 0, swap[outputs], 0)
  )


def test_teacher_and_student_have_one_set_of_special_tokens():
  other = toy_models.model(12, special_tokens=types.SpecialTokens((2,)))
  with pytest.raises(ValueError, match="the same special tokens, got"):
    models.GKDModel(toy_models.model(8), other)


def test_a_model_reads_the_special_tokens_of_its_vocabulary():
  vocabulary = token_layouts.Letters("two_eos")
  model = toy_models.model(8, output_vocabulary=vocabulary)
  assert model.special_tokens == types.SpecialTokens((1, 4), 0)
  assert model.with_special_tokens(model.special_tokens) is model


@pytest.mark.parametrize("room", [2, 4])
def test_minillm_samples_as_long_as_the_student_may(room):
  student, teacher = (
    toy_decoder_only.model(width, max_output_length=longest)
    for width, longest in ((8, room), (12, 3))
  )
  # EOS is never said: outputs are as long as they may be.
  tokens = types.SpecialTokens((), 0)
  model = models.MiniLLMModel(student, teacher).with_special_tokens(tokens)
  params = [toy_decoder_only.params(m, 3) for m in (student, teacher)]
  rows = toy_decoder_only.batch(4)
  inputs = toy_models.inputs("student", 4)
  new, metrics = jax.jit(
    lambda a, b: model.with_samples(a, (), rows, inputs, b)
  )(*params)
  np.testing.assert_array_equal(
    np.sum(new["decoder_loss_weights"], axis=1), [room] * 4
  )
  assert float(metrics["sampled_eos"][0]) == 0
