"""`gkd eval` of outputs that a test has written, and tasks to score them with."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf

from gkd_jax import decoding, infer, types

LENGTH = 96


class Outputs:
  """A model whose parameters `[n, T]` are its outputs, row by row of a split."""

  FEATURE_CONVERTER_CLS = "EncDecFeatureConverter"
  teacher = None
  special_tokens = types.T5_TOKENS
  decode_fn = staticmethod(decoding.sample)

  def __init__(self):
    self.default_decoder_params = {"temperature": 0.0}

  @property
  def student(self):
    return self

  def predict_batch_with_aux(self, params, batch, key, decoder_params):
    del key
    rows = jnp.minimum(decoder_params["row_ids"], len(params) - 1)
    tokens = params[rows]
    return tokens, {
      "scores": -rows.astype(jnp.float32),
      "lengths": jnp.sum(tokens > 0, axis=1),
      "ended": jnp.any(tokens == 1, axis=1),
    }

  def score_batch(self, params, batch):
    del params
    return -jnp.sum(batch["decoder_target_tokens"] > 0, axis=1)


@dataclasses.dataclass(frozen=True)
class Settings(infer.DecodeSettings):
  """`infer.DecodeSettings` with the outputs' texts for parameters."""

  outputs: tuple[str, ...] = ()

  def fitted(self, teacher_path=None):
    return self

  def load_params(self):
    encode = seqio.ByteVocabulary().encode
    rows = [[*encode(text), 1][:LENGTH] for text in self.outputs]
    return np.array([row + [0] * (LENGTH - len(row)) for row in rows], np.int32)


def add_task(name, columns, metric_fns, postprocess_fn=None, splits=("test",)):
  """Registers a task of bytes over columns of texts; returns its name."""

  def rows(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices(columns)

  feature = seqio.Feature(seqio.ByteVocabulary())
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(rows, splits=splits),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={"inputs": feature, "targets": feature},
    postprocess_fn=postprocess_fn,
    metric_fns=metric_fns,
  )
  return name


def evaluate(folder, task, outputs, **options):
  """Runs `gkd eval`; returns its metrics."""
  settings = Settings(
    model=Outputs(),
    checkpoint_path="unread",
    mixture_or_task_name=task,
    task_feature_lengths={"inputs": LENGTH, "targets": LENGTH},
    outputs=tuple(outputs),
  )
  return infer.evaluate_checkpoint(
    settings, eval_output_dir=str(folder), **options
  )
