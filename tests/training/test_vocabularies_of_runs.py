"""Whole runs with four vocabularies are one run, up to the ids.

SFT on a constant output until it is learned, on-policy GKD from there, `gkd infer`
as lines and as shards, and an export. The networks of all vocabularies begin with
the same numbers for the same text.
"""

import io
import json

import numpy as np
import pytest
import sentencepiece
import seqio
import token_layouts
import toy_models

from gkd_jax import (
  checkpoints,
  evaluation,
  infer,
  models,
  network,
  optimizers,
  schedules,
  train,
  training,
)
from gkd_jax.checkpoints import export
from gkd_jax.tasks import teacher_shards

LENGTHS = {"inputs": 4, "targets": 6}
SIZE = 264
TEXTS = "abcdefgh"
# By hand: id of EOS, and PAD of an export.
IDS = {
  "t5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
  "sentencepiece": {},
  "bos_first": {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3},
  "byte": None,
}
EXPECTED = {
  "t5": (1, 0),
  "sentencepiece": (2, 2),
  "bos_first": (2, 1),
  "byte": (1, 0),
}


def vocabulary(name, folder):
  """A vocabulary of characters, and the ids of EOS and of each character."""
  if IDS[name] is None:
    result = seqio.ByteVocabulary()
  else:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([TEXTS] * 9),
      model_writer=model,
      model_type="char",
      vocab_size=13,
      hard_vocab_limit=False,
      add_dummy_prefix=False,
      minloglevel=2,
      **IDS[name],
    )
    path = folder / f"{name}.model"
    path.write_bytes(model.getvalue())
    result = seqio.SentencePieceVocabulary(str(path))
  ids = [EXPECTED[name][0], *(i for c in TEXTS for i in result.encode(c))]
  assert len(ids) == 9, ids
  return result, np.array(ids)


def register(name, of):
  feature = seqio.Feature(of, add_eos=True)
  examples = [(a + b, "ab") for a in TEXTS for b in TEXTS[:4]]
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: _dataset(examples),
      splits=["train", "validation", "test"],
    ),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={"inputs": feature, "targets": feature},
    metric_fns=[exact],
  )


def _dataset(examples):
  import tensorflow as tf

  columns = zip(*examples, strict=True)
  return tf.data.Dataset.from_tensor_slices(
    dict(zip(("inputs", "targets"), map(list, columns), strict=True))
  )


def exact(targets, predictions):
  return {
    "exact": np.mean(
      [a == b for a, b in zip(targets, predictions, strict=True)]
    )
  }


def a_model():
  config = network.T5Config(
    vocab_size=SIZE,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.0,
  )
  return models.EncoderDecoderModel(network.Transformer(config))


def first_params(ids):
  """Parameters in which the start (0), EOS and each character are as in all."""
  shapes = {f"{k}_input_tokens": (1, 4) for k in ("encoder", "decoder")}
  import jax

  params = jax.tree.map(
    np.asarray,
    dict(
      jax.jit(
        lambda key: a_model().get_initial_variables(key, shapes)["params"]
      )(jax.random.key(0))
    ),
  )
  of_all = [0, *ids]
  rest = [i for i in range(SIZE) if i not in of_all]
  # New row i is the old row `place[i]`.
  place = np.empty(SIZE, int)
  place[[*of_all, *rest]] = np.arange(SIZE)
  embedding = params["token_embedder"]["embedding"][place]
  kernel = params["decoder"]["logits_dense"]["kernel"][:, place]
  decoder = params["decoder"] | {"logits_dense": {"kernel": kernel}}
  return params | {
    "token_embedder": {"embedding": embedding},
    "decoder": decoder,
  }


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def run(model, folder, task, steps, **options):
  train.train(
    model,
    optimizers.adamw(schedules.constant(0.01)),
    model_dir=str(folder),
    train_steps=steps,
    dataset=training.DatasetConfig(task, LENGTHS, 8),
    evaluation=training.EvalConfig(period=steps, batch_size=32),
    checkpoints=training.CheckpointConfig(steps),
    logging=training.LogConfig(period=steps),
    **options,
  )
  return lines(folder / "metrics.jsonl")


