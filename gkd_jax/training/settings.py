"""Groups of settings of a training run; gin binds their fields to macros."""

import dataclasses
from collections.abc import Mapping, Sequence


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
  """

  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  batch_size: int
  mixture_or_task_module: str | None = None
  pack: bool = False
  input_buckets: Sequence[int] | None = None
  use_cached: bool = False
  shards: int | None = None


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
  """

  period: int = 1000
  split: str | None = "validation"
  batch_size: int = 256
  num_examples: int | None = 1000
  final_split: str | None = None


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
