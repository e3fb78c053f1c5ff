"""The training script: restore, loop, evaluate, save.

Reads top to bottom. Everything that it needs is an argument; gin binds them.
"""

import dataclasses
import functools
import signal
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import (
  checkpoints,
  data,
  evaluate,
  logs,
  optimizers,
  partitioning,
  train_state,
  trainer,
)


def train(
  model: Any,
  optimizer: optimizers.Optimizer,
  *,
  mixture_or_task_name: str,
  task_feature_lengths: Mapping[str, int],
  model_dir: str,
  train_steps: int,
  batch_size: int,
  mixture_or_task_module: str | None = None,
  initial_checkpoint_path: str | None = None,
  teacher_checkpoint_path: str | None = None,
  seed: int = 0,
  pack: bool = False,
  use_cached_tasks: bool = False,
  num_microbatches: int = 1,
  executor: str = "jit",
  num_partitions: int = 1,
  shard_params_over_data: bool = False,
  log_period: int = 50,
  eval_period: int = 1000,
  eval_batch_size: int = 256,
  eval_num_examples: int | None = 1000,
  checkpoint_period: int = 1000,
  checkpoints_to_keep: int = 3,
  best_metric: str | None = None,
  best_mode: str = "min",
  max_skipped_in_row: int = 20,
  final_eval_split: str | None = None,
  dry_run: bool = False,
) -> Mapping[str, float]:
  """Trains the student of `model`, from wherever `model_dir` stands.

  Args:
    model: `GKDModel`, or `EncoderDecoderModel` for SFT.
    optimizer: see `optimizers`.
    mixture_or_task_name: seqio task or mixture.
    task_feature_lengths: seqio feature to length in tokens.
    model_dir: checkpoints `checkpoint_<step>`, `metrics.jsonl`, TensorBoard.
    train_steps: last step.
    batch_size: rows of all devices and processes together.
    mixture_or_task_module: Python module that registers the task.
    initial_checkpoint_path: the student's first parameters; None draws them.
    teacher_checkpoint_path: the teacher's parameters.
    seed: of everything random.
    pack: pack examples (fixed data only).
    use_cached_tasks: read seqio's cache.
    num_microbatches: see `trainer.train_step`.
    executor: "jit" (a mesh) or "pmap" (data parallel).
    num_partitions: devices of the model axis.
    shard_params_over_data: split parameters and optimizer over the data axis.
    log_period: steps between log lines.
    eval_period: steps between evaluations.
    eval_batch_size: rows decoded at a time.
    eval_num_examples: validation examples used, None for all.
    checkpoint_period: steps between checkpoints.
    checkpoints_to_keep: newest checkpoints kept.
    best_metric: of the task's metrics; its best checkpoint is kept as well.
    best_mode: "min" or "max".
    max_skipped_in_row: non-finite updates in a row that stop the run.
    final_eval_split: after the last step, decode this whole split greedily
      and by sampling at temperature 1, and write `final.json`.
    dry_run: build everything, print sizes, and stop.

  Returns:
    The last evaluation's metrics.
  """
  # ---- mesh and data -------------------------------------------------------
  mesh = partitioning.make_mesh(num_partitions)
  data_axis = mesh.shape[partitioning.DATA_AXIS]
  if batch_size % (data_axis * num_microbatches):
    raise ValueError(
      f"expected BATCH_SIZE to be a multiple of {data_axis * num_microbatches}"
      f" ({data_axis} data-parallel devices x {num_microbatches} microbatches),"
      f" got {batch_size}; set BATCH_SIZE"
    )
  if executor not in ("jit", "pmap"):
    raise ValueError(
      f"expected an executor 'jit' or 'pmap', got {executor!r}; set EXECUTOR"
    )
  task = data.load_task(mixture_or_task_name, mixture_or_task_module)
  iterator = data.TrainIterator(
    task,
    task_feature_lengths,
    batch_size,
    seed=seed,
    pack=pack,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    use_cached=use_cached_tasks,
  )

  # ---- student, teacher, optimizer ----------------------------------------
  shapes = {
    "encoder_input_tokens": (1, task_feature_lengths["inputs"]),
    "decoder_input_tokens": (1, task_feature_lengths["targets"]),
  }
  place = functools.partial(
    _place, shapes=shapes, mesh=mesh, shard_over_data=shard_params_over_data
  )
  abstract_params, param_shardings = place(model.student)
  teacher_params = {}
  if model.teacher is not None:
    teacher_params = load_teacher(
      teacher_checkpoint_path, *place(model.teacher)
    )
  abstract_state = jax.eval_shape(
    lambda p: train_state.create(p, optimizer.transform), abstract_params
  )
  state_shardings = partitioning.state_shardings(
    abstract_state, param_shardings, mesh
  )
  sizes = {
    "student": logs.count(abstract_params),
    "teacher": logs.count(teacher_params),
  }
  print(
    f"student {sizes['student']:,} parameters"
    f" ({partitioning.bytes_per_device(abstract_state, state_shardings):,} bytes"
    f" per device with optimizer), teacher {sizes['teacher']:,} parameters"
    f" ({logs.bytes_per_device(teacher_params):,} bytes per device),"
    f" {len(mesh.devices.flat)} devices as {dict(mesh.shape)}",
    flush=True,
  )
  if dry_run:
    return {}

  # ---- where the parameters come from: resume > initial > drawn -----------
  checkpointer = checkpoints.Checkpointer(
    model_dir,
    keep=checkpoints_to_keep,
    best_metric=best_metric,
    best_mode=best_mode,
  )
  start = checkpointer.latest_step()
  if start is not None:
    abstract = jax.tree.map(
      lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h),
      abstract_state,
      state_shardings,
    )
    state = checkpointer.restore(start, abstract, iterator)
    print(f"resumed {model_dir} at step {start}", flush=True)
  else:
    if initial_checkpoint_path:
      params = checkpoints.load_params(initial_checkpoint_path)
      checkpoints.check_matches(
        params,
        abstract_params,
        setting="INITIAL_CHECKPOINT_PATH",
        path=initial_checkpoint_path,
      )
    else:
      params = model.get_initial_variables(jax.random.key(seed), shapes)[
        "params"
      ]
    params = jax.tree.map(
      lambda x, s: jax.device_put(jnp.array(x, jnp.float32), s),
      dict(params),
      param_shardings,
    )
    create = functools.partial(
      train_state.create, transform=optimizer.transform
    )
    state = jax.jit(create, out_shardings=state_shardings)(params)
    start = 0

  # ---- the step ------------------------------------------------------------
  step_fn = functools.partial(
    trainer.train_step,
    model=model,
    optimizer=optimizer,
    seed=seed,
    num_microbatches=num_microbatches,
  )
  if executor == "pmap":
    run_step = trainer.PmapExecutor(step_fn)
  else:
    run_step = trainer.JitExecutor(step_fn, mesh, state_shardings)
  evaluator = evaluate.Evaluator(
    task,
    task_feature_lengths,
    eval_batch_size,
    mesh,
    num_examples=eval_num_examples,
    use_cached=use_cached_tasks,
  )
  config = dataclasses.asdict(model.config)
  log = logs.TrainLog(model_dir, start, train_steps)
  stop = _StopSignal()

  # ---- the loop ------------------------------------------------------------
  scores: dict[str, float] = {}
  for step in range(start, train_steps):
    source = trainer.source_of_step(model, seed, step)
    batch = next(iterator)
    if source == "data" and not np.any(batch["decoder_loss_weights"]):
      raise ValueError(
        "expected target tokens in every batch, got a batch without any at"
        f" step {step}; set STUDENT_DATA_FRACTION = 1.0 for data without"
        " references, or MIXTURE_OR_TASK_NAME"
      )
    state, metrics = run_step(
      state, teacher_params, run_step.put(batch), source
    )
    done = step + 1
    log.add(metrics, source, batch)
    last = done == train_steps or stop.asked
    if done % log_period == 0 or last:
      log.write(done)
      if int(state.skipped_in_row) >= max_skipped_in_row:
        checkpointer.close()
        raise FloatingPointError(
          f"expected finite losses and gradients, got {max_skipped_in_row}"
          f" non-finite ones in a row up to step {done}; the last good"
          f" checkpoint is in {model_dir}; set LEARNING_RATE"
        )
    evaluated = None
    if done % eval_period == 0 or done == train_steps:
      scores = evaluated = _evaluate(
        evaluator, model, state.params, teacher_params, log, done
      )
    if done % checkpoint_period == 0 or last:
      checkpointer.save(
        done,
        state,
        dataset_iterator=iterator,
        metrics=evaluated,
        config=config,
      )
    if stop.asked:
      print(f"SIGTERM: saved step {done}, stopping", flush=True)
      break
  checkpointer.close()
  if final_eval_split and not stop.asked:
    final = evaluate.Evaluator(
      task, task_feature_lengths, eval_batch_size, mesh, split=final_eval_split
    )
    log.final(
      {
        "greedy": final.score(final.predict(model.student, state.params)),
        "sampled": final.score(
          final.predict(
            model.student.with_decode_fn(),
            state.params,
            seed=seed,
            decoder_params={"temperature": 1.0},
          )
        ),
        "params": sizes["student"],
        "split": final_eval_split,
      }
    )
  log.close()
  stop.restore()
  return scores


