"""GKD under T5X's trainer: the same losses as ours, and whole runs of t5x.train.

All but one of these tests need T5X, which is not on PyPI; see
`docs/from_t5x.md`.
"""

import functools
import importlib
import os
import pathlib
import subprocess
import sys
import warnings

import flax
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import token_layouts
import toy_models
from flax import traverse_util

from gkd_jax import checkpoints, models, optimizers, schedules, training

ROOT = pathlib.Path(__file__).parents[2]
with warnings.catch_warnings():
  warnings.simplefilter("ignore")  # T5X's, at import
  try:
    from t5x import optimizers as t5x_optimizers
    from t5x import partitioning, utils
    from t5x.examples.t5 import network as t5x_network

    from gkd_jax.adapters import t5x as adapter
  except ImportError:
    adapter = None

needs_t5x = pytest.mark.skipif(
  adapter is None, reason="needs T5X, which is not on PyPI (docs/from_t5x.md)"
)
# What T5X and what it calls warn of is not ours to repair.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_without_t5x_one_sentence_says_how_to_install_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "t5x", None)
  monkeypatch.delitem(sys.modules, "gkd_jax.adapters.t5x", raising=False)
  with pytest.raises(ImportError, match=r"^expected T5X .* got no module") as e:
    importlib.import_module("gkd_jax.adapters.t5x")
  assert "git+https://github.com/google-research/t5x" in str(e.value)
  assert "\n" not in str(e.value)


# ---- the step, against our own trainer --------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _t5x_broadcasts_ranks():
  with jax.numpy_rank_promotion("allow"):
    yield


def _network(model):
  """T5X's network of the sizes of one of ours."""
  config = model.config
  names = {f for f in t5x_network.T5Config.__dataclass_fields__}
  sizes = {n: getattr(config, n) for n in names if hasattr(config, n)}
  return t5x_network.Transformer(t5x_network.T5Config(**sizes))


def _model(gkd_model, **options):
  options.setdefault("teacher_module", _network(gkd_model.teacher))
  options.setdefault("output_vocabulary", None)
  return adapter.GKDEncoderDecoderModel(
    module=_network(gkd_model.student),
    input_vocabulary=None,
    optimizer_def=t5x_optimizers.sgd(0.1),
    **options,
  )


def _partitioner(**kwargs):
  class Partitioner(partitioning.PjitPartitioner):
    # T5X's own mesh of CPU devices has no data axis.
    mesh = jax.sharding.Mesh(
      np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model")
    )

  return Partitioner(num_partitions=1, **kwargs)


def _trainer(folder, model, student, teacher, **kwargs):
  partitioner = _partitioner()
  initializer = utils.TrainStateInitializer(
    model.optimizer_def,
    model.get_initial_variables,
    {k: v.shape for k, v in toy_models.batch().items()},
    partitioner,
    {k: np.int32 for k in toy_models.batch()},
  )
  state = jax.tree.map(
    lambda s: np.zeros(s.shape, s.dtype), initializer.global_train_state_shape
  )
  path = folder / "teacher.safetensors"
  if not path.exists():
    checkpoints.save_safetensors(folder, teacher, {})
    path = next(folder.glob("*.safetensors"))
  settings = {
    "num_microbatches": None,
    "seed": 7,
    "teacher_checkpoint_path": str(path),
    "learning_rate_fn": lambda step: 0.1,
  }
  return adapter.GKDTrainer(
    model=model,
    train_state=state.replace_params(
      flax.core.freeze(jax.tree.map(np.asarray, student))
    ),
    partitioner=partitioner,
    eval_names=(),
    summary_dir=None,
    train_state_axes=initializer.train_state_axes,
    rng=jax.random.PRNGKey(0),
    **(settings | kwargs),
  )


def _train(under_t5x, batch, step=0):
  """One step of T5X's loop; the metrics that it writes."""
  summary = under_t5x.train(iter([batch]), 1, start_step=step).result()
  return {name: float(x.value) for name, x in summary.items()}


def _assert_same_trees(a, b, **tolerance):
  a, b = (traverse_util.flatten_dict(dict(t), sep="/") for t in (a, b))
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], err_msg=name, **tolerance)


