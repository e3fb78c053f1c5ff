"""A teacher's outputs in shards: what is in them, and how they come about."""

import dataclasses
import functools
import os

import jax
import loss_batches
import numpy as np
import pytest
import seqio
import tensorflow as tf
import toy_models

from gkd_jax import data, decoding, evaluation, infer, models, network
from gkd_jax.evaluation import teacher_data
from gkd_jax.tasks import teacher_shards

LENGTHS = {"inputs": 10, "targets": 8}
EXAMPLES = 20


@functools.cache
def toy():
  """A model for `arithmetic_cot_1k`, its parameters, and the task."""
  config = network.T5Config(
    vocab_size=24,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.0,
  )
  model = models.EncoderDecoderModel(
    network.Transformer(config), num_real_tokens=20
  )
  shapes = {
    "encoder_input_tokens": (1, LENGTHS["inputs"]),
    "decoder_input_tokens": (1, LENGTHS["targets"]),
  }
  params = toy_models.initial_params(model, 3, shapes, 2)
  return model, params, data.load_task("arithmetic_cot_1k")


@functools.cache
def features():
  """Model features of the first examples, and their task's."""
  _, _, task = toy()
  dataset = task.get_dataset(sequence_length=LENGTHS, shuffle=False)
  dataset = dataset.take(EXAMPLES)
  convert = data.feature_converter("EncDecFeatureConverter", pack=False)
  rows = list(convert(dataset, LENGTHS).as_numpy_iterator())
  examples = list(dataset.as_numpy_iterator())
  return {k: np.stack([r[k] for r in rows]) for k in rows[0]}, examples


def write(prefix, model=None, params=None, task=None, **settings):
  stored = {f.name for f in dataclasses.fields(evaluation.Shards)}
  options = {k: v for k, v in settings.items() if k not in stored}
  shards = {k: v for k, v in settings.items() if k in stored}
  return teacher_data.write(
    model or toy()[0],
    params or toy()[1],
    task or toy()[2],
    LENGTHS,
    str(prefix),
    evaluation.Shards(**{"num_shards": 3} | shards),
    **{
      "split": "train",
      "batch_size": 8,
      "num_examples": EXAMPLES,
      "seed": 5,
    }
    | options,
  )


def read(prefix):
  """All records in the order of the shards."""
  manifest, paths = teacher_shards.check_shards(str(prefix))
  parse = teacher_shards.record_parser(manifest)
  records = tf.data.TFRecordDataset(list(paths)).map(parse)
  return list(records.as_numpy_iterator())


def key_of(record):
  return int(record["example_index"]), int(record["sample_number"])


def test_greedy_outputs_are_the_models_own(tmp_path):
  model, params, task = toy()
  assert write(tmp_path / "out") == EXAMPLES
  batch, examples = features()
  tokens, aux = model.predict_batch_with_aux(
    params, batch, decoder_params={"suppress_ids": (0,)}
  )
  records = read(tmp_path / "out")
  assert [key_of(r) for r in records] == [(i, 0) for i in range(EXAMPLES)]
  for i, record in enumerate(records):
    expected = np.trim_zeros(np.asarray(tokens[i]), "b")
    np.testing.assert_array_equal(record["targets"], expected)
    np.testing.assert_array_equal(record["inputs"], examples[i]["inputs"])
    np.testing.assert_allclose(record["score"], aux["scores"][i], rtol=1e-5)
    text = task.output_features["targets"].vocabulary.decode(expected.tolist())
    assert record["targets_pretokenized"].decode() == text


def test_a_sample_depends_on_seed_example_and_number_alone(tmp_path):
  model, params, _ = toy()
  options = {"temperature": 0.8, "num_samples": 3}
  write(tmp_path / "out", **options)
  records = {key_of(r): r for r in read(tmp_path / "out")}
  assert set(records) == {(i, n) for i in range(EXAMPLES) for n in range(3)}
  chosen = np.array([17, 3, 8])
  batch = {k: v[chosen] for k, v in features()[0].items()}
  for number in range(3):
    result = toy_models.sample(
      model,
      params,
      batch,
      jax.random.fold_in(jax.random.key(5), number),
      temperature=0.8,
      suppress_ids=(0,),
      row_ids=chosen,
    )
    for row, example in enumerate(chosen):
      record = records[example, number]
      expected = np.trim_zeros(np.asarray(result.tokens[row]), "b")
      np.testing.assert_array_equal(record["targets"], expected)
      np.testing.assert_allclose(
        record["score"], np.sum(result.log_probs[row]), rtol=1e-4
      )
  drawn = {
    tuple(r["targets"]) for (example, _), r in records.items() if example == 3
  }
  assert len(drawn) > 1
  # Other shards, batches and processes, and fewer samples: the same outputs.
  for process in range(2):
    write(
      tmp_path / "dealt",
      num_shards=5,
      batch_size=16,
      process_index=process,
      process_count=2,
      **options | {"num_samples": 2},
    )
    there = len(list(tmp_path.glob("dealt-0*")))
    assert there == (3, 5)[process]
  dealt = {key_of(r): r for r in read(tmp_path / "dealt")}
  assert set(dealt) == {k for k in records if k[1] < 2}
  for key, record in dealt.items():
    np.testing.assert_array_equal(record["targets"], records[key]["targets"])


