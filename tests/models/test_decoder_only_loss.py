"""Decoder-only models: what has weight in the loss, and wrong inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_decoder_only as toy
import toy_models

from gkd_jax import models, optimizers, training
from gkd_jax.decoding import sampling

# --- What has weight in the loss ------------------------------------------------------


def train_loss(model, params, teacher, batch, source="data"):
  rows = len(batch["decoder_target_tokens"])
  inputs = toy_models.inputs(source, rows, jax.random.key(5))
  loss, metrics = jax.jit(lambda p, t, b: model.train_loss(p, t, b, inputs))(
    params, teacher, batch
  )
  return loss, metrics["loss"][1]


@pytest.mark.parametrize("change", ["ones", "missing"])
def test_prompts_have_no_weight_whatever_the_features_say(change):
  model, student, teacher = toy.gkd(divergence="jsd", beta=0.5)
  batch = toy.batch()
  other = dict(batch)
  if change == "ones":
    other["decoder_loss_weights"] = (batch["decoder_target_tokens"] > 0).astype(
      np.int32
    )
  else:
    del other["decoder_loss_weights"]
  for a_model in (model, model.student):
    expected = train_loss(a_model, student, teacher, batch)
    got = train_loss(a_model, student, teacher, other)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


def test_weights_by_hand_in_packed_rows():
  # The outputs of the first and the second fill their masks to the last
  # position, and the next prompt's mask begins right there.
  pairs = [([5, 1], [1]), ([7, 8, 1], [1]), ([9], [4, 1])]
  batch = toy.packed([pairs], 14)
  np.testing.assert_array_equal(
    batch["decoder_causal_attention"][0],
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
  )
  batch["decoder_loss_weights"] = batch["decoder_target_tokens"] > 0
  weights = toy.model().loss_weights(
    {k: jnp.asarray(v) for k, v in batch.items()}
  )
  np.testing.assert_array_equal(
    weights[0], [0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0]
  )


def test_a_prompts_targets_are_not_trained_on():
  """What the prompt's tokens are as targets changes nothing (as inputs it does)."""
  model, student, teacher = toy.gkd()
  batch, other = toy.batch(), toy.batch()
  targets = other["decoder_target_tokens"]
  at = (batch["decoder_loss_weights"] == 0) & (targets > 0)
  targets[at] = 2 + (targets[at] + 3) % 14
  assert at.sum() > 15
  for a_model in (model, model.student):
    expected = train_loss(a_model, student, teacher, batch)[0]
    assert train_loss(a_model, student, teacher, other)[0] == expected
  moved = batch | {"decoder_input_tokens": sampling.shift_right(targets)}
  assert train_loss(a_model, student, teacher, moved)[0] != expected


def test_sampled_outputs_stand_after_their_prompts_and_end_the_weights():
  model, student, _ = toy.gkd()
  pairs = [*toy.pairs(8), ([], [])]
  batch = toy.rows(pairs)
  batch["decoder_causal_attention"][8] = 0  # padding, as in a last batch
  batch = {k: jnp.asarray(v) for k, v in batch.items()}
  inputs = toy_models.inputs("student", 9, jax.random.key(2))
  new, metrics = jax.jit(
    lambda params, batch: model.with_samples(params, (), batch, inputs)
  )(student, batch)
  sample_key = jax.random.split(inputs.key, 3)[1]
  result = toy.sampler(model.student)(student, batch, sample_key)
  tokens = np.asarray(result.tokens)
  outputs = [row[row > 0].tolist() for row in tokens[:8]] + [[]]
  assert len({len(o) for o in outputs}) > 3
  expected = toy.rows(
    [(prompt, o) for (prompt, _), o in zip(pairs, outputs, strict=True)]
  )
  for name in ("target_tokens", "input_tokens", "loss_weights"):
    name = f"decoder_{name}"
    np.testing.assert_array_equal(new[name], expected[name], err_msg=name)
  assert metrics["on_policy_share"] == (8, 8)
  lengths = sum(map(len, outputs))
  assert metrics["sampled_length"] == (lengths, 8)
  assert metrics["sampled_eos"] == (sum(o[-1:] == [1] for o in outputs), 8)


