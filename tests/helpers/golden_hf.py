"""Tiny models of Hugging Face's families, and what transformers computes of them."""

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
from gkd_jax.network import causal, layers

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
  expected = numbers(name)
  model = models.DecoderOnlyModel(network.CausalTransformer(config))
  got = jax.jit(functools.partial(_causal, model))(params, expected)
  table = huggingface.name_table(config)
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

  def loss(params):
    logits, kept = model.module.apply(
      {"params": params},
      tokens,
      tokens,
      sides("attention_mask", "left_attention_mask"),
      jnp.concatenate([places, given["left_position_ids"]]),
      enable_dropout=False,
      capture_intermediates=lambda module, _: isinstance(
        module, causal.RotaryLayer | layers.LayerNorm
      ),
      mutable=["intermediates"],
    )
    right, left = jnp.split(logits, 2)
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(right), given["targets"][..., None], axis=2
    )
    log_probs = picked[..., 0] * given["target_mask"]
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
    return -jnp.sum(log_probs) / jnp.sum(given["target_mask"]), results

  gradient, results = jax.grad(loss, has_aux=True)(params)
  greedy = _greedy(model, params, given)
  return results | {
    "gradient": gradient,
    "greedy": greedy.tokens,
    "greedy_log_probs": greedy.log_probs,
  }


def _greedy(model, params, given):
  """Decodes with the cache from prompts whose first word is read first."""
  tokens, length = given["input_ids"], given["greedy_no_eos"].shape[1]
  room = ((0, 0), (0, length))
  batch = {
    "decoder_input_tokens": jnp.pad(tokens, room),
    "decoder_causal_attention": jnp.pad(given["attention_mask"], room),
  }
  step, cache, rows = model.start_decoding(params, (), batch)
  rows.pop("row_axes")
  return decoding.sample(
    step,
    cache,
    None,
    batch_size=len(tokens),
    max_decode_length=length,
    temperature=0.0,
    eos_id=-1,
    **rows,
  )
