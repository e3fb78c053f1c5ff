"""Training from stored log-probs against training with the teacher in memory.

End to end: log-probs written to shards, a task over them, seqio's converter, and
the step; at k = V nothing may be lost.
"""

import functools

import jax
import numpy as np
import optax
import pytest
import seqio
import tensorflow as tf
import toy_decoder_only
import toy_models

from gkd_jax import data, evaluation, models, optimizers, schedules, training
from gkd_jax.data import feature_converters
from gkd_jax.evaluation import teacher_data
from gkd_jax.tasks import distilled

VOCAB = toy_models.VOCAB
LENGTHS = {"inputs": 6, "targets": 7}
ROWS = 8


@pytest.fixture(name="task", scope="module")
def _task():
  """Token ids of every length, the targets up to EOS or cut."""
  batch = toy_models.batch(ROWS)
  rows = {
    name: [row[row > 0].tolist() for row in batch[feature]]
    for name, feature in (
      ("inputs", "encoder_input_tokens"),
      ("targets", "decoder_target_tokens"),
    )
  }

  def dataset(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    spec = {k: tf.TensorSpec([None], tf.int32) for k in rows}
    examples = [
      dict(zip(rows, x, strict=True)) for x in zip(*rows.values(), strict=True)
    ]
    return tf.data.Dataset.from_generator(
      lambda: iter(examples), output_signature=spec
    )

  feature = seqio.Feature(seqio.PassThroughVocabulary(VOCAB), add_eos=False)
  yield seqio.TaskRegistry.add(
    "token_rows",
    source=seqio.FunctionDataSource(dataset, splits=("train", "test")),
    preprocessors=[],
    output_features={"inputs": feature, "targets": feature},
  )
  for name in [*seqio.TaskRegistry.names()]:
    if name.startswith("token_rows"):
      seqio.TaskRegistry.remove(name)


def stored_batches(task, folder, teacher, params, **settings):
  """Returns an iterator over a teacher's stored log-probs, as training has it."""
  prefix = str(folder / "distributions")
  teacher_data.write(
    teacher,
    jax.tree.map(np.asarray, dict(params)),
    task,
    LENGTHS,
    prefix,
    evaluation.Shards(num_shards=2, **settings),
    split="train",
    batch_size=8,
    temperature=1.0,
  )
  name = f"token_rows_{folder.name}"
  over = distilled.add_distilled_task(name, prefix, task.name)
  return lambda converter: data.TrainIterator(
    over, LENGTHS, ROWS, seed=1, converter=converter
  )


def run(model, student_params, teacher_params, batches, steps=4):
  """Losses and norms of the gradient of a few steps of SGD, `[steps, 2]`."""
  optimizer = optimizers.Optimizer(schedules.constant(0.1), optax.sgd(1.0))
  state = training.create(student_params, optimizer.transform)
  step = jax.jit(
    functools.partial(
      training.train_step,
      model=model,
      optimizer=optimizer,
      seed=0,
      source=model.source_of_step(0, 0),
      num_microbatches=2,
    )
  )
  result = []
  for _ in range(steps):
    state, metrics = step(state, teacher_params, next(batches))
    result.append([float(metrics[k][0]) for k in ("loss", "gradient_norm")])
  return np.array(result)


CASES = {
  "encoder-decoder": (toy_models, {}, "TopKEncDecFeatureConverter"),
  "decoder": (toy_decoder_only, {}, "TopKDecoderFeatureConverter"),
}


# tests/losses/test_stored_targets.py has the loss of a full top-k.
@pytest.mark.nightly
@pytest.mark.parametrize(
  ("kind", "targets", "options"),
  [
    ("encoder-decoder", "references", {"divergence": "jsd", "beta": 0.3}),
    (
      "decoder",
      "outputs",
      {"divergence": "reverse_kl", "length_normalization": "token"}
      | {"hard_label_weight": 0.3},
    ),
  ],
)
def test_full_top_k_trains_as_the_teacher_in_memory(
  task, tmp_path, kind, targets, options
):
  toy, _, converter = CASES[kind]
  gkd, student_params, teacher_params = toy.gkd(
    dropout_rate=0.1,
    student_data_fraction=0.0,
    student_temperature=0.8,
    teacher_temperature=1.5,
    **options,
  )
  batches = stored_batches(
    task,
    tmp_path,
    gkd.teacher,
    teacher_params,
    targets=targets,
    top_k=VOCAB,
    top_k_dtype="float32",
    teacher_temperature=1.5,
  )
  # A schedule that never moves.
  line = schedules.linear(0.8, 0.8, 1)
  stored = models.StoredTeacherModel(
    gkd.student, student_temperature=line, **options
  )
  assert stored.teacher is None
  assert converter == stored.FEATURE_CONVERTER_CLS
  got = run(stored, student_params, {}, batches(stored.FEATURE_CONVERTER_CLS))
  expected = run(
    gkd, student_params, teacher_params, batches(gkd.FEATURE_CONVERTER_CLS)
  )
  assert np.ptp(expected[:, 0]) > 1e-2 * expected[0, 0]
  np.testing.assert_allclose(got[:, 0], expected[:, 0], rtol=1e-5)
  # Gradients of float32 logits that are summed in another order.
  np.testing.assert_allclose(got[:, 1], expected[:, 1], rtol=1e-4)


def test_where_log_probs_stand_in_a_row(task):
  """Behind the prompt in a decoder, trimmed with the targets in both."""
  example = {
    "inputs": [9, 4, 1],
    "targets": [3, 5, 1],
    "top_k_ids": [[3, 2], [5, 6], [1, 7]],
    "top_k_log_probs": [
      [-1.0, -2.0, -3.0],
      [-4.0, -5.0, -6.0],
      [-7.0, -8.0, -9.0],
    ],
  }
  ints = tf.int32
  dataset = tf.data.Dataset.from_tensors(
    {
      k: tf.constant(v, tf.float32 if "log" in k else ints)
      for k, v in example.items()
    }
  )
  make = lambda name, lengths: next(
    data.feature_converter(name, pack=False)(
      dataset, lengths
    ).as_numpy_iterator()
  )
  row = make("TopKEncDecFeatureConverter", {"inputs": 4, "targets": 5})
  np.testing.assert_array_equal(
    row["top_k_ids"], [*example["top_k_ids"], [0, 0], [0, 0]]
  )
  row = make("TopKDecoderFeatureConverter", {"inputs": 4, "targets": 3})
  none = [[0, 0]] * 3
  np.testing.assert_array_equal(
    row["top_k_ids"], [*none, *example["top_k_ids"], [0, 0]]
  )
  np.testing.assert_array_equal(
    row["decoder_target_tokens"], [9, 4, 1, 3, 5, 1, 0]
  )
  np.testing.assert_array_equal(
    row["top_k_log_probs"][3:6], example["top_k_log_probs"]
  )
  with pytest.raises(ValueError, match="set PACK = False"):
    data.feature_converter("TopKEncDecFeatureConverter", pack=True)
  with pytest.raises(ValueError, match="write them with TOP_K"):
    feature_converters.TopKEncDecFeatureConverter()(
      task.get_dataset(split="train"), LENGTHS
    )


def test_what_cannot_be_stored_is_told():
  student = toy_models.model(8)
  make = functools.partial(models.StoredTeacherModel, student)
  for options, message in (
    ({"divergence": "jsd"}, "set BETA"),
    ({"divergence": "jds"}, "set DIVERGENCE"),
    ({"student_temperature": 0.0}, "set STUDENT_TEMPERATURE"),
    ({"length_normalization": "row"}, "set LENGTH_NORMALIZATION"),
    ({"hard_label_weight": 1.5}, "got 1.5; set HARD_LABEL_WEIGHT"),
  ):
    with pytest.raises(ValueError, match=message):
      make(**options)
  with pytest.raises(ValueError, match="expected source 'data'"):
    make().train_loss({}, {}, {}, toy_models.inputs(models.STUDENT))
  other = toy_decoder_only.model(
    feature_converter_cls=seqio.PrefixLMFeatureConverter
  )
  with pytest.raises(ValueError, match="set STUDENT_MODEL"):
    _ = models.StoredTeacherModel(other).FEATURE_CONVERTER_CLS