@needs_t5x
@pytest.mark.parametrize(
  ("fraction", "microbatches", "options"),
  [
    (1.0, None, {}),
    (0.0, 2, {"length_normalization": "token"}),
    (0.5, 2, {"divergence": "jsd", "beta": 0.1, "teacher_temperature": 0.7}),
    (0.5, None, {"student_data_granularity": "example"}),
  ],
)
def test_losses_and_parameters_are_those_of_our_trainer(
  tmp_path, fraction, microbatches, options
):
  options = {"student_data_fraction": fraction, **options}
  ours, student, teacher = toy_models.gkd(**options)
  under_t5x = _trainer(
    tmp_path,
    _model(ours, **options),
    student,
    teacher,
    num_microbatches=microbatches,
  )
  optimizer = optimizers.Optimizer(schedules.constant(0.1), optax.sgd(1.0))
  state = toy_models.state(student, optimizer)

  @functools.cache
  def our_step(source):
    return jax.jit(
      functools.partial(
        training.train_step,
        model=ours,
        optimizer=optimizer,
        seed=7,
        source=source,
      )
    )

  sources = set()
  under_t5x.compile_train(toy_models.batch())
  for step in range(3):
    batch = toy_models.batch(seed=step)
    source = ours.source_of_step(7, step)
    sources.add(source)
    state, metrics = our_step(source)(state, teacher, batch)
    summary = _train(under_t5x, batch, step)
    for name, (total, weight) in metrics.items():
      # Both sum float32 gradients in another order.
      rtol = 2e-4 if name == "gradient_norm" else 1e-5
      np.testing.assert_allclose(
        summary[name], total / weight, rtol=rtol, atol=1e-6, err_msg=name
      )
  if fraction == 0.5 and "student_data_granularity" not in options:
    assert sources == {models.DATA, models.STUDENT}
  # Several steps in one call, as T5X's loop does it: a coin for each.
  batches = [toy_models.batch(seed=step) for step in (3, 4)]
  under_t5x.train(iter(batches), 2).result()
  for step, batch in enumerate(batches, 3):
    source = ours.source_of_step(7, step)
    state, _ = our_step(source)(state, teacher, batch)
  assert under_t5x.train_state.step == 5
  _assert_same_trees(
    under_t5x.train_state.params, state.params, rtol=1e-4, atol=1e-4
  )
  _assert_same_trees(under_t5x.teacher_params, teacher, rtol=0, atol=0)
  # Neither in the state that T5X saves, nor in the optimizer.
  shapes = {x.shape for x in jax.tree.leaves(under_t5x.train_state)}
  assert (16, 8) in shapes and not any(12 in shape for shape in shapes)


@needs_t5x
def test_samples_end_at_the_eos_of_the_output_vocabulary():
  """Of SentencePiece's default ids, 2 is EOS and 1 is not."""
  ours, student, _ = toy_models.gkd()
  vocabulary = token_layouts.Letters("sentencepiece")
  model = _model(ours, output_vocabulary=vocabulary).gkd
  given, inputs = toy_models.batch(32), toy_models.inputs("student", 32)
  drawn = jax.jit(
    lambda params, batch: model.with_samples(
      params, model.student.encode(params, batch), batch, inputs
    )[0]
  )(student, given)
  tokens = np.asarray(drawn["decoder_target_tokens"])
  weights = np.asarray(drawn["decoder_loss_weights"])
  ended = (tokens == 2).any(axis=1)
  lengths = np.where(ended, np.argmax(tokens == 2, axis=1) + 1, 7)
  np.testing.assert_array_equal(weights, np.arange(7) < lengths[:, None])
  assert 0 < ended.sum() < 32 and np.any((tokens == 1) & (weights > 0))


@needs_t5x
def test_the_teacher_lies_on_the_mesh_by_its_own_rules(tmp_path):
  ours, student, teacher = toy_models.gkd()
  spec = lambda t: (
    t.teacher_params["decoder"]["layers_0"]["mlp"]["wi_0"][
      "kernel"
    ].sharding.spec
  )
  plain = _trainer(tmp_path, _model(ours), student, teacher)
  assert spec(plain) == jax.sharding.PartitionSpec(None, "model")
  rules = partitioning.standard_logical_axis_rules(1, 2)
  split = _trainer(
    tmp_path,
    _model(ours),
    student,
    teacher,
    teacher_partitioner=_partitioner(logical_axis_rules=rules),
  )
  assert spec(split) == jax.sharding.PartitionSpec("data", "model")
  losses = [_train(t, toy_models.batch())["loss"] for t in (plain, split)]
  np.testing.assert_allclose(*losses, rtol=1e-6)


@needs_t5x
def test_a_batch_without_targets_is_nan_and_changes_nothing(tmp_path):
  ours, student, teacher = toy_models.gkd(student_data_fraction=0.0)
  under_t5x = _trainer(
    tmp_path, _model(ours, student_data_fraction=0.0), student, teacher
  )
  batch = toy_models.batch()
  batch["decoder_loss_weights"] = np.zeros_like(batch["decoder_loss_weights"])
  summary = _train(under_t5x, batch)
  assert np.isnan(summary["loss"]) and summary["skipped_updates"] == 1
  _assert_same_trees(under_t5x.train_state.params, student, rtol=0, atol=0)
  assert under_t5x.train_state.step == 1
  summary = _train(under_t5x, toy_models.batch(), 1)
  assert np.isfinite(summary["loss"]) and summary["skipped_updates"] == 0


