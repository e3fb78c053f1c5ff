"""`gkd` as a user starts it, forked, and in this process for its messages."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import fork_server
import pytest
import toy_models

from gkd_jax import checkpoints, main, models, network

ROOT = pathlib.Path(__file__).parents[2]
# With the cache of programs that conftest.py has made.
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def gin(**macros):
  """Flags that bind macros."""
  return [f"--gin.{name}={value!r}" for name, value in macros.items()]


def started(*arguments, cwd=None, env=None, **macros):
  """Runs `gkd` to its end as a user starts it, with all its imports."""
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "gkd_jax.main",
      *map(str, arguments),
      *gin(**macros),
    ],
    capture_output=True,
    text=True,
    cwd=cwd,
    env=ENV | (env or {}),
    timeout=300,
    check=False,
  )


def start(*arguments, cwd=None, env=None, **macros):
  """A process of `gkd`, forked from one that has imported everything."""
  arguments = [*map(str, arguments), *gin(**macros)]
  return fork_server.Process(arguments, cwd or os.getcwd(), ENV | (env or {}))


def gkd(*arguments, cwd=None, env=None, **macros):
  """Runs `gkd` to its end, forked."""
  process = start(*arguments, cwd=cwd, env=env, **macros)
  output, errors = process.communicate()
  return subprocess.CompletedProcess(
    arguments, process.returncode, output, errors
  )


def here(*arguments):
  """Runs `gkd` in this process; an error comes as it was raised."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("GKD_TRACEBACK", "1")
    main.main(["gkd", *map(str, arguments)])


def refused(capsys, *arguments):
  """Returns the error about a wrong setting, from `gkd` in this process.

  That saves starting Python and importing JAX and TensorFlow again.
  """
  with pytest.raises(SystemExit) as exit_status:
    main.main(["gkd", *map(str, arguments)])
  assert exit_status.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith("gkd: expected ") and said.count("\n") == 1, said
  return said.strip()


def save_toy(folder, emb_dim, num_heads, mlp_dim, vocab_size=24, seed=0):
  """A checkpoint of random parameters, with the sizes of models/toy.gin."""
  config = network.T5Config(
    vocab_size=vocab_size,
    emb_dim=emb_dim,
    num_heads=num_heads,
    head_dim=8,
    mlp_dim=mlp_dim,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_activations=("gelu", "linear"),
  )
  model = models.EncoderDecoderModel(network.Transformer(config))
  shapes = {"encoder_input_tokens": (1, 2), "decoder_input_tokens": (1, 2)}
  params = toy_models.initial_params(model, seed, shapes)
  checkpoints.save_safetensors(folder, params, dataclasses.asdict(config))
  return str(folder)


def save_toy_teacher(folder, vocab_size=24):
  """A checkpoint for TOY_TEACHER."""
  return save_toy(folder, 32, 4, 64, vocab_size)
