"""The training script: build, restore, loop, evaluate, save.

Reads top to bottom. Everything that it needs is an argument; gin binds them.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gkd_jax import (
  architectures,
  checks,
  data,
  files,
  optimizers,
  partitioning,
  training,
)
from gkd_jax import checkpoints as checkpoint_files
from gkd_jax.data import shards, tokenizer_folders
from gkd_jax.evaluation import run_evaluations
from gkd_jax.training import messages, preflight, teacher_check


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
  config: str = "",
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
    config: all settings as text, for `MODEL_DIR/config.gin`.
    dry_run: build everything, print sizes, and stop.

  Returns:
    The last evaluation's metrics.

  Raises:
    training.Stopped: SIGTERM or Ctrl-C came, and the step is saved.
  """
  # ---- build: what can be wrong is found here, before compiling ------------
  training.check_parts(model, optimizer)
  checks.path(model_dir, "MODEL_DIR")
  files.check_folder(model_dir, "MODEL_DIR")
  checks.whole(train_steps, "TRAIN_STEPS")
  checks.path(initial_checkpoint_path, "INITIAL_CHECKPOINT_PATH", none=True)
  checks.path(
    teacher_checkpoint_path,
    "TEACHER_CHECKPOINT_PATH",
    none=model.teacher is None,
  )
  checks.whole(seed, "SEED", least=0)
  checks.whole(max_skipped_in_row, "MAX_SKIPPED_IN_ROW")
  model_dir = os.fspath(files.absolute(model_dir))
  task = data.load_task(
    dataset.mixture_or_task_name, dataset.mixture_or_task_module
  )
  evaluation = dataclasses.replace(
    evaluation, split=_eval_split(task, evaluation)
  )
  _check_sizes(model, initial_checkpoint_path, teacher_checkpoint_path)
  stated = _stated_tokens(
    model, model_dir, initial_checkpoint_path, teacher_checkpoint_path
  )
  model = data.fitted(model, task, stated)
  run = training.build(model, optimizer, dataset, partitioner, seed=seed)
  start = checkpoint_files.newest_step(model_dir) or 0
  if _is_finished(model_dir, start, train_steps, evaluation) and not dry_run:
    print(f"already at step {start} of {train_steps}: nothing to do")
    return checkpoint_files.saved_metrics(model_dir, start)
  examples = _examples(model, task, dataset, run.mesh, seed, model_dir, start)
  batch = preflight.draw(examples)
  if set(model.sources) != {"student"}:
    data.check_targets(
      task,
      "train",
      dataset.task_feature_lengths,
      use_cached=dataset.use_cached,
      otherwise="STUDENT_DATA_FRACTION = 1.0 of runs/gkd.gin",
    )
  judged = preflight.try_reward(model, task, batch)
  teacher_params = _teacher_params(run.teacher, teacher_checkpoint_path)
  evaluations = run_evaluations.RunEvaluations(
    model,
    teacher_params,
    task=task,
    dataset=dataset,
    settings=evaluation,
    mesh=run.mesh,
    best_metric=checkpoints.best_metric,
  )
  found = preflight.table(run, model, dataset, teacher_params, batch)
  found += judged + evaluations.table()

  # ---- where the parameters come from: resume > initial > drawn ------------
  # Before the checkpointer opens: a wrong path leaves no threads of it behind.
  params, warnings = None, []
  check_teacher = functools.partial(
    preflight.check_teacher,
    model,
    run,
    teacher_params=teacher_params,
    batch=batch,
    same_asked=initial_checkpoint_path == teacher_checkpoint_path,
  )
  if not start:
    params = _first_params(model, initial_checkpoint_path, run, seed)
    rows, warnings = check_teacher(params)
    found += rows
  if jax.process_index() == 0:
    print(preflight.text(found, evaluations.warnings + warnings), flush=True)
  if dry_run:
    return {}
  batches = training.RolloutBatches(
    examples, model, task, seed=seed, mesh=run.mesh
  )
  with (
    training.RunLock(model_dir),
    # Closed whatever happens: an error leaves no threads that write on.
    contextlib.closing(
      checkpoint_files.Checkpointer(
        model_dir,
        keep=checkpoints.keep,
        best_metric=checkpoints.best_metric,
        best_mode=checkpoints.best_mode,
      )
    ) as checkpointer,
  ):
    if params is None:
      state = checkpointer.restore(start, run.state, batches)
      print(f"resumed {model_dir} at step {start}", flush=True)
      # The teacher's folder may hold another one by now.
      said = preflight.text(*check_teacher(state.params))
      if said and jax.process_index() == 0:
        print(said, flush=True)
    else:
      state = jax.jit(
        functools.partial(training.create, transform=optimizer.transform),
        out_shardings=_shardings(run.state),
      )(params)
    training.update_settings(model_dir, config)
    _keep_tokenizer(task, model_dir)

    # ---- the loop ------------------------------------------------------------
    save = functools.partial(
      checkpointer.save,
      dataset_iterator=batches,
      config=dataclasses.asdict(model.config),
      special_tokens=model.student.special_tokens,
    )
    scores: Mapping[str, float] = {}
    heard: set[str] = set()
    with (
      training.TrainLog(
        model_dir, start, train_steps, wandb_project=logging.wandb_project
      ) as log,
      training.Profiler(model_dir, logging.profile_steps) as profiler,
    ):
      with training.StopSignal() as stop:
        for step in range(start, train_steps):
          source = model.source_of_step(seed, step)
          batch = batches.next(step, state.params)
          training.check_targets(batch, source, step)
          profiler.before(step)
          state, metrics = run.step(
            state, teacher_params, run.put(batch), source=source
          )
          profiler.after(step, metrics)
          done = step + 1
          log.add(metrics, source, batch)
          if source not in heard:  # the first step of a start with this source
            heard.add(source)
            for line in teacher_check.of_step(model, metrics, source, done):
              log.say(line)
          stopping = stop.asked(done)
          last = done == train_steps or stopping
          if done % logging.period == 0 or last:
            skipped = int(state.skipped_in_row)  # waits for the step
            log.write(done)
            if skipped >= max_skipped_in_row:
              raise FloatingPointError(
                messages.not_finite(
                  model_dir, done, skipped, metrics, checkpointer.latest_step()
                )
              )
          # The checkpoint first: an evaluation that fails costs no step.
          if done % checkpoints.period == 0 or last:
            save(done, state)
          if stopping:
            checkpointer.wait()
            log.say(messages.interrupted(model_dir, done))
            raise training.Stopped(stop.number)
          if done % evaluation.period == 0 and not last:
            scores = evaluations.at(done, state.params, log)
            recorded = checkpointer.record(done, scores)
            if not recorded and checkpointer.is_best(scores):
              save(done, state, metrics=scores)
      scores = evaluations.at(train_steps, state.params, log)
      checkpointer.record(train_steps, scores)
      evaluations.final(state.params, seed, log)
      log.say(
        messages.finished(
          model_dir,
          train_steps,
          evaluations.failed,
          scored=evaluation.final_split is not None,
        )
      )
    return scores


