"""The pure training step, the coin of λ, and the two executors of the step.

The step takes (state, teacher parameters, batch). Under `jit` on a mesh, and
under `pmap`, it is the same function and gives the same numbers.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gkd_jax import models, optimizers, partitioning, schedules, types
from gkd_jax.training import train_state


def source_of_step(model: Any, seed: int, step: int) -> str:
  """Whose outputs a step trains on: "data", "student" or "mixed".

  The coin of algorithm 1 is drawn from (seed, step) on the host, so that every
  host and every resumed run draws the same. `u < λ` with u in [0, 1): λ = 0
  never samples, λ = 1 always does.

  Args:
    model: `GKDModel`, or `EncoderDecoderModel` for SFT, which is all data.
    seed: of the run.
    step: batches used so far.

  Raises:
    ValueError: a schedule left [0, 1].
  """
  if model.teacher is None:
    return models.DATA
  fraction = schedules.host_value(model.student_data_fraction, step)
  if not 0 <= fraction <= 1:
    raise ValueError(
      f"expected λ in [0, 1], got {fraction} at step {step};"
      " set STUDENT_DATA_FRACTION"
    )
  if fraction in (0, 1):
    return models.STUDENT if fraction else models.DATA
  if model.student_data_granularity == "example":
    return models.MIXED
  u = np.random.default_rng([seed, step]).random()
  return models.STUDENT if u < fraction else models.DATA


def train_step(
  state: train_state.TrainState,
  teacher_params: Any,
  batch: types.Batch,
  *,
  model: Any,
  optimizer: optimizers.Optimizer,
  seed: int,
  source: str,
  num_microbatches: int = 1,
  axis_name: str | None = None,
) -> tuple[train_state.TrainState, types.Metrics]:
  """One update of the student.

  Gradients of loss sums are added over microbatches and devices, and divided
  once by the whole batch's weight. A non-finite loss or gradient leaves
  parameters and optimizer as they are and is counted.

  Args:
    state: see `TrainState`.
    teacher_params: the teacher's parameters, or an empty dict for SFT.
    batch: features `[B, ...]`; under `axis_name`, this device's share.
    model: has `train_loss`.
    optimizer: see `optimizers.Optimizer`.
    seed: of the run.
    source: see `source_of_step`.
    num_microbatches: number of parts that the batch is split into.
    axis_name: of `pmap`, or None.

  Returns:
    The new state, and metrics as (sum, weight).
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  rows = batch["decoder_target_tokens"].shape[0]
  row_ids = jnp.arange(rows)
  if axis_name is not None:
    row_ids += rows * jax.lax.axis_index(axis_name)

  def loss_fn(params, part, part_ids):
    loss, weight, metrics = model.train_loss(
      params,
      teacher_params,
      part,
      source=source,
      step=state.step,
      key=key,
      row_ids=part_ids,
    )
    return loss, metrics | {"loss": (loss, weight)}

  grad_fn = jax.grad(loss_fn, has_aux=True)
  grads, metrics = _accumulate(
    grad_fn, state.params, batch, row_ids, num_microbatches
  )
  if axis_name is not None:
    grads, metrics = jax.lax.psum((grads, metrics), axis_name)
  weight = jnp.maximum(metrics["loss"][1], 1e-9)
  # By multiplication, which XLA's CPU backend repeats wherever a gradient is read;
  # it kept quotients, and the squares of the norm, as copies of all gradients.
  share = 1 / weight
  norm = optax.tree.norm(grads) * share
  grads = jax.tree.map(lambda g: g * share, grads)
  finite = jnp.isfinite(metrics["loss"][0]) & jnp.isfinite(norm)
  rate = jnp.asarray(optimizer.learning_rate(state.step), jnp.float32)
  new_state = _update(state, grads, optimizer.transform, rate, finite)
  one = jnp.ones(())
  metrics |= {
    "gradient_norm": (norm, one),
    "learning_rate": (rate, one),
    "skipped_updates": (new_state.skipped.astype(jnp.float32), one),
  }
  return new_state, metrics