def test_only_missing_shards_are_written_again(tmp_path):
  options = {"temperature": 1.0, "num_samples": 2, "top_k": 2}
  write(tmp_path / "out", **options)
  paths = sorted(tmp_path.glob("out-0*"))
  assert [p.name for p in paths] == [f"out-0000{i}-of-00003" for i in range(3)]
  before = {p: p.read_bytes() for p in paths}
  paths[1].unlink()
  # What a killed process leaves is no shard, and goes.
  left = tmp_path / f"{paths[1].name}.tmp-123"
  left.write_bytes(before[paths[1]][:100])
  for path in (paths[0], paths[2]):
    os.utime(path, ns=(1, 1))
  write(tmp_path / "out", **options)
  assert {p: p.read_bytes() for p in paths} == before
  assert [p.stat().st_mtime_ns == 1 for p in paths] == [True, False, True]
  assert not left.exists() and len(list(tmp_path.iterdir())) == 4


def test_other_settings_are_refused(tmp_path):
  prefix = tmp_path / "out"
  write(prefix, num_examples=3)
  before = sorted(tmp_path.iterdir())
  next(tmp_path.glob("out-00001*")).unlink()
  model, params, _ = toy()
  other = jax.tree.map(lambda x: x + 0, params)
  other["decoder"]["decoder_norm"]["scale"][0] += 1e-3
  beam = model.with_decode_fn(decoding.beam_search, num_decodes=2)
  for settings, message in (
    ({"seed": 6}, "got SEED 6 instead of 5; set SEED, or OUTPUT_PATH"),
    ({"params": other}, "set CHECKPOINT_PATH"),
    ({"num_examples": 4}, "EVAL_NUM_EXAMPLES 4 instead of 3"),
    ({"temperature": 1.0}, r"SAMPLING_TEMPERATURE 1\.0 instead of 0\.0"),
    ({"model": beam}, "DECODE_FN.*decoding.beam_search"),
    ({"top_k": 2}, "TOP_K 2 instead of 0"),
    ({"split": "test"}, "EVAL_SPLIT 'test' instead of 'train'"),
    ({"num_shards": 2}, "NUM_SHARDS 2 instead of 3"),
    ({"targets": "references"}, "TARGETS 'references' instead of 'outputs'"),
  ):
    with pytest.raises(ValueError, match=message):
      write(prefix, **{"num_examples": 3} | settings)
  # A copy of the parameters in another place is the same teacher.
  write(prefix, num_examples=3, params=jax.tree.map(np.copy, params))
  assert sorted(tmp_path.iterdir()) == before


def test_top_k_log_probs_of_the_outputs(tmp_path):
  model, params, _ = toy()
  write(
    tmp_path / "out",
    temperature=1.0,
    top_k=3,
    top_k_dtype="float32",
    teacher_temperature=2.0,
  )
  records = read(tmp_path / "out")
  inputs = np.zeros((EXAMPLES, LENGTHS["targets"]), np.int32)
  for row, record in zip(inputs, records, strict=True):
    row[1 : len(record["targets"])] = record["targets"][:-1]
  batch = features()[0] | {"decoder_input_tokens": inputs}
  # Of the 24 logits 20 are tokens.
  log_probs = loss_batches.log_softmax64(
    jax.jit(model.logits)(params, batch)[..., :20] / 2.0
  )
  for log_prob, record in zip(log_probs, records, strict=True):
    log_prob = log_prob[: len(record["targets"])]
    ids = np.argsort(-log_prob, axis=-1)[:, :3]
    np.testing.assert_array_equal(record["top_k_ids"], ids)
    top = np.take_along_axis(log_prob, ids, axis=-1)
    tail = np.log1p(-np.exp(top).sum(-1, keepdims=True))
    # Both are 1e-5 to 2e-5 from float64, whatever the version of jax: the toy's
    # attention logits are large. With jax 0.10 on a CPU both round alike; jax 0.12
    # adds up a product of few rows in another order than one of many.
    np.testing.assert_allclose(
      record["top_k_log_probs"], np.concatenate([top, tail], -1), atol=5e-5
    )


