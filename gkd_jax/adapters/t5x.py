"""GKD under T5X's own trainer.

`python -m t5x.train --gin_file=gin/t5x/gkd.gin` trains with T5X's partitioner,
checkpoints, data pipeline and evaluation. This module replaces two of its
classes: the model, which holds a teacher's network beside the student's, and
the trainer, whose step has the teacher's parameters as an argument of their
own. The loss, the sampler and the coin of λ are those of `models.GKDModel`.

T5X is not on PyPI; `docs/from_t5x.md` says how to install it. This is the only
module that imports it.
"""

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics

from gkd_jax import checkpoints, losses, models, types

try:
  from t5x import metrics as t5x_metrics
  from t5x import models as t5x_models
  from t5x import partitioning, utils
  from t5x import trainer as t5x_trainer
except ModuleNotFoundError as error:
  raise ImportError(
    "expected T5X for gkd_jax.adapters.t5x, got no module named"
    f" {error.name!r}; install it with `pip install 'gkd_jax[t5x]'` and `pip"
    " install --no-deps git+https://github.com/google-research/t5x@cc342d4"
    " git+https://github.com/google/airio@69897df"
    " git+https://github.com/google-research/jestimator@326824a`"
  ) from error
# A parameter's shape does not depend on the lengths of a batch.
_ANY_SHAPES = {
  "encoder_input_tokens": (1, 8),
  "decoder_input_tokens": (1, 8),
}
# Metrics of the student's samples; a step on fixed data has none.
_SAMPLE_METRICS = ("sampled_length", "sampled_eos", "on_policy_share")


class Network(models.EncoderDecoderModel):
  """A network of T5X's examples, with the methods that `GKDModel` calls."""

  def start_decoding(
    self,
    params: Any,
    encoded: jax.Array,
    batch: types.Batch,
    *,
    num_decodes: int = 1,
    slots: int | None = None,
  ) -> tuple[types.TokensToLogits, types.PyTree, dict[str, Any]]:
    """Returns the decode step and T5X's empty cache of the batch's rows.

    Raises:
      ValueError: several decodes or slots, which T5X's cache has no room for.
    """
    if num_decodes != 1 or slots is not None:
      raise ValueError(
        "expected one decode per row and no slots under T5X's trainer, got"
        f" {num_decodes} and {slots}; set decode_slots = None"
      )
    inputs = batch["encoder_input_tokens"]
    length = batch["decoder_target_tokens"].shape[1]
    whole = jnp.ones((inputs.shape[0], length), jnp.int32)
    # T5X's attention makes its cache as long as the first call with
    # `decode=True`; of that call nothing but the empty cache is computed.
    _, variables = self.module.apply(
      {"params": params},
      inputs,
      whole,
      whole,
      decode=True,
      enable_dropout=False,
      mutable=["cache"],
    )

    def step(tokens, cache):
      logits, updated = self.module.apply(
        {"params": params, "cache": cache},
        encoded,
        inputs,
        tokens[:, None],
        tokens[:, None],
        decode=True,
        enable_dropout=False,
        max_decode_length=length,
        mutable=["cache"],
        method="decode",
      )
      return logits[:, 0], updated["cache"]

    return step, variables["cache"], {}