def _accumulate(grad_fn, params, batch, row_ids, num_microbatches):
  """Sums of gradients and metrics over microbatches."""
  rows = row_ids.shape[0]
  if num_microbatches == 1:
    return grad_fn(params, batch, row_ids)
  if rows % num_microbatches:
    raise ValueError(
      f"expected NUM_MICROBATCHES to divide the {rows} rows of a batch, got"
      f" {num_microbatches}; set NUM_MICROBATCHES or BATCH_SIZE"
    )
  # Strided, so that each device keeps rows that it already holds.
  split = lambda x: jnp.swapaxes(
    x.reshape(rows // num_microbatches, num_microbatches, *x.shape[1:]), 0, 1
  )
  parts = jax.tree.map(split, (dict(batch), row_ids))
  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(grad_fn, params, *first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def body(total, part):
    return jax.tree.map(jnp.add, total, grad_fn(params, *part)), None

  return jax.lax.scan(body, zeros, parts)[0]


def _update(state, grads, transform, rate, finite):
  keep = functools.partial(jnp.where, finite)
  updates, opt_state = transform.update(grads, state.opt_state, state.params)
  updates = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
  params = optax.apply_updates(state.params, updates)
  skip = jnp.logical_not(finite).astype(jnp.int32)
  return state.replace(
    step=state.step + 1,
    params=jax.tree.map(keep, params, state.params),
    opt_state=jax.tree.map(keep, opt_state, state.opt_state),
    skipped=state.skipped + skip,
    skipped_in_row=(state.skipped_in_row + skip) * skip,
  )


class JitExecutor:
  """Runs the step as one compiled program on a data × model mesh.

  Args:
    step: `train_step` with everything bound but state, teacher, batch, source.
    mesh: see `partitioning.make_mesh`.
    state_shardings: tree of shardings of the state.
  """

  def __init__(self, step: Callable, mesh: Any, state_shardings: Any):
    self._step, self._shardings = step, state_shardings
    self._mesh = mesh
    self._compiled = functools.cache(self._compile)

  def _compile(self, source):
    return partitioning.jit(
      functools.partial(self._step, source=source),
      self._mesh,
      # Teacher (argument 1) and batch are read again: only the state is given.
      donate_argnums=(0,),
      out_shardings=(self._shardings, None),
    )

  def put(self, batch: Mapping[str, np.ndarray]) -> types.Batch:
    """Global arrays from this process's rows."""
    return partitioning.put_batch(batch, self._mesh)

  def lower(self, state, teacher_params, batch, source) -> jax.stages.Lowered:
    """The step's program for shapes with shardings; nothing is allocated."""
    return self._compiled(source).lower(state, teacher_params, batch)

  def __call__(self, state, teacher_params, batch, source):
    """Returns the new state and metrics."""
    return self._compiled(source)(state, teacher_params, batch)


class PmapExecutor:
  """Runs the step data-parallel under `pmap`; states look as under `jit`."""

  def __init__(self, step: Callable, devices: Any = None):
    self._step = step
    self._devices = list(devices or jax.local_devices())
    self._compiled = functools.cache(self._compile)

  def _compile(self, source):
    return jax.pmap(
      functools.partial(self._step, source=source, axis_name="data"),
      axis_name="data",
      in_axes=(None, None, 0),
      out_axes=None,
      devices=self._devices,
    )

  def put(self, batch: Mapping[str, np.ndarray]) -> types.Batch:
    """Splits the rows over the devices: `[devices, B / devices, ...]`."""
    n = len(self._devices)
    return {k: v.reshape(n, -1, *v.shape[1:]) for k, v in batch.items()}

  def __call__(self, state, teacher_params, batch, source):
    """Returns the new state and metrics."""
    return self._compiled(source)(state, teacher_params, batch)


def sampler(model: Any, mesh: Any) -> Any:
  """`model.sample_batch` under jit: sampling as a program of its own."""
  # Looked up when it is called: a model without a teacher has no such method.
  return partitioning.jit(lambda *args: model.sample_batch(*args), mesh)