def _place(model, *, shapes, mesh, shard_over_data):
  """Shapes of a model's parameters and their shardings."""
  variables = jax.eval_shape(
    lambda: model.get_initial_variables(jax.random.key(0), shapes)
  )
  rules = (
    partitioning.FULLY_SHARDED_RULES
    if shard_over_data
    else partitioning.STANDARD_RULES
  )
  axes = partitioning.logical_axes(variables["params_axes"])
  shardings = partitioning.param_shardings(
    variables["params"], axes, mesh, rules
  )
  return variables["params"], shardings


def load_teacher(path, abstract_params, shardings):
  """The teacher's parameters on their devices, checked against its sizes.

  Raises:
    ValueError: no path, nothing there, or other shapes.
  """
  if not path:
    raise ValueError(
      "expected a checkpoint of the teacher, got none;"
      " set TEACHER_CHECKPOINT_PATH"
    )
  params = checkpoints.load_params(path, setting="TEACHER_CHECKPOINT_PATH")
  checkpoints.check_matches(
    params, abstract_params, setting="TEACHER_CHECKPOINT_PATH", path=path
  )
  return jax.tree.map(jax.device_put, dict(params), shardings)


def _evaluate(evaluator, model, params, teacher_params, log, step):
  """Scores the student greedily, and shows five of its outputs."""
  results = evaluator.predict(model.student, params)
  scores = evaluator.score(results)
  teacher = {}
  if model.teacher is not None:
    teacher = evaluator.predict(model.teacher, teacher_params, limit=5)
  examples = []
  for name, result in results.items():
    for i in range(min(5, len(result.inputs))):
      examples.append(
        {
          "input": result.inputs[i],
          "reference": result.targets[i],
          "teacher": teacher[name].predictions[i] if teacher else None,
          "student": result.predictions[i],
        }
      )
  log.evaluation(step, scores, examples)
  return scores


class _StopSignal:
  """Turns SIGTERM into a flag that the loop reads between steps."""

  def __init__(self):
    self.asked = False
    self._old = signal.signal(signal.SIGTERM, self._set)

  def _set(self, *_):
    self.asked = True

  def restore(self):
    signal.signal(signal.SIGTERM, self._old)
