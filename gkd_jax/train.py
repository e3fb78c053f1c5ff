"""The training script: restore, loop, evaluate, save.

Reads top to bottom. Everything that it needs is an argument; gin binds them.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gkd_jax import (
  checkpoints,
  data,
  evaluation,
  optimizers,
  partitioning,
  training,
)
from gkd_jax.checkpoints import parameters
from gkd_jax.data import shards


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
  input_buckets: Sequence[int] | None = None,
  use_cached_tasks: bool = False,
  num_microbatches: int = 1,
  executor: str = "jit",
  num_partitions: int = 1,
  num_slices: int | None = None,
  data_shards: int | None = None,
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
    input_buckets: lengths of `data.CutInputs`; None cuts nothing.
    use_cached_tasks: read seqio's cache.
    num_microbatches: see `training.train_step`.
    executor: "jit" (a mesh) or "pmap" (data parallel).
    num_partitions: devices of the model axis.
    num_slices: parts of the devices that only gradients are exchanged between;
      None is as many as TPUs are in. See `partitioning.make_mesh`.
    data_shards: n of `shards`; None is as few as the processes need, or as
      the run began with. It is the most processes that share the reading.
    shard_params_over_data: split parameters and optimizer over the data axis,
      within each slice.
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

  Raises:
    preemption.Stopped: SIGTERM came, and the step is saved.
  """
  # ---- mesh, data, models: what can be wrong is found here, before compiling -
  mesh = partitioning.make_mesh(num_partitions, num_slices=num_slices)
  check_batch(batch_size, num_microbatches, mesh, executor)
  task = data.load_task(mixture_or_task_name, mixture_or_task_module)
  iterator = data.TrainIterator(
    task,
    task_feature_lengths,
    batch_size,
    seed=seed,
    converter=model.FEATURE_CONVERTER_CLS,
    pack=pack,
    share=_share(mesh, batch_size, data_shards, model_dir),
    use_cached=use_cached_tasks,
  )
  if input_buckets:
    features = data.feature_lengths(
      model.FEATURE_CONVERTER_CLS, task_feature_lengths, pack
    )
    iterator = data.CutInputs(iterator, input_buckets, features)
  batches = training.RolloutBatches(iterator, model, task, seed=seed, mesh=mesh)
  shapes = partitioning.input_shapes(task_feature_lengths)
  rules = partitioning.parameter_rules(shard_params_over_data)
  abstract_state, state_shardings = training.abstract_state(
    model.student, optimizer, shapes, mesh, rules
  )
  teacher_params = _teacher_params(
    model.teacher, teacher_checkpoint_path, shapes, mesh, rules
  )
  _print_sizes(abstract_state, state_shardings, teacher_params, mesh)
  if dry_run:
    return {}

  # ---- where the parameters come from: resume > initial > drawn ------------
  # Before the checkpointer opens: a wrong path leaves no threads of it behind.
  abstract = partitioning.with_shardings(abstract_state, state_shardings)
  params = None
  if not checkpoints.has_checkpoint(model_dir):
    params = _first_params(
      model, initial_checkpoint_path, abstract.params, seed, shapes
    )
  # Closed whatever happens: an error leaves no threads that write on.
  with contextlib.closing(
    checkpoints.Checkpointer(
      model_dir,
      keep=checkpoints_to_keep,
      best_metric=best_metric,
      best_mode=best_mode,
    )
  ) as checkpointer:
    start = checkpointer.latest_step() or 0
    if params is None:
      state = checkpointer.restore(start, abstract, batches)
      print(f"resumed {model_dir} at step {start}", flush=True)
    else:
      state = jax.jit(
        functools.partial(training.create, transform=optimizer.transform),
        out_shardings=state_shardings,
      )(params)

    # ---- the step and the evaluation -----------------------------------------
    step_fn = functools.partial(
      training.train_step,
      model=model,
      optimizer=optimizer,
      seed=seed,
      num_microbatches=num_microbatches,
    )
    run_step = _executor(executor, step_fn, mesh, state_shardings)
    make_evaluator = functools.partial(
      evaluation.Evaluator,
      task,
      task_feature_lengths,
      eval_batch_size,
      mesh,
      converter=model.student.FEATURE_CONVERTER_CLS,
      use_cached=use_cached_tasks,
    )
    evaluator = make_evaluator(num_examples=eval_num_examples)

    # ---- the loop ------------------------------------------------------------
    scores: dict[str, float] = {}
    with (
      training.TrainLog(model_dir, start, train_steps) as log,
      training.StopSignal() as stop,
    ):
      for step in range(start, train_steps):
        source = training.source_of_step(model, seed, step)
        batch = batches.next(step, state.params)
        _check_targets(batch, source, step)
        state, metrics = run_step(
          state, teacher_params, run_step.put(batch), source
        )
        done = step + 1
        log.add(metrics, source, batch)
        stopping = stop.asked(done)
        last = done == train_steps or stopping
        if done % log_period == 0 or last:
          skipped = int(state.skipped_in_row)  # waits for the step
          log.write(done)
          _check_skipped(skipped, max_skipped_in_row, done, model_dir)
        evaluated = None
        if done % eval_period == 0 or done == train_steps:
          scores = evaluated = _evaluate(
            evaluator, model, state.params, teacher_params, log, done
          )
        if done % checkpoint_period == 0 or last:
          checkpointer.save(
            done,
            state,
            dataset_iterator=batches,
            metrics=evaluated,
            config=dataclasses.asdict(model.config),
          )
        if stopping:
          checkpointer.wait()
          log.say(f"SIGTERM: saved step {done}, stopping")
          raise training.Stopped
      checkpointer.wait()
      if final_eval_split:
        final = make_evaluator(split=final_eval_split)
        log.final(
          _final_scores(final, model, state.params, seed, final_eval_split)
        )
    return scores