def _keep_tokenizer(task, model_dir):
  """Copies the tokenizer's files, so that what reads the run finds them."""
  path = tokenizer_folders.path_of(data.target_vocabulary(task))
  if path is not None and jax.process_index() == 0:
    tokenizer_folders.copy(path, model_dir)


def _check_sizes(model, initial_path, teacher_path):
  """Refuses sizes that differ from what a checkpoint's folder says."""
  for setting, part, path_setting, path in (
    ("STUDENT", model.student, "INITIAL_CHECKPOINT_PATH", initial_path),
    ("TEACHER", model.teacher, "TEACHER_CHECKPOINT_PATH", teacher_path),
  ):
    if part is not None and path is not None:
      architectures.check_equal(
        part.config, path, setting=setting, path_setting=path_setting
      )


def _stated_tokens(model, model_dir, initial_path, teacher_path):
  """Returns what the run's checkpoints say; see `data.fitted`."""
  paths = {"INITIAL_CHECKPOINT_PATH": initial_path}
  if checkpoint_files.has_checkpoint(model_dir):
    paths = {"MODEL_DIR": model_dir}
  if model.teacher is not None:
    paths["TEACHER_CHECKPOINT_PATH"] = teacher_path
  return {
    name: checkpoint_files.load_special_tokens(path, setting=name)
    for name, path in paths.items()
    if path
  }


def _is_finished(model_dir, step, train_steps, evaluation):
  """Returns whether a run is at its end, its last evaluation included."""
  final = files.absolute(model_dir) / "final.json"
  return step > train_steps or (
    step == train_steps
    and (
      not evaluation.split or checkpoint_files.saved_metrics(model_dir, step)
    )
    and (not evaluation.final_split or final.exists())
  )


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


def _examples(model, task, dataset, mesh, seed, model_dir, start):
  """Returns this process's training batches; their position can be saved."""
  recorded = None
  if dataset.save_position:
    recorded = checkpoint_files.recorded_data_shards(model_dir)
  elif start:  # another order than that of the examples already seen
    seed = int(np.random.default_rng([seed, start]).integers(2**31))
  lengths = dataset.task_feature_lengths
  rows = shards.rows_of_processes(
    partitioning.process_grid(mesh), dataset.batch_size
  )
  count = shards.count(dataset.shards, recorded, dataset.batch_size, rows)
  iterator = data.TrainIterator(
    task,
    lengths,
    dataset.batch_size,
    seed=seed,
    converter=model.FEATURE_CONVERTER_CLS,
    special_tokens=model.student.special_tokens,
    pack=dataset.pack,
    share=shards.share(rows, jax.process_index(), dataset.batch_size, count),
    use_cached=dataset.use_cached,
    save_position=dataset.save_position,
  )
  if dataset.input_buckets:
    features = data.feature_lengths(
      model.FEATURE_CONVERTER_CLS,
      lengths,
      dataset.pack,
      model.student.special_tokens,
    )
    iterator = data.CutInputs(iterator, dataset.input_buckets, features)
  return iterator


def _teacher_params(abstract, path):
  """Returns the teacher's parameters on their devices; {} without a teacher."""
  if not abstract:
    return {}
  setting = "TEACHER_CHECKPOINT_PATH"
  params = checkpoint_files.load_placed(
    path, abstract, _shardings(abstract), setting=setting, of="teacher"
  )
  checkpoint_files.check_finite(
    params, of="teacher", path=path, remedy=f"set {setting}"
  )
  return params


def _shardings(abstract):
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _first_params(model, path, run, seed):
  """Returns the student's first parameters on their devices: read, or drawn."""
  if path:
    setting = "INITIAL_CHECKPOINT_PATH"
    params = checkpoint_files.load_params(
      path, setting=setting, like=run.state.params
    )
    checkpoint_files.check_finite(
      params, of="student", path=path, remedy=f"set {setting}"
    )
    return params
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
