"""Reads the numbers that T5X computed."""

import json
import pathlib

import numpy as np
from flax import traverse_util

from gkd_jax import models, network

_FOLDER = pathlib.Path(__file__).parents[1] / "golden"
NAMES = ("t5_1_1_tiny", "t5_1_0_tiny")


def load(name):
  """(numbers by key, JSON with config, params and params_axes)."""
  numbers = dict(np.load(_FOLDER / f"{name}.npz"))
  return numbers, json.loads((_FOLDER / f"{name}.json").read_text())


def part(numbers, prefix):
  """The entries under `prefix/`, without it."""
  start = prefix + "/"
  return {
    k.removeprefix(start): v for k, v in numbers.items() if k.startswith(start)
  }


def params(numbers, prefix="params"):
  """The parameter tree, or that of their gradients."""
  return traverse_util.unflatten_dict(part(numbers, prefix), sep="/")


def model(name, **kwargs):
  """The model of the golden configuration, its parameters, its batch."""
  numbers, info = load(name)
  module = network.Transformer(network.T5Config(**info["config"]))
  return (
    models.EncoderDecoderModel(module, **kwargs),
    params(numbers),
    part(numbers, "batch"),
  )


def decoder_only(prefix_lm):
  """Model, parameters, batch and numbers of T5X's decoder-only example."""
  numbers, info = load("decoder_only_tiny")
  config = network.TransformerConfig(**info["config"])
  model = models.DecoderOnlyModel(
    network.DecoderWrapper(config),
    inputs_bidirectional_attention=prefix_lm,
    z_loss=1e-4,
  )
  start = "bidirectional_" if prefix_lm else "causal_"
  expected = {
    k.removeprefix(start): v for k, v in numbers.items() if k.startswith(start)
  }
  batch = part(numbers, "batch")
  return model, params(numbers), batch, expected