def check_batch(batch_size, num_microbatches, mesh, executor):
  """Raises a ValueError for a batch that the mesh or the executor cannot take."""
  data_axis = partitioning.row_shards(mesh)
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
  if executor == "pmap" and jax.process_count() > 1:
    raise ValueError(
      f"expected one process under pmap, got {jax.process_count()};"
      " set EXECUTOR = 'jit'"
    )


def _teacher_params(teacher, path, shapes, mesh, rules):
  if teacher is None:
    return {}
  return checkpoints.load_placed(
    path,
    *partitioning.abstract_params(teacher, shapes, mesh, rules),
    setting="TEACHER_CHECKPOINT_PATH",
    of="teacher",
  )


def _executor(name, step, mesh, state_shardings):
  if name == "pmap":
    return training.PmapExecutor(step)
  return training.JitExecutor(step, mesh, state_shardings)


def _share(mesh, batch_size, given, model_dir):
  """What this process reads of the data."""
  rows = shards.rows_of_processes(partitioning.process_grid(mesh), batch_size)
  count = shards.count(
    given, checkpoints.recorded_data_shards(model_dir), batch_size, rows
  )
  return shards.share(rows, jax.process_index(), batch_size, count)


def _check_skipped(skipped, most, step, model_dir):
  if skipped >= most:
    raise FloatingPointError(
      f"expected finite losses and gradients, got {skipped} non-finite"
      f" ones in a row up to step {step}; the last good checkpoint is in"
      f" {model_dir}; set LEARNING_RATE"
    )


def _check_targets(batch, source, step):
  if source == "data" and not np.any(batch["decoder_loss_weights"]):
    raise ValueError(
      "expected target tokens in every batch, got a batch without any at"
      f" step {step}; set STUDENT_DATA_FRACTION = 1.0 for data without"
      " references, or MIXTURE_OR_TASK_NAME"
    )


def _print_sizes(state, shardings, teacher_params, mesh):
  print(
    f"student {parameters.count_array_elements(state.params):,} parameters"
    f" ({partitioning.bytes_per_device(state, shardings):,} bytes"
    f" per device with optimizer), teacher {parameters.count_array_elements(teacher_params):,}"
    f" parameters ({parameters.held_bytes_per_device(teacher_params):,} bytes per device),"
    f" {len(mesh.devices.flat)} devices as {dict(mesh.shape)}",
    flush=True,
  )


def _first_params(model, path, abstract_params, seed, shapes):
  """The student's first parameters, on their devices: read, or drawn."""
  if path:
    return checkpoints.load_params(
      path, setting="INITIAL_CHECKPOINT_PATH", like=abstract_params
    )
  # As a program: the network that is applied for the sake of its parameters' shapes
  # is then left out.
  draw = jax.jit(lambda key: model.get_initial_variables(key, shapes)["params"])
  params = draw(jax.random.key(seed))
  # By the host: every process draws the same, and places its part.
  return jax.tree.map(
    lambda x, leaf: jax.device_put(np.asarray(x, np.float32), leaf.sharding),
    dict(params),
    abstract_params,
  )


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


def _final_scores(evaluator, model, params, seed, split):
  """Scores of a whole split, greedy and sampled at temperature 1."""
  result: dict[str, Any] = {
    "params": parameters.count_array_elements(params),
    "split": split,
  }
  for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
    outputs = evaluator.predict(
      model.student.with_decode_fn(),
      params,
      seed=seed,
      decoder_params={"temperature": temperature},
    )
    result[name] = evaluator.score(outputs)
  return result
