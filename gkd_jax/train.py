"""The training script: build, restore, loop, evaluate, save.

Reads top to bottom. Everything that it needs is an argument; gin binds them.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gkd_jax import checkpoints as checkpoint_files
from gkd_jax import checks, data, optimizers, partitioning, training
from gkd_jax import evaluation as evaluators
from gkd_jax.checkpoints import parameters
from gkd_jax.data import shards


def train(
  model: Any,
  optimizer: optimizers.Optimizer,
  *,
  model_dir: str,
  train_steps: int,
  dataset: training.DatasetConfig,
  partitioner: training.PartitionerConfig = training.PartitionerConfig(),
  evaluation: training.EvalConfig = training.EvalConfig(),
  checkpoints: training.CheckpointConfig = training.CheckpointConfig(),
  logging: training.LogConfig = training.LogConfig(),
  initial_checkpoint_path: str | None = None,
  teacher_checkpoint_path: str | None = None,
  seed: int = 0,
  max_skipped_in_row: int = 20,
  dry_run: bool = False,
) -> Mapping[str, float]:
  """Trains the student of `model`, resuming from the newest checkpoint.

  Args:
    model: `GKDModel` or another of `models`; `EncoderDecoderModel` for SFT.
    optimizer: see `optimizers`.
    model_dir: folder of `checkpoint_<step>`, `metrics.jsonl`, TensorBoard files.
    train_steps: last step.
    dataset: task, lengths, batch size.
    partitioner: mesh, executor, microbatches.
    evaluation: when and on what the student is evaluated.
    checkpoints: which checkpoints are written and kept.
    logging: log lines, profile, Weights & Biases.
    initial_checkpoint_path: the student's first parameters; None draws them.
    teacher_checkpoint_path: the teacher's parameters.
    seed: of everything random.
    max_skipped_in_row: non-finite updates in a row that stop the run.
    dry_run: build everything, print sizes, and stop.

  Returns:
    The last evaluation's metrics.

  Raises:
    training.Stopped: SIGTERM came, and the step is saved.
  """
  # ---- build: what can be wrong is found here, before compiling ------------
  checks.path(model_dir, "MODEL_DIR")
  checks.whole(train_steps, "TRAIN_STEPS")
  checks.path(initial_checkpoint_path, "INITIAL_CHECKPOINT_PATH", none=True)
  checks.path(teacher_checkpoint_path, "TEACHER_CHECKPOINT_PATH", none=True)
  checks.whole(seed, "SEED", least=0)
  checks.whole(max_skipped_in_row, "MAX_SKIPPED_IN_ROW")
  task = data.load_task(
    dataset.mixture_or_task_name, dataset.mixture_or_task_module
  )
  eval_split = _eval_split(task, evaluation)
  run = training.build(model, optimizer, dataset, partitioner, seed=seed)
  batches = _batches(model, task, dataset, run.mesh, seed, model_dir)
  teacher_params = _teacher_params(run.teacher, teacher_checkpoint_path)
  _print_sizes(run, teacher_params)
  if dry_run:
    return {}

  # ---- where the parameters come from: resume > initial > drawn ------------
  # Before the checkpointer opens: a wrong path leaves no threads of it behind.
  params = None
  if not checkpoint_files.has_checkpoint(model_dir):
    params = _first_params(model, initial_checkpoint_path, run, seed)
  # Closed whatever happens: an error leaves no threads that write on.
  with contextlib.closing(
    checkpoint_files.Checkpointer(
      model_dir,
      keep=checkpoints.keep,
      best_metric=checkpoints.best_metric,
      best_mode=checkpoints.best_mode,
    )
  ) as checkpointer:
    start = checkpointer.latest_step() or 0
    if params is None:
      state = checkpointer.restore(start, run.state, batches)
      print(f"resumed {model_dir} at step {start}", flush=True)
    else:
      state = jax.jit(
        functools.partial(training.create, transform=optimizer.transform),
        out_shardings=_shardings(run.state),
      )(params)

    # ---- the loop ------------------------------------------------------------
    make_evaluator = functools.partial(
      evaluators.Evaluator,
      task,
      dataset.task_feature_lengths,
      evaluation.batch_size,
      run.mesh,
      converter=model.student.FEATURE_CONVERTER_CLS,
      use_cached=dataset.use_cached,
    )
    evaluator = None
    if eval_split is not None:
      evaluator = make_evaluator(
        split=eval_split, num_examples=evaluation.num_examples
      )
    scores: dict[str, float] = {}
    with (
      training.TrainLog(
        model_dir, start, train_steps, wandb_project=logging.wandb_project
      ) as log,
      training.Profiler(model_dir, logging.profile_steps) as profiler,
      training.StopSignal() as stop,
    ):
      for step in range(start, train_steps):
        source = model.source_of_step(seed, step)
        batch = batches.next(step, state.params)
        _check_targets(batch, source, step)
        profiler.before(step)
        state, metrics = run.step(
          state, teacher_params, run.put(batch), source=source
        )
        profiler.after(step, metrics)
        done = step + 1
        log.add(metrics, source, batch)
        stopping = stop.asked(done)
        last = done == train_steps or stopping
        if done % logging.period == 0 or last:
          skipped = int(state.skipped_in_row)  # waits for the step
          log.write(done)
          _check_skipped(skipped, max_skipped_in_row, done, model_dir)
        evaluated = None
        due = done % evaluation.period == 0 or done == train_steps
        if evaluator is not None and due:
          scores = evaluated = _evaluate(
            evaluator, model, state.params, teacher_params, log, done
          )
        if done % checkpoints.period == 0 or last:
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
      if evaluation.final_split:
        final = make_evaluator(split=evaluation.final_split)
        log.final(
          _final_scores(
            final, model, state.params, seed, evaluation.final_split
          )
        )
    return scores


def _batches(model, task, dataset, mesh, seed, model_dir):
  """Returns this process's training batches; their position can be saved."""
  lengths = dataset.task_feature_lengths
  rows = shards.rows_of_processes(
    partitioning.process_grid(mesh), dataset.batch_size
  )
  count = shards.count(
    dataset.shards,
    checkpoint_files.recorded_data_shards(model_dir),
    dataset.batch_size,
    rows,
  )
  iterator = data.TrainIterator(
    task,
    lengths,
    dataset.batch_size,
    seed=seed,
    converter=model.FEATURE_CONVERTER_CLS,
    pack=dataset.pack,
    share=shards.share(rows, jax.process_index(), dataset.batch_size, count),
    use_cached=dataset.use_cached,
  )
  if dataset.input_buckets:
    features = data.feature_lengths(
      model.FEATURE_CONVERTER_CLS, lengths, dataset.pack
    )
    iterator = data.CutInputs(iterator, dataset.input_buckets, features)
  return training.RolloutBatches(iterator, model, task, seed=seed, mesh=mesh)


