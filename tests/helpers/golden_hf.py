"""Tiny models of Hugging Face's families, and what transformers computes of them."""

import copy
import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gkd_jax import checkpoints, decoding, models, network
from gkd_jax.checkpoints import huggingface
from gkd_jax.network import blocks, layers

FOLDERS = pathlib.Path(__file__).parents[1] / "golden" / "hf"


def numbers(name):
  """The arrays of `golden.npz`."""
  with np.load(FOLDERS / name / "golden.npz") as file:
    return dict(file)


def config_json(name, file="config.json"):
  return json.loads((FOLDERS / name / file).read_text())


@functools.cache
def causal_results(name):
  """What the decoder-only model in a folder computes, in one program."""
  config, params = checkpoints.load_model(FOLDERS / name)
  model = models.DecoderOnlyModel(network.CausalTransformer(config))
  return _results(name, model, params, _causal)


@functools.cache
def encoder_decoder_results(name, module):
  """What the encoder-decoder in a folder computes, in one program."""
  config, params = checkpoints.load_model(FOLDERS / name)
  model = models.EncoderDecoderModel(module(config))
  return _results(name, model, params, _encoder_decoder)


def _results(name, model, params, compute):
  expected = numbers(name)
  got = jax.jit(functools.partial(compute, model))(params, expected)
  table = huggingface.name_table(model.config)
  gradient = traverse_util.flatten_dict(got.pop("gradient"), sep="/")
  got["gradient"] = {
    table[ours][0]: x.T if table[ours][1] else x for ours, x in gradient.items()
  }
  return types.SimpleNamespace(
    model=model, params=params, expected=expected, **jax.tree.map(np.array, got)
  )


def _causal(model, params, given):
  """Rows padded on the right, then on the left, go through the network together."""
  sides = lambda a, b: jnp.concatenate([given[a], given[b]])
  tokens = sides("input_ids", "left_input_ids")
  places = jnp.broadcast_to(
    jnp.arange(tokens.shape[1]), given["input_ids"].shape
  )

  def loss_of(params):
    logits, kept = model.module.apply(
      {"params": params},
      tokens,
      tokens,
      sides("attention_mask", "left_attention_mask"),
      jnp.concatenate([places, given["left_position_ids"]]),
      enable_dropout=False,
      capture_intermediates=lambda module, _: isinstance(
        module, blocks.Layer | layers.LayerNorm
      ),
      mutable=["intermediates"],
    )
    right, left = jnp.split(logits, 2)
    loss, log_probs = _loss(right, given)
    decoder = kept["intermediates"]["decoder"]
    results = {
      "logits": right,
      "left_logits": left,
      "log_probs": log_probs,
      "hidden": jnp.split(decoder["decoder_norm"]["__call__"][0], 2)[0],
      "layers": [
        decoder[f"layers_{i}"]["__call__"][0]
        for i in range(model.config.num_layers)
      ],
    }
    return loss, results

  gradient, results = jax.grad(loss_of, has_aux=True)(params)
  decoded = greedy(model, params, given)
  return results | {
    "gradient": gradient,
    "greedy": decoded.tokens,
    "greedy_log_probs": decoded.log_probs,
  }


def _loss(logits, given):
  """The mean over targets, and their log-probs."""
  picked = jnp.take_along_axis(
    jax.nn.log_softmax(logits), given["targets"][..., None], axis=2
  )
  log_probs = picked[..., 0] * given["target_mask"]
  return -jnp.sum(log_probs) / jnp.sum(given["target_mask"]), log_probs


def greedy(model, params, given):
  """Decodes with the cache from prompts whose first word is read first."""
  length = given["greedy_no_eos"].shape[1]
  return _decode(model, params, (), _prompts(given, length), length)


def _prompts(given, length):
  room = ((0, 0), (0, length))
  return {
    "decoder_input_tokens": jnp.pad(given["input_ids"], room),
    "decoder_causal_attention": jnp.pad(given["attention_mask"], room),
  }


def _decode(model, params, encoded, batch, length, **options):
  step, cache, rows = model.start_decoding(params, encoded, batch)
  rows.pop("row_axes")
  return decoding.sample(
    step,
    cache,
    None,
    batch_size=len(batch["decoder_input_tokens"]),
    max_decode_length=length,
    temperature=0.0,
    eos_id=-1,
    **rows | options,
  )


def _encoder_decoder(model, params, given):
  batch = {
    "encoder_input_tokens": given["input_ids"],
    "decoder_input_tokens": given["decoder_input_ids"],
    "decoder_target_tokens": jnp.maximum(given["labels"], 0),
  }

  def loss_of(params):
    encoded = model.encode(params, batch)
    hidden = model.decoder_hidden(params, encoded, batch)
    logits, kept = model.module.apply(
      {"params": params},
      *batch.values(),
      enable_dropout=False,
      capture_intermediates=lambda module, _: isinstance(module, blocks.Layer),
      mutable=["intermediates"],
    )
    loss, log_probs = _loss(logits, given)
    return loss, {
      "encoded": encoded,
      "hidden": hidden,
      "logits": logits,
      "log_probs": log_probs,
      "layers": {
        side: [
          layers[f"layers_{i}"]["__call__"][0]
          for i in range(model.config.depths[side])
        ]
        for side, layers in kept["intermediates"].items()
      },
    }

  gradient, results = jax.grad(loss_of, has_aux=True)(params)
  length = given["greedy_no_eos"].shape[1]
  start = jnp.full(len(given["input_ids"]), given["decoder_start_token_id"])
  decoded = {
    **batch,
    "decoder_input_tokens": jnp.zeros((len(start), length), jnp.int32),
  }
  greedy = _decode(
    model,
    params,
    results["encoded"],
    decoded,
    length,
    start_tokens=start.astype(jnp.int32),
  )
  return results | {
    "gradient": gradient,
    "greedy": greedy.tokens,
    "greedy_log_probs": greedy.log_probs,
  }


