"""Groups of settings of a training run; gin binds their fields to macros."""

import dataclasses
from collections.abc import Mapping, Sequence

from gkd_jax import checks


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
  """What a run trains on.

  Attributes:
    mixture_or_task_name: seqio task or mixture.
    task_feature_lengths: seqio feature to length in tokens.
    batch_size: rows of all devices and processes together.
    mixture_or_task_module: Python module that registers the task.
    pack: pack several examples into a row (fixed data only).
    input_buckets: ascending lengths that encoder inputs are cut to, see
      `data.CutInputs`; None cuts nothing.
    use_cached: read seqio's cache.
    shards: shards of the data, see `data.shards`. None: as few as the processes
      need, or as the run began with.
    save_position: checkpoints hold the position in the data. Without it a run
      that goes on begins the data anew, in another order.
  """

  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  batch_size: int
  mixture_or_task_module: str | None = None
  pack: bool = False
  input_buckets: Sequence[int] | None = None
  use_cached: bool = False
  shards: int | None = None
  save_position: bool = True

  def __post_init__(self):
    checks.text(self.mixture_or_task_name, "MIXTURE_OR_TASK_NAME")
    checks.text(
      self.mixture_or_task_module, "MIXTURE_OR_TASK_MODULE", none=True
    )
    checks.lengths(self.task_feature_lengths, "TASK_FEATURE_LENGTHS")
    checks.whole(self.batch_size, "BATCH_SIZE")
    checks.boolean(self.pack, "PACK")
    checks.ascending(self.input_buckets, "INPUT_BUCKETS")
    checks.boolean(self.use_cached, "USE_CACHED_TASKS")
    checks.whole(self.shards, "DATA_SHARDS", none=True)
    checks.boolean(self.save_position, "SAVE_DATA_POSITION")


@dataclasses.dataclass(frozen=True)
class PartitionerConfig:
  """How a step is split over devices and in time.

  Attributes:
    executor: "jit" (a mesh) or "pmap" (data parallel).
    num_partitions: devices of the model axis.
    num_slices: parts of the devices that exchange gradients only; None: as many
      as the TPUs are in. See `partitioning.make_mesh`.
    shard_params_over_data: shard parameters and optimizer state over the data
      axis too, within each slice.
    num_microbatches: parts of a batch whose gradients are added up.
  """

  executor: str = "jit"
  num_partitions: int = 1
  num_slices: int | None = None
  shard_params_over_data: bool = False
  num_microbatches: int = 1

  def __post_init__(self):
    checks.one_of(self.executor, "EXECUTOR", ("jit", "pmap"))
    checks.whole(self.num_partitions, "NUM_PARTITIONS")
    checks.whole(self.num_slices, "NUM_SLICES", none=True)
    checks.boolean(self.shard_params_over_data, "SHARD_PARAMS_OVER_DATA")
    checks.whole(self.num_microbatches, "NUM_MICROBATCHES")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """When and on what the student is evaluated.

  Attributes:
    period: steps between evaluations.
    split: of the evaluations. None: there are none.
    batch_size: rows decoded at a time.
    num_examples: examples of the split that are used, None for all.
    final_split: after the last step this whole split is decoded greedily and by
      sampling at temperature 1, for `final.json`; None: neither.
    errors_stop: an evaluation that fails ends the run; otherwise it is reported
      and counted.
  """

  period: int = 1000
  split: str | None = "validation"
  batch_size: int = 256
  num_examples: int | None = 1000
  final_split: str | None = None
  errors_stop: bool = False

  def __post_init__(self):
    checks.whole(self.period, "EVAL_PERIOD")
    checks.whole(self.batch_size, "EVAL_BATCH_SIZE")
    checks.whole(self.num_examples, "EVAL_NUM_EXAMPLES", none=True)
    checks.text(self.split, "EVAL_SPLIT", none=True)
    checks.text(self.final_split, "FINAL_EVAL_SPLIT", none=True)
    checks.boolean(self.errors_stop, "EVAL_ERRORS_STOP")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Which checkpoints a run writes and keeps.

  Attributes:
    period: steps between checkpoints.
    keep: newest checkpoints that are kept.
    best_metric: of the task's metrics; its best checkpoint is kept as well.
    best_mode: "min" or "max".
  """

  period: int = 1000
  keep: int = 3
  best_metric: str | None = None
  best_mode: str = "min"

  def __post_init__(self):
    checks.whole(self.period, "CHECKPOINT_PERIOD")
    checks.whole(self.keep, "CHECKPOINTS_TO_KEEP")
    checks.text(self.best_metric, "BEST_METRIC", none=True)
    checks.one_of(self.best_mode, "BEST_MODE", ("min", "max"))


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What a run reports while it trains.

  Attributes:
    period: steps between log lines.
    profile_steps: (first, last) step of a `jax.profiler` trace, which is written
      into MODEL_DIR; None: no trace.
    wandb_project: Weights & Biases project that metrics go to as well.
  """

  period: int = 50
  profile_steps: tuple[int, int] | None = None
  wandb_project: str | None = None

  def __post_init__(self):
    checks.whole(self.period, "LOG_PERIOD")
    checks.steps(self.profile_steps, "PROFILE_STEPS")
    checks.text(self.wandb_project, "WANDB_PROJECT", none=True)
