"""Tiny decoder-only models, a batch of prompts, and the network in numpy."""

import jax
import numpy as np
import toy_models
from flax import traverse_util

from gkd_jax import models, network

VOCAB = 16
WIDTH = 12
SHAPES = {"decoder_input_tokens": (1, WIDTH)}


def model(emb_dim=8, *, vocab_size=VOCAB, config=None, **kwargs):
  """A model of one layer, or as the fields in `config` say."""
  sizes = {
    "vocab_size": vocab_size,
    "emb_dim": emb_dim,
    "num_heads": 2,
    "num_layers": 1,
    "head_dim": 4,
    "mlp_dim": 8,
    "mlp_activations": ("gelu", "linear"),
    "dropout_rate": 0.0,
  }
  config = network.TransformerConfig(**sizes | (config or {}))
  module = network.DecoderWrapper(config)
  return models.DecoderOnlyModel(module, **kwargs)


def params(a_model, seed, scale=1.5):
  """Random parameters, enlarged so that samples end early."""
  return toy_models.draw_params(a_model, seed, SHAPES, scale)


def gkd(prefix_lm=False, dropout_rate=0.0, **kwargs):
  """`GKDModel`, student's and teacher's parameters."""
  student, teacher = (
    model(
      width,
      config={"dropout_rate": dropout_rate},
      inputs_bidirectional_attention=prefix_lm,
    )
    for width in (8, 12)
  )
  wrapped = models.GKDModel(student, teacher, **kwargs)
  # Of this seed some samples end early, and some fill their rows.
  return wrapped, params(student, 3), params(teacher, 2)


def rows(pairs, width=WIDTH):
  """T5X's features of unpacked rows, from lists of prompt and output."""
  shape = len(pairs), width
  names = "target_tokens", "input_tokens", "loss_weights", "causal_attention"
  batch = {f"decoder_{name}": np.zeros(shape, np.int32) for name in names}
  for i, (prompt, output) in enumerate(pairs):
    n, end = len(prompt), len(prompt) + len(output)
    batch["decoder_target_tokens"][i, :end] = [*prompt, *output]
    batch["decoder_input_tokens"][i, 1:] = batch["decoder_target_tokens"][
      i, :-1
    ]
    batch["decoder_loss_weights"][i, n:end] = 1
    batch["decoder_causal_attention"][i, : n + 1] = 1
  return batch


def pairs(number=8, seed=0):
  """Prompts of 1 to 5 tokens and outputs of 1 to 6, EOS included in both."""
  rng = np.random.default_rng(seed)
  draw = lambda length: [*rng.integers(2, VOCAB, length).tolist(), 1]
  return [(draw(i % 5), draw((3 * i + 2) % 6)) for i in range(number)]


def batch(number=8):
  """The rows of `pairs`."""
  return rows(pairs(number))


def packed(pairs_of_rows, width):
  """Features of packed rows, from a list of pairs for each row."""
  apart = [rows(pairs, width) for pairs in pairs_of_rows]
  shape = len(apart), width
  extra = "decoder_segment_ids", "decoder_positions"
  result = {k: np.zeros(shape, np.int32) for k in (*apart[0], *extra)}
  for row, (features, pairs) in enumerate(
    zip(apart, pairs_of_rows, strict=True)
  ):
    start = 0
    for i, (prompt, output) in enumerate(pairs):
      size = len(prompt) + len(output)
      here = slice(start, start + size)
      for name, value in features.items():
        result[name][row, here] = value[i, :size]
      result["decoder_segment_ids"][row, here] = i + 1
      result["decoder_positions"][row, here] = np.arange(size)
      start += size
  return result


def oracle(config, tree, features, prefix_lm):
  """Logits of the network in float64, one row, query and head at a time.

  From the descriptions in Raffel et al. 2020 (arXiv 1910.10683, sections 2.1 and
  3.2.1) and Shazeer 2020 (arXiv 2002.05202).
  """
  flat = {
    k.removeprefix("decoder/"): np.asarray(v, np.float64)
    for k, v in traverse_util.flatten_dict(dict(tree), sep="/").items()
  }
  inputs = np.asarray(features["decoder_input_tokens"])
  targets = np.asarray(features["decoder_target_tokens"])
  segments = np.asarray(features.get("decoder_segment_ids", targets * 0))
  prompt = np.asarray(features["decoder_causal_attention"]) * prefix_lm

  def norm(name, x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * flat[name]

  def attention(name, x, row):
    query, key, value = (
      (x @ flat[f"{name}/{part}/kernel"]).reshape(
        len(x), config.num_heads, config.head_dim
      )
      for part in ("query", "key", "value")
    )
    out = np.zeros_like(query)
    for i in range(len(x)):
      keys = [
        j
        for j in range(len(x))
        if targets[row, i] and targets[row, j]
        if segments[row, i] == segments[row, j]
        if j <= i or (prompt[row, i] and prompt[row, j])
      ]
      for head in range(config.num_heads):
        if keys:
          bias = flat["relpos_bias/rel_embedding"][head]
          z = [
            query[i, head] @ key[j, head] + bias[_bucket(i - j)] for j in keys
          ]
          weights = np.exp(z - np.max(z))
          out[i, head] = weights / weights.sum() @ value[keys, head]
    return out.reshape(len(x), -1) @ flat[f"{name}/out/kernel"]

  def row_logits(row):
    x = flat["token_embedder/embedding"][inputs[row]]
    for layer in range(config.num_layers):
      at = f"layers_{layer}"
      y = norm(f"{at}/pre_self_attention_layer_norm/scale", x)
      x = x + attention(f"{at}/self_attention", y, row)
      y = norm(f"{at}/pre_mlp_layer_norm/scale", x)
      gate = y @ flat[f"{at}/mlp/wi_0/kernel"]
      gate *= (
        1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
      ) / 2
      hidden = gate * (y @ flat[f"{at}/mlp/wi_1/kernel"])
      x = x + hidden @ flat[f"{at}/mlp/wo/kernel"]
    return norm("decoder_norm/scale", x) @ flat["logits_dense/kernel"]

  return np.stack([row_logits(row) for row in range(len(inputs))])


def _bucket(distance):
  """Of 32 buckets, for a key this many positions back; 0 for one ahead."""
  if distance < 16:
    return max(distance, 0)
  return min(16 + int(16 * np.log(distance / 16) / np.log(128 / 16)), 31)


def sampler(model):
  """The compiled sampler of a model, without PAD as on-policy training has it."""
  return jax.jit(
    lambda params, batch, key: model.sample(
      params, (), batch, key, suppress_ids=(0,)
    )
  )