def check_beams(got):
  """Compares four beams that do not end, and the sums of their log-probs."""
  given, model = got.expected, got.model
  expected = given["beam4_no_eos"]
  batch, length = _prompts(given, expected.shape[2]), expected.shape[2]
  start = int(given["decoder_start_token_id"])
  if start >= 0:
    batch = {
      "encoder_input_tokens": given["input_ids"],
      "decoder_input_tokens": np.zeros((len(expected), length), np.int32),
    }

  @jax.jit
  def search(params):
    encoded = model.encode(params, batch)
    step, cache, rows = model.start_decoding(
      params, encoded, batch, num_decodes=4
    )
    if start >= 0:
      rows["start_tokens"] = jnp.full(4 * len(expected), start, jnp.int32)
    return decoding.beam_search(
      step,
      cache,
      batch_size=len(expected),
      max_decode_length=length,
      num_decodes=4,
      alpha=0.0,
      eos_id=-1,
      **rows,
    )

  found = search(got.params)
  # Ours has the best one last.
  np.testing.assert_array_equal(found.tokens[:, ::-1], expected)
  np.testing.assert_allclose(
    found.scores[:, ::-1], given["beam4_no_eos_scores"], rtol=0, atol=1e-4
  )


def check_layers(got, key, expected):
  """Compares what a stack's layers give, but for the last, which a norm follows.

  Args:
    got: `[B, T, D]` of each layer.
    key: of the golden numbers: row 0, the embedding first, the norm's last.
    expected: the golden numbers.
  """
  of_layers = expected[key][1:-1]
  assert len(of_layers) == len(got) - 1
  np.testing.assert_allclose(
    np.stack(got)[:-1, 0],
    of_layers,
    rtol=0,
    atol=1e-5 * np.abs(of_layers).max(initial=0),
    err_msg=key,
  )


def check_layers_of_both_sides(got):
  """Compares what the layers of an encoder-decoder give."""
  for side, key in (("decoder", "layers"), ("encoder", "encoder_layers")):
    check_layers(got.layers[side], f"{key}_row0", got.expected)


def check_ends(name, got):
  """Compares greedy outputs that end as the folder says.

  Returns:
    How many of them end.
  """
  expected = got.expected
  tokens = checkpoints.load_special_tokens(FOLDERS / name)
  model = copy.copy(got.model.with_special_tokens(tokens))
  length = model.max_output_length = expected["greedy"].shape[1]
  batch = _prompts(expected, length)
  if expected["decoder_start_token_id"] >= 0:
    batch = {
      "encoder_input_tokens": expected["input_ids"],
      "decoder_input_tokens": np.zeros_like(expected["greedy"]),
    }
  tokens, aux = jax.jit(model.predict_batch_with_aux)(got.params, batch)
  ends = np.isin(expected["greedy"], expected["eos_token_ids"])
  lengths = np.where(ends.any(1), ends.argmax(1) + 1, length)
  np.testing.assert_array_equal(aux["lengths"], lengths)
  np.testing.assert_array_equal(aux["ended"], ends.any(1))
  kept = np.arange(length) < lengths[:, None]
  np.testing.assert_array_equal(
    np.where(kept, tokens[:, :length], -1),
    np.where(kept, expected["greedy"], -1),
  )
  return ends.any(1).sum()


def check_padding(got, tolerance=2e-5):
  """Compares the encoder's rows padded on the left, or not, with those on the right.

  Masks say what is padding: rows may begin with it.
  """
  given = got.expected
  logits = jax.jit(got.model.logits)
  lengths = given["attention_mask"].sum(axis=1)
  left = [
    np.roll(given[name], given["attention_mask"].shape[1] - n, axis=-1)[i]
    for name in ("input_ids", "attention_mask")
    for i, n in enumerate(lengths)
  ]
  assert len(set(lengths)) == 3
  batch = {
    "encoder_input_tokens": np.stack(left[:3]),
    "encoder_input_mask": np.stack(left[3:]),
    "decoder_input_tokens": given["decoder_input_ids"],
    # Whatever they are: T5's decoder takes a target of 0 for padding.
    "decoder_target_tokens": np.ones_like(given["decoder_input_ids"]),
  }
  kept = given["logits_mask"] > 0
  np.testing.assert_allclose(
    logits(got.params, batch)[kept], got.logits[kept], rtol=0, atol=tolerance
  )
  row, end = 1, int(kept[1].sum())
  alone = {
    "encoder_input_tokens": given["input_ids"][row : row + 1, : lengths[row]],
    "decoder_input_tokens": given["decoder_input_ids"][row : row + 1, :end],
    "decoder_target_tokens": np.ones((1, end), np.int32),
  }
  np.testing.assert_allclose(
    logits(got.params, alone)[0], got.logits[row, :end], rtol=0, atol=tolerance
  )


def check_gradients(got):
  """Compares the gradients of a few parameters."""
  expected = {
    k.removeprefix("grad/"): v
    for k, v in got.expected.items()
    if k.startswith("grad/")
  }
  assert len(expected) >= 3
  for key, value in expected.items():
    np.testing.assert_allclose(
      got.gradient[key],
      value,
      rtol=0,
      atol=1e-4 * np.abs(value).max(),
      err_msg=key,
    )


def check_greedy(got):
  """Compares greedy outputs that do not end."""
  np.testing.assert_array_equal(got.greedy, got.expected["greedy_no_eos"])
  np.testing.assert_allclose(
    got.greedy_log_probs,
    got.expected["greedy_no_eos_log_probs"],
    rtol=0,
    atol=1e-4,
  )
