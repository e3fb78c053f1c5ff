"""Small states and what is asserted of them, for tests of checkpoints."""

import contextlib
import pathlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gkd_jax import checkpoints

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIG = {"vocab_size": 32, "mlp_activations": ["gelu", "linear"]}


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  opt_state: Any
  extra: Any = None


class CountingIterator:
  """Position and nothing else, in one file."""

  def __init__(self, position=0):
    self.position = position

  def save_state(self, path):
    pathlib.Path(path, "position").write_text(str(self.position))

  def restore_state(self, path):
    self.position = int(pathlib.Path(path, "position").read_text())


class BrokenIterator(CountingIterator):
  def save_state(self, path):
    pathlib.Path(path, "position").write_text("half")
    raise RuntimeError("the disk is full")


@contextlib.contextmanager
def opened(folder, **kwargs):
  checkpointer = checkpoints.Checkpointer(folder, **kwargs)
  yield checkpointer
  checkpointer.close()


def make_state(step=1, seed=0, optimizer=None):
  rng = np.random.default_rng(seed)
  params = {
    "encoder": {
      "kernel": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
      "scale": jnp.asarray(rng.normal(size=16), jnp.bfloat16),
    },
    "decoder": {"kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)},
  }
  optimizer = optimizer or optax.adamw(1e-3)
  opt_state = optimizer.init(params)
  # A fresh optimizer is full of zeros, which come back from a wrong read, too.
  _, opt_state = jax.jit(optimizer.update)(params, opt_state, params)
  return State(jnp.int32(step), params, opt_state)


def assert_identical(got, expected):
  """Same structure, types, dtypes and bits."""
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


def message(error):
  """The message, which has to be one sentence on one line."""
  text = str(error.value)
  assert "\n" not in text and len(text) < 900
  assert text.startswith("expected ") and "got " in text and "set " in text
  return text


def folders(path):
  return sorted(p.name for p in pathlib.Path(path).iterdir())


def zeros_like(state):
  return jax.tree.map(lambda x: x * 0, state)
