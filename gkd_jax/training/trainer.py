"""The pure training step, and its compilation under `jit` or `pmap`.

The step takes (state, teacher parameters, batch). Under `jit` on a mesh, and
under `pmap`, it is the same function and gives the same numbers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gkd_jax import optimizers, partitioning, types
from gkd_jax.training import train_state


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
  """Updates the student once.

  Gradients of loss sums are added over microbatches and devices, and divided
  once by the whole batch's weight. An update in which anything is not finite (the
  loss, the gradient, the learning rate, what the optimizer makes of them) leaves
  parameters and optimizer as they are and is counted.

  Args:
    state: see `TrainState`.
    teacher_params: the teacher's parameters, or an empty dict for SFT.
    batch: features `[B, ...]`; under `axis_name`, this device's rows.
    model: has `train_loss`, see `models.DistillationModel`.
    optimizer: see `optimizers.Optimizer`.
    seed: of the run.
    source: whose outputs, see `models.GKDModel.source_of_step`.
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

  # Sums over the batch: the loss, its gradient, its metrics.
  inputs = types.StepInputs(source, state.step, key, row_ids)
  gradient = jax.grad(model.train_loss, has_aux=True)
  if num_microbatches == 1:
    grads, metrics = gradient(state.params, teacher_params, batch, inputs)
  else:
    grads, metrics = _accumulate(
      functools.partial(gradient, state.params, teacher_params),
      batch,
      inputs,
      num_microbatches,
    )
  if axis_name is not None:
    grads, metrics = jax.lax.psum((grads, metrics), axis_name)

  # Divided once. A product with the reciprocal is what XLA fuses into each use
  # of a gradient; of quotients it keeps a copy of all gradients.
  loss, weight = metrics["loss"]
  share = 1 / jnp.maximum(weight, 1e-9)
  norm = optax.tree.norm(grads) * share
  grads = jax.tree.map(lambda g: g * share, grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  rate = jnp.asarray(optimizer.learning_rate(state.step), jnp.float32)
  with jax.named_scope("update"):
    state = _update(state, grads, optimizer, rate, finite)
  one = jnp.ones(())
  return state, metrics | {
    "gradient_norm": (norm, one),
    "learning_rate": (rate, one),
    "skipped_updates": (state.skipped.astype(jnp.float32), one),
  }


def _accumulate(grad_fn, batch, inputs, num_microbatches):
  """Returns gradients and metrics summed over microbatches."""
  rows = inputs.row_ids.shape[0]
  if rows % num_microbatches:
    raise ValueError(
      f"expected NUM_MICROBATCHES to divide the {rows} rows of a batch, got"
      f" {num_microbatches}; set NUM_MICROBATCHES or BATCH_SIZE"
    )
  # Strided, so that each device keeps rows that it already holds.
  split = lambda x: jnp.swapaxes(
    x.reshape(rows // num_microbatches, num_microbatches, *x.shape[1:]), 0, 1
  )
  parts = jax.tree.map(split, (dict(batch), inputs.row_ids))

  def gradients(part):
    batch, row_ids = part
    return grad_fn(batch, inputs._replace(row_ids=row_ids))

  shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def body(total, part):
    return jax.tree.map(jnp.add, total, gradients(part)), None

  return jax.lax.scan(body, zeros, parts)[0]


def _update(state, grads, optimizer, rate, finite):
  """Returns the next state; parameters and optimizer as before if not `finite`.

  The updated arrays are computed twice: to look at them, and to keep them. Kept
  for the choice, they would take as much memory as the state again.
  """
  # A conditional, since XLA repeats a chosen array's condition, which reads all
  # arrays, in the update of each of them: programs grow as their square.
  finite &= _all_finite(_updated(state, grads, optimizer, rate))
  params, opt_state = jax.lax.cond(
    finite,
    lambda state, grads: _updated(state, grads, optimizer, rate),
    lambda state, grads: (state.params, state.opt_state),
    state,
    grads,
  )
  skip = jnp.logical_not(finite).astype(jnp.int32)
  return state.replace(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    skipped=state.skipped + skip,
    skipped_in_row=(state.skipped_in_row + skip) * skip,
  )


def _updated(state, grads, optimizer, rate):
  """Returns parameters and optimizer state after an update."""
  updates, opt_state = optimizer.update(
    grads, state.opt_state, state.params, rate
  )
  return optax.apply_updates(state.params, updates), opt_state


def _all_finite(tree):
  return functools.reduce(
    jnp.logical_and,
    [
      jnp.all(jnp.isfinite(leaf))
      for leaf in jax.tree.leaves(tree)
      if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ],
  )


def jit_step(
  step: Callable[..., Any], mesh: jax.sharding.Mesh, state_shardings: Any
) -> Callable[..., Any]:
  """Compiles the step as one program on a data × model mesh.

  Args:
    step: `train_step` with model, optimizer and settings bound.
    mesh: see `partitioning.make_mesh`.
    state_shardings: tree of shardings of the state.

  Returns:
    `(state, teacher_params, batch, source=...) -> (state, metrics)` under
    `jax.jit`; the state is donated. The batch is `partitioning.put_batch`'s.
  """
  return partitioning.jit(
    step,
    mesh,
    static_argnames=("source",),
    # Teacher (argument 1) and batch are read again: only the state is donated.
    donate_argnums=(0,),
    out_shardings=(state_shardings, None),
  )


def pmap_step(
  step: Callable[..., Any], devices: Sequence[Any] | None = None
) -> Callable[..., Any]:
  """Compiles the step data parallel under `pmap`; call it as `jit_step`'s.

  Args:
    step: `train_step` with model, optimizer and settings bound.
    devices: those of this process by default.

  Returns:
    `(state, teacher_params, batch, source=...) -> (state, metrics)` for a batch
    `[B, ...]` of this process; states are whole, as under `jit_step`.
  """
  devices = list(devices or jax.local_devices())

  @functools.cache
  def compiled(source):
    return jax.pmap(
      functools.partial(step, source=source, axis_name="data"),
      axis_name="data",
      in_axes=(None, None, 0),
      out_axes=None,
      devices=devices,
    )

  def run(state, teacher_params, batch, *, source):
    split = lambda x: x.reshape(len(devices), -1, *x.shape[1:])
    return compiled(source)(
      state, teacher_params, jax.tree.map(split, dict(batch))
    )

  return run