class GKDEncoderDecoderModel(t5x_models.EncoderDecoderModel):
  """T5X's encoder-decoder model with a teacher's network.

  Its parameters, its evaluation and its checkpoints are those of the student,
  whose protocol it inherits. Train it with `GKDTrainer`.

  Args:
    module: the student's network, with T5X's call.
    output_vocabulary: seqio vocabulary; its EOS ends the student's samples.
    teacher_module: the teacher's network, with T5X's call.
    **options: of T5X's model, whose decoding and loss serve the evaluation
      alone; and of `models.GKDModel`: `divergence`, `beta`,
      `student_data_fraction` and the rest.

  Raises:
    ValueError: as `models.GKDModel`.
  """

  def __init__(
    self,
    *,
    module: Any,
    output_vocabulary: Any,
    teacher_module: Any,
    **options: Any,
  ):
    names = inspect.signature(t5x_models.EncoderDecoderModel).parameters
    of_t5x = {k: v for k, v in options.items() if k in names}
    super().__init__(
      module=module, output_vocabulary=output_vocabulary, **of_t5x
    )
    self.teacher = Network(teacher_module, output_vocabulary=output_vocabulary)
    self._gkd_options = {k: v for k, v in options.items() if k not in names}
    self.gkd  # noqa: B018  wrong settings are met here, not in the first step

  @property
  def gkd(self) -> models.GKDModel:
    """The student, the teacher and the divergence between them."""
    # Made anew: T5X may replace `module` (of scanned layers) after the start.
    return models.GKDModel(
      Network(self.module, output_vocabulary=self.output_vocabulary),
      self.teacher,
      # T5X's networks return logits and not what they are made of.
      **{"loss_chunk_size": 0} | self._gkd_options,
    )

  def loss_fn(
    self, params: Any, batch: types.Batch, dropout_rng: jax.Array | None
  ) -> tuple[jax.Array, Mapping[str, Any]]:
    """Cross-entropy on the data, for T5X's evaluation only.

    Raises:
      ValueError: with a dropout key, which says that a trainer calls.
    """
    if dropout_rng is not None:
      raise ValueError(
        "expected GKDTrainer to train a GKDEncoderDecoderModel, got a trainer"
        " that takes the cross-entropy on the data as its loss; set"
        " train.trainer_cls = @GKDTrainer"
      )
    return super().loss_fn(params, batch, None)


class GKDTrainer(t5x_trainer.Trainer):
  """T5X's trainer with the teacher's parameters as an argument of the step.

  They are partitioned like the student's, and are neither donated, nor in the
  train state, nor in what T5X saves. Whose outputs a step trains on is decided
  on the host from (seed, step); each source has a compiled step of its own.

  Args:
    model: a `GKDEncoderDecoderModel`.
    partitioner: T5X's.
    teacher_checkpoint_path: anything that `checkpoints.load_params` reads.
    seed: of the coin of λ, of samples and of dropout.
    teacher_partitioner: partitioner whose rules say how the teacher lies on
      the mesh; the student's by default.
    **trainer_options: of T5X's trainer. Its `rng` is not read by the step, which
      derives its keys from (seed, step).

  Raises:
    ValueError: another model, no seed, or as `checkpoints.load_placed`.
  """

  def __init__(
    self,
    *,
    model: GKDEncoderDecoderModel,
    partitioner: partitioning.BasePartitioner,
    teacher_checkpoint_path: str,
    seed: int,
    teacher_partitioner: partitioning.BasePartitioner | None = None,
    **trainer_options: Any,
  ):
    if not isinstance(model, GKDEncoderDecoderModel):
      raise ValueError(
        "expected a GKDEncoderDecoderModel for GKDTrainer, got"
        f" {type(model).__name__}; set MODEL"
      )
    if not isinstance(seed, int):
      raise ValueError(
        "expected a whole number that the coin of λ is drawn from, got"
        f" {seed!r}; set RANDOM_SEED"
      )
    super().__init__(model=model, partitioner=partitioner, **trainer_options)
    self._seed = seed
    self._host_step = 0
    self._step = functools.cache(self._partition)
    self._compiled: dict[str, Callable] = {}
    self._teacher_axes, self.teacher_params = _place_teacher(
      model.teacher,
      teacher_checkpoint_path,
      teacher_partitioner or partitioner,
      partitioner.mesh,
    )

  def train(
    self,
    batch_iter: Iterator,
    num_steps: int,
    start_step: int | None = None,
  ) -> Any:
    """See T5X; counts steps on the host, where the coin is drawn."""
    if start_step is None:
      start_step = int(self.train_state.step)
    self._host_step = start_step
    return super().train(batch_iter, num_steps, start_step)

  def compile_train(self, batch: types.Batch) -> None:
    """Compiles a step for each source that the run can need."""
    start = time.time()
    for source in self._model.gkd.sources:
      self._compiled[source] = self._partitioner.compile(
        self._step(source), self.train_state, self.teacher_params, batch
      )
    self.train_metrics_manager.write_scalar(
      "timing/compilation_seconds", time.time() - start, self.train_state.step
    )

  @property
  def _partitioned_train_step(self) -> Callable:
    """What T5X's loop calls at each step."""
    return self._step_by_coin

  def _step_by_coin(self, train_state, batch):
    source = self._model.gkd.source_of_step(self._seed, self._host_step)
    self._host_step += 1
    step = self._compiled.get(source) or self._step(source)
    return step(train_state, self.teacher_params, batch)

  def _partition(self, source: str) -> Callable:
    """The partitioned step: (state, teacher, batch) -> (state, metrics)."""
    spec = self._partitioner.data_partition_spec
    return self._partitioner.partition(
      functools.partial(self._train_step, source),
      in_axis_resources=(self._train_state_axes, self._teacher_axes, spec),
      out_axis_resources=(self._train_state_axes, None),
      donate_argnums=(0,),
    )

  def _train_step(self, source, train_state, teacher_params, batch):
    step = train_state.step
    key = jax.random.fold_in(jax.random.key(self._seed), step)
    rows = batch["encoder_input_tokens"].shape[0]
    grads, metrics, _ = t5x_trainer.accumulate_grads_microbatched(
      _SumOfLosses(self._model.gkd, teacher_params, source, step, key),
      train_state,
      # So that a row's sample does not depend on its microbatch.
      dict(batch) | {"row_ids": jnp.arange(rows)},
      key,
      self._num_microbatches,
      self._partitioner.data_partition_spec,
    )
    # T5X adds up the gradients of microbatches; their losses are sums here,
    # and the whole batch's weight divides once. Without any target it is 0,
    # and the loss NaN.
    grads = jax.tree.map(lambda g: g / metrics["loss"].count, grads)
    norm = optax.tree.norm(grads)
    new_state, metrics = t5x_trainer.apply_grads(
      train_state,
      grads,
      metrics,
      self._learning_rate_fn(step),
      self._weight_metrics_computer,
    )
    finite = jnp.isfinite(metrics["loss"].total) & jnp.isfinite(norm)
    kept = train_state.replace_step(new_state.step)
    new_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), new_state, kept
    )
    skipped = jnp.logical_not(finite).astype(jnp.float32)
    metrics |= {
      "gradient_norm": clu_metrics.Average(norm, jnp.ones(())),
      "skipped_updates": t5x_metrics.Sum(skipped),
      "timing/steps_per_second": t5x_metrics.StepsPerTime.from_model_output(),
      "timing/seqs_per_second": t5x_metrics.TimeRate.from_model_output(
        numerator=rows
      ),
    }
    return new_state, metrics