def all_of(name, folder):
  of, ids = vocabulary(name, folder)
  task = f"runs_{name}"
  register(task, of)
  begin = folder / f"{name}_begin"
  checkpoints.save_safetensors(begin, first_params(ids), {"vocab_size": SIZE})
  sft = run(
    a_model(),
    folder / f"{name}_sft",
    task,
    60,
    initial_checkpoint_path=str(begin),
  )
  model = models.GKDModel(a_model(), a_model(), sampling_temperature=0.0)
  trained = str(folder / f"{name}_sft")
  gkd = run(
    model,
    folder / f"{name}_gkd",
    task,
    3,
    initial_checkpoint_path=trained,
    teacher_checkpoint_path=trained,
  )
  settings = infer.DecodeSettings(
    model=a_model(),
    checkpoint_path=str(folder / f"{name}_gkd"),
    mixture_or_task_name=task,
    task_feature_lengths=LENGTHS,
  )
  infer.infer(settings, output_path=str(folder / f"{name}.jsonl"))
  prefix = str(folder / f"{name}_shards")
  infer.infer(
    settings, output_path=prefix, shards=evaluation.Shards(num_shards=1)
  )
  manifest, paths = teacher_shards.check_shards(prefix)
  import tensorflow as tf

  records = tf.data.TFRecordDataset(list(paths)).map(
    teacher_shards.record_parser(manifest)
  )
  targets = [r["targets"].tolist() for r in records.as_numpy_iterator()]
  out = folder / f"{name}_hf"
  export.export_checkpoint(settings.checkpoint_path, out, format="hf")
  generation = json.loads((out / "generation_config.json").read_text())
  return ids, sft, gkd, lines(folder / f"{name}.jsonl"), targets, generation


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_real_tokens": 13}, "at most 13 ids, the num_real_tokens .* got 14"),
    ({}, "end sequences as the checkpoint says, by 2, got 1; set INITIAL_CHE"),
  ],
)
def test_a_run_begins_with_a_vocabulary_that_fits(tmp_path, fields, message):
  token_layouts.task("t5_letters", "t5", [("a", "b")])
  checkpoints.save_safetensors(
    tmp_path / "begin",
    {"w": np.zeros(1)},
    {"special_tokens": {"eos": [2], "pad": 1, "start": 0}},
  )
  with pytest.raises(ValueError, match=message):
    run(
      toy_models.model(8, **fields),
      tmp_path / "run",
      "t5_letters",
      1,
      initial_checkpoint_path=str(tmp_path / "begin"),
    )
  seqio.TaskRegistry.remove("t5_letters")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """What `all_of` returns, by vocabulary, and the folder of all files."""
  folder = tmp_path_factory.mktemp("vocabularies")
  return {name: all_of(name, folder) for name in IDS}, folder


@pytest.mark.nightly
def test_runs_with_four_vocabularies_are_one_run_up_to_the_ids(runs):
  found, _ = runs
  _, *first, _, _ = found["t5"]
  sft, gkd, _ = first
  ended = next(row for row in gkd if "sampled_length" in row)
  assert (ended["sampled_length"], ended["sampled_eos"]) == (3.0, 1.0)
  (learned,) = [row for row in sft if "eval/exact" in row]
  assert learned["eval/exact"] == 1.0
  for name, (ids, sft, gkd, rows, targets, generation) in found.items():
    assert targets == [[int(ids[1]), int(ids[2]), int(ids[0])]] * 32
    assert [r["prediction"] for r in rows] == ["ab"] * 32
    assert all(r["ended"] for r in rows)
    np.testing.assert_allclose(
      [r["score"] for r in rows], [r["score"] for r in first[2]], atol=1e-3
    )
    for got, of_t5 in zip(sft + gkd, first[0] + first[1], strict=True):
      for key in ("loss", "eval/exact", "sampled_length", "sampled_eos"):
        values = got.get(key, 0), of_t5.get(key, 0)
        np.testing.assert_allclose(*values, rtol=0.02, atol=1e-4)
    eos, pad = EXPECTED[name]
    assert generation == {
      "eos_token_id": eos,
      "pad_token_id": pad,
      "decoder_start_token_id": 0,
    }


@pytest.mark.nightly
@pytest.mark.parametrize("name", IDS)
def test_transformers_ends_outputs_of_each_vocabulary(runs, name):
  torch = pytest.importorskip("torch", reason="needs the extra hf")
  transformers = pytest.importorskip(
    "transformers", reason="needs the extra hf"
  )
  found, folder = runs
  eos, *letters = map(int, found[name][0])
  model = transformers.T5ForConditionalGeneration.from_pretrained(
    folder / f"{name}_hf"
  )
  inputs = torch.tensor([[a, b, eos] for a in letters for b in letters[:4]])
  with torch.no_grad():
    tokens = model.eval().generate(inputs, max_new_tokens=6, do_sample=False)
  # The start, "ab" and EOS, whatever the input.
  assert tokens.tolist() == [[0, *letters[:2], eos]] * 32