@needs_t5x
def test_wrong_settings(tmp_path):
  ours, student, teacher = toy_models.gkd()
  make = functools.partial(_trainer, tmp_path, student=student, teacher=teacher)
  with pytest.raises(ValueError, match=r"whole number .* set RANDOM_SEED"):
    make(_model(ours), seed=None)
  with pytest.raises(ValueError, match="/nowhere"):
    make(_model(ours), teacher_checkpoint_path="/nowhere")
  with pytest.raises(ValueError, match="got EncoderDecoderModel; set MODEL"):
    make(
      adapter.t5x_models.EncoderDecoderModel(
        _network(ours.student), None, None, t5x_optimizers.sgd(0.1)
      )
    )
  with pytest.raises(ValueError, match="set STUDENT_DATA_FRACTION"):
    _model(ours, student_data_fraction=1.5)
  other = t5x_network.Transformer(t5x_network.T5Config(vocab_size=24))
  with pytest.raises(ValueError, match=r"24 \(teacher\) and 16 \(student\)"):
    _model(ours, teacher_module=other)
  # With T5X's own trainer it would train on the cross-entropy unnoticed.
  with pytest.raises(ValueError, match="trainer_cls = @GKDTrainer"):
    _model(ours).loss_fn(student, toy_models.batch(), jax.random.key(0))
  loss, _ = _model(ours).eval_fn(student, toy_models.batch())
  expected, _ = ours.eval_fn(student, toy_models.batch())
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


# ---- whole runs of t5x.train ------------------------------------------------


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory):
  """Random parameters of the teacher of gin/t5x/tiny.gin."""
  folder = tmp_path_factory.mktemp("t5x_teacher")
  model = adapter.Network(
    t5x_network.Transformer(
      t5x_network.T5Config(
        vocab_size=24,
        emb_dim=48,
        num_heads=4,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=8,
        mlp_dim=64,
        mlp_activations=("gelu", "linear"),
      )
    )
  )
  variables = model.get_initial_variables(jax.random.key(3), toy_models.SHAPES)
  checkpoints.save_safetensors(folder, dict(variables["params"]), {})
  return folder


@pytest.fixture(scope="module")
def t5x_train(tmp_path_factory, tiny_teacher):
  """Runs `python -m t5x.train` as its user does; returns what it logged."""
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  path = next(tiny_teacher.glob("*.safetensors"))

  def run(model_dir, evaluate=False, **macros):
    macros = {
      "MODEL_DIR": str(model_dir),
      "TEACHER_CHECKPOINT_PATH": str(path),
    } | macros
    without = (
      []
      if evaluate
      else [
        "--gin.train.train_eval_dataset_cfg=None",
        "--gin.train.infer_eval_dataset_cfg=None",
      ]
    )
    done = subprocess.run(
      [
        *(sys.executable, "-m", "t5x.train"),
        "--gin_file=gin/t5x/gkd.gin",
        "--gin_file=gin/t5x/tiny.gin",
        *(f"--gin.{name}={value!r}" for name, value in macros.items()),
        *without,
      ],
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      timeout=600,
      check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr

  return run


def _saved(model_dir, step):
  """Everything in a checkpoint of T5X's, path to array."""
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.restore(model_dir / f"checkpoint_{step}" / "state")
  return traverse_util.flatten_dict(tree, sep="/")


@needs_t5x
@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_t5x_train_runs_saves_the_student_and_goes_on(
  tmp_path, t5x_train, tiny_teacher, fraction
):
  path = next(tiny_teacher.glob("*.safetensors"))
  before = path.read_bytes()
  halves, whole = tmp_path / "halves", tmp_path / "whole"
  t5x_train(halves, TRAIN_STEPS=20, STUDENT_DATA_FRACTION=fraction)
  log = t5x_train(
    halves, TRAIN_STEPS=40, STUDENT_DATA_FRACTION=fraction, evaluate=True
  )
  assert "main loop over steps 20-40" in log
  assert "arithmetic_cot/answer_accuracy at step 40" in log
  assert ("sampled_length=" in log) == (fraction == 1.0)
  t5x_train(whole, TRAIN_STEPS=40, STUDENT_DATA_FRACTION=fraction)
  resumed, uninterrupted = _saved(halves, 40), _saved(whole, 40)
  assert resumed.keys() == uninterrupted.keys()
  for name, value in resumed.items():
    np.testing.assert_array_equal(value, uninterrupted[name], err_msg=name)
  first = _saved(whole, 0)
  assert any(
    np.any(first[name] != value)
    for name, value in resumed.items()
    if name.startswith("target/")
  )
  # The student (width 16) and its optimizer; nothing of the teacher (48, 64).
  shapes = {np.shape(value) for value in resumed.values()}
  assert (24, 16) in shapes
  assert not any({48, 64} & set(shape) for shape in shapes)
  assert path.read_bytes() == before
