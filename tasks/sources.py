"""A seqio data source over columns of text that fit in memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

Columns = Mapping[str, Sequence[str]]


def read_text(path: str) -> str:
  """The text of a file, with U+FFFD in place of bytes that are not UTF-8.

  Prints the lines that have such bytes.
  """
  with tf.io.gfile.GFile(path, "rb") as file:
    content = file.read()
  try:
    return content.decode()
  except UnicodeDecodeError:
    text = content.decode(errors="replace")
    pairs = zip(text.split("\n"), content.split(b"\n"), strict=True)
    bad = [
      str(number)
      for number, (line, raw) in enumerate(pairs, start=1)
      if line.encode() != raw
    ]
    print(f"not UTF-8, read with U+FFFD: line {', '.join(bad)} of {path}")
    return text


class ColumnsDataSource(seqio.DataSource):
  """Examples held as columns of strings, read when first asked for.

  The dataset is `tf.data.Dataset.from_tensor_slices`, so the state of its
  iterator is only a position and goes into a checkpoint. A shuffle with a
  seed permutes all rows before TensorFlow sees them: exact, and the same on
  every host and after a resume.
  """

  def __init__(
    self, load_columns: Callable[[str], Columns], splits: Iterable[str]
  ):
    """Makes the source; nothing is read yet.

    Args:
      load_columns: From the name of a split to its columns, each a sequence of
        as many strings; called once for every use, so it should remember.
      splits: The names of the splits.
    """
    self._load_columns = load_columns
    super().__init__(splits=splits)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    """True: rows are dealt out one by one."""
    return True

  def num_input_examples(self, split: str) -> int:
    """The number of rows of `split`."""
    return len(next(iter(self._load_columns(split).values())))

  def list_shards(self, split: str) -> Sequence[str]:
    """One shard, named as the split."""
    return [split]

  def get_dataset(
    self,
    split: str = "train",
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused_kwargs,
  ) -> tf.data.Dataset:
    """The rows of `split` as dictionaries of scalar strings.

    Args:
      split: The name of the split.
      shuffle: Whether to permute the rows; has no effect without a seed, so
        that the order is always one that a resume can rebuild.
      seed: The seed of the permutation.
      shard_info: Which share of the rows, counted after the permutation.

    Returns:
      A dataset of one dictionary per row.

    Raises:
      ValueError: If the split has no rows, or its columns differ in length.
    """
    columns = {k: np.asarray(v) for k, v in self._load_columns(split).items()}
    sizes = {k: len(v) for k, v in columns.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
      raise ValueError(
        f"expected columns of one length above 0 for split {split!r}, got "
        f"{sizes}; set the source of the task"
      )
    if shuffle and seed is not None:
      order = np.random.default_rng(int(seed)).permutation(
        next(iter(sizes.values()))
      )
      columns = {k: v[order] for k, v in columns.items()}
    # TensorFlow's annotation leaves out nested structures.
    dataset = tf.data.Dataset.from_tensor_slices(columns)  # pyright: ignore[reportArgumentType]
    if shard_info is not None and shard_info.num_shards > 1:
      dataset = dataset.shard(shard_info.num_shards, shard_info.index)
    return dataset
