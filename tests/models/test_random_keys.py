"""Random keys of a step: rows, microbatches and devices have their own."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_models

from gkd_jax import training
from gkd_jax.models import base_model


class _DropoutModel(base_model.BaseTransformerModel):
  """SFT whose loss is the number of units that dropout takes."""

  def __init__(self):
    config = types.SimpleNamespace(vocab_size=2, dropout_rate=0.5)
    super().__init__(types.SimpleNamespace(config=config))

  def logits(self, params, batch, dropout_rng=None):
    taken = jax.random.bernoulli(
      dropout_rng, 0.5, batch["decoder_target_tokens"].shape
    )
    # log(1 + e^z) is 1 where a unit is taken, and 0 elsewhere.
    other = params["w"] + jnp.where(taken, np.log(np.e - 1), -40.0)
    return jnp.stack([jnp.zeros(taken.shape), other], axis=-1)


@pytest.mark.parametrize("executor", ["microbatches", "pmap"])
def test_equal_rows_get_dropout_masks_of_their_own(executor):
  """256 coins vary by 64 from step to step; 64 coins times 4 vary by 256."""
  step, optimizer = toy_models.sgd_step(_DropoutModel(), "data")
  run = jax.jit(functools.partial(step, num_microbatches=4))
  if executor == "pmap":
    run = functools.partial(
      training.pmap_step(step, jax.devices()[:4]), source="data"
    )
  rows = np.ones((4, 64), np.int32)
  batch = {"decoder_target_tokens": 0 * rows, "decoder_loss_weights": rows}
  state = toy_models.state({"w": jnp.float32(0.0)}, optimizer)
  taken = []
  for i in range(200):
    taken.append(run(state.replace(step=jnp.int32(i)), {}, batch)[1]["loss"][0])
  # The variance of 200 draws is within a tenth of 64, three times in four.
  assert abs(np.mean(taken) - 128) < 3
  assert 40 < np.var(taken) < 100