def test_references_as_they_are(tmp_path):
  model, params, _ = toy()
  write(tmp_path / "out", targets="references", top_k=20)
  batch, examples = features()
  scores = jax.jit(model.score_batch)(params, batch)
  log_prob = loss_batches.log_softmax64(
    jax.jit(model.logits)(params, batch)[..., :20]
  )
  for i, record in enumerate(read(tmp_path / "out")):
    targets = examples[i]["targets"]
    np.testing.assert_array_equal(record["targets"], targets)
    np.testing.assert_allclose(record["score"], scores[i], rtol=1e-4)
    ids, stored = record["top_k_ids"], record["top_k_log_probs"]
    assert ids.shape == (len(targets), 20) and np.all(stored[:, -1] < -1e4)
    np.testing.assert_allclose(
      stored[:, :-1],
      np.take_along_axis(log_prob[i, : len(targets)], ids, axis=-1),
      rtol=1e-3,  # float16
    )


# tests/decoding has the beams, and the tests above the shards.
@pytest.mark.nightly
def test_beams(tmp_path):
  model, params, _ = toy()
  beam = model.with_decode_fn(decoding.beam_search, num_decodes=2, alpha=0.6)
  write(tmp_path / "out", model=beam)
  tokens, aux = beam.predict_batch_with_aux(params, features()[0])
  for i, record in enumerate(read(tmp_path / "out")):
    expected = np.asarray(tokens[i])
    expected = expected[: np.argmin(np.append(expected, 0))]
    np.testing.assert_array_equal(record["targets"], expected)
    np.testing.assert_allclose(record["score"], aux["scores"][i], rtol=1e-4)


def test_wrong_settings_are_told(tmp_path):
  model, _, task = toy()
  cases = (
    ({"num_samples": 2}, "set SAMPLING_TEMPERATURE, or NUM_SAMPLES = 1"),
    ({"split": "tset"}, "got 'tset'; set EVAL_SPLIT"),
    ({"top_k": 21}, "TOP_K of at most 20.*got 21"),
    ({"top_k": -1}, "set TOP_K"),
    ({"num_shards": 0}, "set NUM_SHARDS"),
    ({"targets": "output"}, "'outputs' or 'references', got 'output'"),
    ({"top_k_dtype": "bfloat16"}, "set TOP_K_DTYPE"),
    ({"teacher_temperature": 0.0}, "set TEACHER_TEMPERATURE"),
    (
      {"targets": "references", "num_samples": 2, "temperature": 1.0},
      "one target for each input",
    ),
    ({"process_index": 1, "process_count": 2}, "that all processes see"),
  )
  for settings, message in cases:
    with pytest.raises(ValueError, match=message):
      write(tmp_path / "out", **settings)
  mixture = seqio.Mixture("of_one", [(task, 1.0)])
  with pytest.raises(ValueError, match="got the mixture 'of_one'"):
    write(tmp_path / "out", task=mixture)
  with pytest.raises(ValueError, match=r"\.jsonl'; set OUTPUT_PATH"):
    infer.infer(
      infer.DecodeSettings(model, "nowhere", task.name, LENGTHS),
      output_path=str(tmp_path / "out.jsonl"),
      shards=evaluation.Shards(),
    )
  assert not list(tmp_path.iterdir())


def test_rows_that_cannot_be_read_are_a_sentence(tmp_path):
  _, _, task = toy()
  lines = tmp_path / "rows.tsv"
  lines.write_text("1\t1\n2\n")
  columns = lambda rows: rows.map(
    lambda line: dict(
      zip(
        ("inputs", "targets"),
        tf.io.decode_csv(line, ["", ""], "\t"),
        strict=True,
      )
    )
  )
  broken = seqio.Task(
    "broken_rows",
    source=seqio.TextLineDataSource({"train": str(lines)}),
    preprocessors=[columns, *task.preprocessors[-2:]],
    output_features=task.output_features,
  )
  with pytest.raises(
    ValueError, match=r"the split 'train' of broken_rows, got 'Expect 2 fields"
  ):
    write(tmp_path / "out", task=broken)
  assert list(tmp_path.iterdir()) == [lines]


def test_a_task_that_shrank_is_told(tmp_path):
  _, _, task = toy()
  write(tmp_path / "out")
  next(tmp_path.glob("out-00002*")).unlink()
  smaller = seqio.Task(
    task.name,
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: task.source.get_dataset(
        split=split, shuffle=False
      ).take(EXAMPLES - 3),
      splits=("train",),
    ),
    preprocessors=task.preprocessors,
    output_features=task.output_features,
  )
  with pytest.raises(ValueError, match=r"expected 20 examples.*got 17"):
    write(tmp_path / "out", task=smaller)