def _eval_split(task, evaluation):
  """Returns the split of the evaluations, None for none; checks all splits."""
  split = evaluation.split
  # The default, which a task need not have; another one is meant.
  if split == "validation" and not data.has_split(task, split):
    print(
      f"no evaluation: {task.name} has no split {split!r}; set EVAL_SPLIT",
      flush=True,
    )
    split = None
  for setting, wanted in (
    ("EVAL_SPLIT", split),
    ("FINAL_EVAL_SPLIT", evaluation.final_split),
  ):
    if wanted is not None:
      data.tasks_with_split(task, wanted, setting=setting)
  return split


def _teacher_params(abstract, path):
  """Returns the teacher's parameters on their devices; {} without a teacher."""
  if not abstract:
    return {}
  return checkpoint_files.load_placed(
    path,
    abstract,
    _shardings(abstract),
    setting="TEACHER_CHECKPOINT_PATH",
    of="teacher",
  )


def _shardings(abstract):
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)


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


def _print_sizes(run, teacher_params):
  student = parameters.count_array_elements(run.state.params)
  student_bytes = partitioning.bytes_per_device(run.state)
  teacher = parameters.count_array_elements(teacher_params)
  teacher_bytes = partitioning.bytes_per_device(teacher_params)
  print(
    f"student {student:,} parameters ({student_bytes:,} bytes per device with"
    f" optimizer), teacher {teacher:,} parameters ({teacher_bytes:,} bytes per"
    f" device), {run.mesh.size} devices as {dict(run.mesh.shape)}",
    flush=True,
  )


def _first_params(model, path, run, seed):
  """Returns the student's first parameters on their devices: read, or drawn."""
  if path:
    return checkpoint_files.load_params(
      path, setting="INITIAL_CHECKPOINT_PATH", like=run.state.params
    )
  # As a program: the network that is applied for the sake of its parameters' shapes
  # is then left out.
  draw = jax.jit(
    lambda key: model.get_initial_variables(key, run.input_shapes)["params"]
  )
  params = draw(jax.random.key(seed))
  # By the host: every process draws the same, and places its part.
  return jax.tree.map(
    lambda x, leaf: jax.device_put(np.asarray(x, np.float32), leaf.sharding),
    dict(params),
    run.state.params,
  )


def _evaluate(evaluator, model, params, teacher_params, log, step):
  """Scores the student's greedy outputs and logs five of them."""
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
  """Returns scores of a whole split, greedy and sampled at temperature 1."""
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