class _SumOfLosses:
  """What T5X differentiates: `loss_fn` returns the sum over a microbatch."""

  def __init__(self, gkd, teacher_params, source, step, key):
    self._gkd, self._teacher_params = gkd, teacher_params
    self._source, self._step, self._key = source, step, key

  def loss_fn(self, params, batch, dropout_rng):
    # T5X's key is another one for each microbatch, this step's is not.
    del dropout_rng
    batch = dict(batch)
    row_ids = batch.pop("row_ids")
    inputs = types.StepInputs(self._source, self._step, self._key, row_ids)
    loss, metrics = self._gkd.train_loss(
      params, self._teacher_params, batch, inputs
    )
    # T5X merges the metrics of steps name by name: all have the same names.
    zero = jnp.zeros(())
    if self._gkd.hard_label_weight:
      metrics.setdefault(losses.HARD_LABELS, (zero, zero))
    if len(self._gkd.sources) > 1 and self._source == models.DATA:
      present = jnp.any(batch["encoder_input_tokens"] > 0, axis=1)
      metrics |= {name: (zero, zero) for name in _SAMPLE_METRICS}
      metrics["on_policy_share"] = (zero, jnp.sum(present.astype(jnp.float32)))
    return loss, {k: clu_metrics.Average(*v) for k, v in metrics.items()}


def _place_teacher(teacher, path, partitioner, mesh):
  """The teacher's partition specs, and its parameters laid out by them."""
  initializer = utils.TrainStateInitializer(
    optimizer_def=None,
    init_fn=teacher.get_initial_variables,
    input_shapes=_ANY_SHAPES,
    partitioner=partitioner,
  )
  axes = initializer.train_state_axes.params
  axes = axes.unfreeze() if hasattr(axes, "unfreeze") else dict(axes)
  abstract = initializer.global_train_state_shape.params
  abstract = abstract.unfreeze() if hasattr(abstract, "unfreeze") else abstract
  shardings = jax.tree.map(
    lambda spec: jax.sharding.NamedSharding(mesh, spec),
    axes,
    is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
  )
  return axes, checkpoints.load_placed(
    path,
    abstract,
    shardings,
    setting="TEACHER_CHECKPOINT_PATH",
    of="teacher",
  )
