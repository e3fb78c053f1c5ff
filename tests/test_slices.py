"""Several slices: the numbers of one, and what crosses from one to another."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_models

from gkd_jax import (
  optimizers,
  partitioning,
  placement,
  schedules,
  shards,
  trainer,
)

SGD = optimizers.Optimizer(schedules.constant(1.0), optax.sgd(1.0))
OPTIONS = {"divergence": "jsd", "beta": 0.5, "student_data_fraction": 0.5}


def build(mesh, over_data=False, microbatches=1, **options):
  """An executor of the step, a state, and the teacher's parameters."""
  model, student, teacher = toy_models.gkd(**OPTIONS, **options)
  rules = placement.rules(over_data)
  state = toy_models.state(student, SGD)
  shardings = placement.state(
    model.student, SGD, toy_models.SHAPES, mesh, rules
  )[1]
  of_teacher = placement.params(model.teacher, toy_models.SHAPES, mesh, rules)
  step = functools.partial(
    trainer.train_step,
    model=model,
    optimizer=SGD,
    seed=0,
    num_microbatches=microbatches,
  )
  run = trainer.JitExecutor(step, mesh, shardings)
  return (
    run,
    jax.device_put(state, shardings),
    jax.device_put(teacher, of_teacher[1]),
  )


def gradient(mesh, source, **options):
  """The parameters' change under SGD, and metrics."""
  run, state, teacher = build(mesh, **options)
  before = jax.tree.map(np.array, state.params)
  new, metrics = run(state, teacher, run.put(toy_models.batch()), source)
  return jax.tree.map(lambda a, b: a - np.asarray(b), before, new.params), metrics


def slices(number=2, partitions=2):
  return partitioning.make_mesh(partitions, num_slices=number)


@functools.cache
def of_one_device(source):
  return gradient(partitioning.make_mesh(devices=jax.devices()[:1]), source)


@pytest.mark.parametrize(
  ("source", "options"),
  [
    ("data", {}),
    ("data", {"over_data": True, "microbatches": 2}),
    ("student", {}),
    ("student", {"over_data": True}),
    ("mixed", {"over_data": True}),
    ("student", {"over_data": True, "decode_slots": 1}),
    ("student", {"over_data": True, "loss_chunk_size": 5}),
  ],
)
def test_slices_change_nothing(source, options):
  expected, of_one = of_one_device(source)
  got, metrics = gradient(slices(), source, **options)
  difference = optax.tree.norm(jax.tree.map(np.subtract, got, expected))
  assert difference <= 1e-5 * optax.tree.norm(expected)
  for name, pair in of_one.items():
    np.testing.assert_allclose(
      metrics[name], pair, rtol=1e-4, atol=1e-6, err_msg=name
    )