def test_mixed_rows_use_their_own_source():
  model, student, _ = toy.gkd(student_data_fraction=0.5)
  batch = toy.batch()
  batch["decoder_loss_weights"] = (batch["decoder_target_tokens"] > 0) * 1
  inputs = toy_models.inputs("mixed", key=jax.random.key(2))
  replace = jax.jit(
    lambda source: model.with_samples(
      student, (), batch, inputs._replace(source=source)
    )[0],
    static_argnums=0,
  )
  new, alone = replace("mixed"), replace("student")
  # The coins, one by one.
  coin_key = jax.random.split(inputs.key, 3)[2]
  coins = [
    jax.random.uniform(jax.random.fold_in(coin_key, i)) for i in range(8)
  ]
  chosen = np.array(coins) < 0.5
  assert 0 < chosen.sum() < 8
  clean = toy.batch()
  for name in ("target_tokens", "input_tokens", "loss_weights"):
    name = f"decoder_{name}"
    expected = np.where(chosen[:, None], alone[name], clean[name])
    np.testing.assert_array_equal(new[name], expected, err_msg=name)


def test_eos_is_trained_on_and_nothing_after_it():
  model, student, teacher = toy.gkd(length_normalization="token")
  weight = train_loss(model, student, teacher, toy.batch())[1]
  assert weight == sum(len(output) for _, output in toy.pairs())


def test_rows_of_an_output_alone_are_continued_from_nothing():
  """Lengths that name no inputs: greedy outputs are those of the float64 network."""
  model = toy.model()
  params, batch = toy.params(model, 3), toy.batch(2)
  del batch["decoder_causal_attention"]
  tokens = np.asarray(jax.jit(model.predict_batch)(params, batch))
  output = []
  while len(output) < toy.WIDTH and 1 not in output:
    row = toy.rows([([], [*output, 9])], toy.WIDTH + 1)
    logits = toy.oracle(model.config, params, row, prefix_lm=False)
    output.append(int(np.argmax(logits[0, len(output)])))
  assert 0 not in output
  padded = output + [0] * (toy.WIDTH - len(output))
  np.testing.assert_array_equal(tokens, [padded] * 2)


def test_a_run_needs_no_length_of_inputs():
  model = toy.gkd()[0]
  optimizer = optimizers.adafactor(1e-3)
  partitioner = training.PartitionerConfig()
  lengths = {"targets": toy.WIDTH}
  dataset = training.DatasetConfig("toy", lengths, 8)
  run = training.build(model, optimizer, dataset, partitioner)
  assert run.input_shapes == {"decoder_input_tokens": (1, toy.WIDTH)}
  for a_model, lengths in (
    (toy_models.gkd()[0], {"targets": 7}),
    (model, {"inputs": 7}),
  ):
    dataset = training.DatasetConfig("toy", lengths, 8)
    with pytest.raises(ValueError, match="set TASK_FEATURE_LENGTHS"):
      training.build(a_model, optimizer, dataset, partitioner)


# --- Wrong inputs ---------------------------------------------------------------------


def test_packed_rows_cannot_be_continued():
  model, student, teacher = toy.gkd()
  batch = toy.packed([toy.pairs(2)] * 2, 24)
  with pytest.raises(ValueError, match=r"got packed ones; set PACK = False"):
    train_loss(model, student, teacher, batch, "student")
  with pytest.raises(
    ValueError, match=r"decoder_segment_ids; set PACK = False"
  ):
    model.predict_batch(student, batch)


def test_teacher_and_student_are_of_one_kind():
  with pytest.raises(
    ValueError, match=r"EncDec.* \(teacher\) and Decoder.*; set"
  ):
    models.GKDModel(toy.model(), toy_models.model(8))


def test_wrong_settings_name_what_to_change():
  with pytest.raises(ValueError, match=r"at least 1, got 0; set .*num_layers"):
    toy.model(config={"num_layers": 0})
  with pytest.raises(
    ValueError, match=r"got 0; set models.DecoderOnlyModel.max"
  ):
    toy.model(max_output_length=0)
  with pytest.raises(ValueError, match=r"without row_lengths; set DECODE_F"):
    toy.model(decode_fn=lambda *args, start_tokens=None, **settings: None)
  model = toy.model()
  tokens = jnp.ones((1, 4), jnp.int32)
  lengths = jnp.ones(1, jnp.int32)
  for wrong in ({}, {"prefill_lengths": lengths, "decode": True}):
    with pytest.raises(
      ValueError, match="expected prefill with prefill_lengths"
    ):
      model.module.apply(
        {"params": toy.params(model, 0)},
        tokens,
        tokens,
        enable_dropout=False,
        prefill=True,
        **wrong,
      )
