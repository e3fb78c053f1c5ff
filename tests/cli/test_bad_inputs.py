"""What a user can get wrong is one sentence: expected, got, and the setting.

Each row goes through `gkd` in this process. With `--dry_run`, which would train
nothing either, and before anything is compiled.
"""

import pathlib

import pytest
from command_line import gin, refused, save_toy_teacher

ROOT = pathlib.Path(__file__).parents[2]
RUN_FILES = sorted(path.name for path in (ROOT / "gin/runs").glob("*.gin"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  return save_toy_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
  """Starts in a folder of the test, and finds it as it was."""
  monkeypatch.chdir(tmp_path)
  before = sorted(tmp_path.rglob("*"))
  yield tmp_path
  made_by_test = {"my.gin", "tasks_of_mine.py", "__pycache__"}
  after = {p for p in tmp_path.rglob("*") if not made_by_test & {*p.parts}}
  assert after <= {*before}, "a refused command wrote"


# ---- flags --------------------------------------------------------------------

SMOKE = "--gin_file=experiments/smoke.gin"
FLAGS = [
  ("tarin", "got 'tarin'; did you mean train?"),
  ("precompil", "did you mean precompile?"),
  ("fitt", "expected a command of train, eval, infer,"),
  (f"{SMOKE} train", "a command first, got --gin_file=experiments/smoke.gin"),
  ("train", "got none; run `gkd train --gin_file=runs/gkd.gin ...`"),
  ("eval", "got none; run `gkd eval --gin_file=runs/eval.gin ...`"),
  ("infer", "got none; run `gkd infer --gin_file=runs/infer.gin ...`"),
  ("precompile --topology=cpu:8", "got none; run `gkd precompile --gin_file"),
  (f"train smoke.gin {SMOKE}", "got smoke.gin; run `gkd train --gin_file=smo"),
  ("train --gin_fil=x.gin", "such as --gin_file, got --gin_fil;"),
  ("train --jobs=2", "got --jobs, which `gkd sweep` has;"),
  ("train --helpfull", "such as --help, got --helpfull"),
  ("train --gin_file", "expected a value, got none; set --gin_file"),
  (f"train {SMOKE} --dry_run=maybe", "'true' or 'false', got 'maybe'; set --d"),
  (f"train {SMOKE} --process_count=0", "least 1, got 0; set --process_count"),
  (f"train {SMOKE} --process_index=x", "got 'x'; set --process_index"),
  ("sweep --output_dir=o --jobs=2.5", "at least 1, got '2.5'; set --jobs"),
  ("sweep --seeds=3", "got none; set --gin_file or --sweep_file"),
  ("sweep --gin_file=a.gin", "expected a folder, got none; set --output_dir"),
  ("export --format=zip", "'gkd', 't5x' or 'hf', got 'zip'; set --format"),
  ("export --dtype=int8", "'bfloat16', 'float16' or 'float32', got 'int8'"),
  ("export", "got None and None; set --checkpoint_path and --output_path"),
  ("import --checkpoint_path=a", "'a' and None; set --checkpoint_path and"),
  ("compare", "two folders of evaluations, got 0; run `gkd compare A B`"),
  ("compare a", "two folders of evaluations, got 1"),
  ("report", "at least one finished run, got none; run `gkd report RUN"),
  ("watch", "expected runs to watch, got none; run `gkd watch RUN"),
  ("path", "expected one of arithmetic_teacher, g2p_teacher, got nothing"),
  ("path g2p_techer", "such as g2p_teacher, got 'g2p_techer'"),
  (f"precompile {SMOKE} --topology=v9:4", "such as v5e:4x4"),
]


@pytest.mark.parametrize(("line", "said"), FLAGS, ids=lambda x: x[:24])
def test_flags(capsys, line, said):
  assert said in refused(capsys, *line.split())


# ---- gin's files and bindings ---------------------------------------------------

TEXTS = [
  ("--gin.MODEL_DIR=/runs/a", """set '--gin.MODEL_DIR="/runs/a"'"""),
  ("--gin.MODEL_DIR=gs://b/a", """set '--gin.MODEL_DIR="gs://b/a"'"""),
  ("--gin.EXECUTOR=jit", """set '--gin.EXECUTOR="jit"'"""),
  ("--gin.PACK=true", "expected True, got true; set --gin.PACK=True"),
  ("--gin.BETA=none", "expected None, got none; set --gin.BETA=None"),
  ("--gin.STUDENT=TOY_TEACHER", "set --gin.STUDENT=%TOY_TEACHER"),
  ("--gin.BATCH_SIZE=", "expected a value of BATCH_SIZE, got none"),
  ("--gin.BATCH_SIZE", "expected a value of BATCH_SIZE, got none"),
  ("--gin.BATCH_SIZE=16 32", "got 16 32; set BATCH_SIZE"),
  ("--gin.TASK_FEATURE_LENGTHS={inputs: 8}", "set TASK_FEATURE_LENGTHS"),
  ("--gin.TASK_FEATURE_LENGTHS={'a': 8", "set TASK_FEATURE_LENGTHS"),
  ("--gin.MODEL-DIR=3", "the name of a setting, got 'MODEL-DIR'"),
  ("--gin.BATCHSIZE=3", "such as BATCH_SIZE, got BATCHSIZE;"),
  ("--gin.batch_size=3", "such as BATCH_SIZE"),
  ("--gin.REWARD=3", "that something reads, got REWARD"),
  ("--gin.STUDENT=%TOY_STUDNET", "such as TOY_STUDENT, got %TOY_STUDNET;"),
  ("--gin.train.batch_size=8", "named 'batch_size'); set BATCH_SIZE"),
  ("--gin.DatasetConfig.pakc=True", "named 'pakc'"),
  ("--gin.trian.train.seed=8", "'trian.train'); set SEED"),
  ("--gin.OPTIMIZER=@optimizers.adamm()", "adamm()'); set OPTIMIZER"),
  ("--gin_file=runs/gdk.gin", "such as runs/gkd.gin, got 'runs/gdk.gin'"),
  ("--gin_file=nope.gin", "expected a gin file, got 'nope.gin', which"),
  ("--gin_file=.", "expected a gin file"),
]
FILES = [
  ("MODEL_DIR = /runs/a", "'MODEL_DIR = /runs/a' in line 2 of"),
  ("include 'runs/gdk.gin'", "such as runs/gkd.gin, got 'runs/gdk.gin'"),
  ("include runs/gkd.gin", "got 'include runs/gkd.gin' in line 2 of"),
  ("include 'my.gin'", "that do not include each other"),
  ("import my_tsk", "expected a Python module, got 'import my_tsk' in line 2"),
  ("from gkd_jax import modles", "set the import or PYTHONPATH"),
  ("models.GKDModel.beta = 1", "'models' was not provided by an import"),
  (
    "from gkd_jax import models\nmodels.GKDModl.beta = 1",
    "gkd_jax.models has no attribute GKDModl",
  ),
  (
    "from gkd_jax import models\nmodels.GKDModel.betta = 1",
    "in line 3 of",
  ),
  ("TRAIN_STEP = 3", "such as TRAIN_STEPS, got TRAIN_STEP;"),
  ("A = {'b': 1", "expected gin's syntax"),
]


@pytest.mark.parametrize(("flag", "said"), TEXTS, ids=lambda x: x[:28])
def test_texts_of_gin(capsys, flag, said):
  assert said in refused(capsys, "train", SMOKE, flag, "--dry_run")


@pytest.mark.parametrize(("text", "said"), FILES, ids=lambda x: x[:28])
def test_gin_files(capsys, tmp_path, text, said):
  first = "from __gin__ import dynamic_registration\n"
  (tmp_path / "my.gin").write_text(first + text)
  line = ["train", SMOKE, "--gin_file=my.gin", "--dry_run"]
  assert said in refused(capsys, *line)


# ---- required macros -------------------------------------------------------------

OF_TRAINING = ("MODEL_DIR", "TRAIN_STEPS", "TASK_FEATURE_LENGTHS")
OF_DECODING = (
  "CHECKPOINT_PATH",
  "TASK_FEATURE_LENGTHS",
)
MISSING = {
  "train --gin_file=runs/gkd.gin": OF_TRAINING,
  "train --gin_file=runs/sft.gin": OF_TRAINING,
  "train --gin_file=runs/rl_gkd.gin": (*OF_TRAINING, "REWARD"),
  "train --gin_file=experiments/smoke.gin": ("MODEL_DIR",),
  "eval --gin_file=runs/eval.gin": (*OF_DECODING, "EVAL_OUTPUT_DIR"),
  "eval --gin_file=runs/instruments.gin": (*OF_DECODING, "EVAL_OUTPUT_DIR"),
  "infer --gin_file=runs/infer.gin": (*OF_DECODING, "OUTPUT_PATH"),
  "precompile --gin_file=runs/sft.gin": ("TASK_FEATURE_LENGTHS",),
}


@pytest.mark.parametrize("line", MISSING)
def test_all_missing_macros_are_named_at_once(capsys, line):
  said = refused(capsys, *line.split())
  got, names = said.removeprefix("gkd: expected a value of each macro, ").split(
    "; set "
  )
  assert got == f"got none of {names}"
  assert {*names.split(", ")} == {*MISSING[line]}


def test_files_of_another_command(capsys):
  for line, name in (
    ("train --gin_file=models/toy.gin", "train.train"),
    ("infer --gin_file=runs/eval.gin", "infer.infer"),
    ("eval --gin_file=runs/infer.gin", "infer.evaluate_checkpoint"),
  ):
    said = refused(capsys, *line.split())
    assert f"expected gin files that bind {name}" in said


# ---- types and ranges ------------------------------------------------------------

NUMBERS = (0, -4, 16.0, None, "x")
COUNTS = (  # whole numbers of at least 1
  "BATCH_SIZE",
  "TRAIN_STEPS",
  "EVAL_PERIOD",
  "EVAL_BATCH_SIZE",
  "CHECKPOINT_PERIOD",
  "CHECKPOINTS_TO_KEEP",
  "LOG_PERIOD",
  "NUM_MICROBATCHES",
  "NUM_PARTITIONS",
  "MAX_SKIPPED_IN_ROW",
)
COUNTS_OR_NONE = (
  "EVAL_NUM_EXAMPLES",
  "NUM_SLICES",
  "DATA_SHARDS",
  "DECODE_SLOTS",
)
SWITCHES = (
  "USE_CACHED_TASKS",
  "PACK",
  "SHARD_PARAMS_OVER_DATA",
  "TEACHER_SCAN_LAYERS",
  "SAVE_DATA_POSITION",
  "EVAL_ERRORS_STOP",
)
TEXT = ("MIXTURE_OR_TASK_NAME", "MODEL_DIR")
TEXT_OR_NONE = (
  "MIXTURE_OR_TASK_MODULE",
  "INITIAL_CHECKPOINT_PATH",
  "TEACHER_CHECKPOINT_PATH",
  "EVAL_SPLIT",
  "FINAL_EVAL_SPLIT",
  "WANDB_PROJECT",
  "BEST_METRIC",
)
WRONG = {
  **dict.fromkeys(COUNTS, NUMBERS),
  **dict.fromkeys(COUNTS_OR_NONE, (0, -4, 16.0, "x")),
  **dict.fromkeys(SWITCHES, (0, 1, None, "True")),
  **dict.fromkeys(TEXT, (0, -4, 16.0, None, "")),
  **dict.fromkeys(TEXT_OR_NONE, (0, -4, 16.0, "")),
  "SEED": (-4, 16.0, None, "x"),
  "TASK_FEATURE_LENGTHS": (0, None, "x", {"inputs": 0}, {"inputs": 8.0}),
  "DROPOUT_RATE": (1, -4, None, "x"),
  "LEARNING_RATE": (-4, None, "x"),
  "OPTIMIZER": (0, None, "adafactor"),
  "INPUT_BUCKETS": (0, (2, 1), (16.0,), "x"),
  "OUTPUT_BUCKETS": (0, (0, 1), (16.0,), "x"),
  "PROFILE_STEPS": (0, (3,), (5, 4), (1.0, 2), "x"),
  "EXECUTOR": (0, None, "pmapp"),
  "BEST_MODE": (0, None, "mni"),
  "DECODE_FN": (0, "beam"),
  "ACTIVATION_DTYPE": (0, "float"),
  "REMAT_POLICY": (0, "ful"),
  "DECODER_PARAMS": (4, "x"),
  "NUM_REAL_TOKENS": (0, -4, 16.0, 25, "x"),
  "STUDENT": (0, None, "toy"),
  "TEACHER": (0, "toy"),
  "STUDENT_MODEL": (0, None, "x"),
  "TEACHER_MODEL": (0, "x"),
  "MODEL": (0, None, "x"),
  "TEACHER_TEMPERATURE": (0, -4, None, "x"),
  "SAMPLING_TEMPERATURE": (-4, None, "x"),
  "TEACHER_WEIGHTS": (0, None, "int4"),
  "STUDENT_DATA_FRACTION": (-4, 16.0, None, "x"),
  "STUDENT_DATA_GRANULARITY": (0, None, "token"),
  "DIVERGENCE": (0, None, "foward_kl"),
  "BETA": (-4, 16.0, "x"),
  "HARD_LABEL_WEIGHT": (-4, 16.0, None, "x"),
  "LENGTH_NORMALIZATION": (0, None, "mean"),
  "LOSS_CHUNK_SIZE": (-4, 16.0, "x"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_of_a_run(teacher, tmp_path, capsys, name):
  for value in WRONG[name]:
    macros = {
      "MODEL_DIR": f"{tmp_path}/student",
      "TEACHER_CHECKPOINT_PATH": teacher,
      name: value,
    }
    said = refused(capsys, "train", SMOKE, *gin(**macros), "--dry_run")
    expected, _, rest = said.partition(", got ")
    got, _, setting = rest.rpartition("; set ")
    assert expected and repr(value) in got, said
    assert name in setting, said


def test_the_table_has_each_macro_of_a_run():
  from gkd_jax.command_line import gin_files

  found = gin_files.read(["runs/gkd.gin"], [], [])
  macros = {b.selector for b in found if not b.argument}
  assert macros == {*WRONG, *OF_FILES, "PREFIX_LM"}


@pytest.mark.parametrize("file", RUN_FILES)
def test_the_tables_have_each_macro_of_a_run_file(file):
  from gkd_jax.command_line import gin_files

  tables = [WRONG, *(table for _, table in LINES.values())]
  for binding in gin_files.read([f"runs/{file}"], [], []):
    if not binding.argument:
      # It has a test of its own, with a teacher.
      known = binding.selector == "INSTRUMENTS_TEMPERATURE"
      assert known or any(binding.selector in t for t in tables), binding


def test_the_temperature_of_instruments(capsys):
  line = [*LINES["eval"][0], "--gin_file=runs/instruments.gin"]
  line.append("--gin.TEACHER=%TOY_TEACHER")
  for value in (-4, None, "x"):
    said = refused(capsys, *line, *gin(INSTRUMENTS_TEMPERATURE=value))
    assert said.endswith(f"got {value!r}; set INSTRUMENTS_TEMPERATURE"), said


def test_a_run_without_models_says_what_to_set(teacher, tmp_path, capsys):
  line = ["train", SMOKE, *gin(MODEL_DIR=f"{tmp_path}/a"), "--dry_run"]
  said = refused(capsys, *line)
  assert "expected a path in quotes, got None; set TEACHER_CHECKPOINT_PATH" in (
    said
  )
  for macro, path in (
    ("STUDENT", "INITIAL_CHECKPOINT_PATH"),
    ("TEACHER", "TEACHER_CHECKPOINT_PATH"),
  ):
    said = refused(capsys, *line, f"--gin.{macro}=None")
    assert f"whose folder has them, got None; set {macro} or {path}" in said


def test_a_run_without_data_says_what_to_set(teacher, tmp_path, capsys):
  task = "--gin.MIXTURE_OR_TASK_NAME=@data.task_of_files()"
  macros = {"MODEL_DIR": f"{tmp_path}/a", "TEACHER_CHECKPOINT_PATH": teacher}
  said = refused(capsys, "train", SMOKE, *gin(**macros), task, "--dry_run")
  assert "got neither; set TRAIN_FILES or MIXTURE_OR_TASK_NAME" in said


# ---- settings that do not fit each other, or what is there ------------------------

UNFIT = [
  (
    "DECODER_PARAMS={'num_decodes': 0}",
    "at least 1, got 0; set DECODER_PARAMS",
  ),
  ("DECODER_PARAMS={'top_p': 2.0}", "got 2.0; set SAMPLING_TOP_P"),
  ("BATCH_SIZE=12", "a multiple of 8 (8 data-parallel devices"),
  ("NUM_MICROBATCHES=3", "8 data-parallel devices x 3 microbatches"),
  ("NUM_PARTITIONS=3", "to divide the 8 devices, got 3; set NUM_PARTITIONS"),
  ("BETA=None", "got none; set BETA"),
  ("DIVERGENCE='forward_kl'", "set DIVERGENCE = 'jsd' or BETA = None"),
  ("MIXTURE_OR_TASK_NAME='aritmetic_cot'", "arithmetic_cot,"),
  ("MIXTURE_OR_TASK_MODULE='nowhere'", "a Python module, got 'nowhere'"),
  ("TEACHER_CHECKPOINT_PATH='/nowhere'", "/nowhere"),
  ("toy/teacher/network.T5Config.vocab_size=32", "24 (student)"),
  ("toy/teacher/network.T5Config.mlp_dim=48", "expected mlp_dim 64, as TEACH"),
  ("toy/student/network.T5Config.num_heads=0", "T5Config.num_heads"),
  ("toy/student/network.T5Config.dtype='float'", "T5Config.dtype"),
  ("toy/student/network.T5Config.remat_policy='all'", "remat_policy"),
  ("toy/network.T5Config.mlp_activations=('swish2',)", "mlp_activations"),
]


@pytest.mark.parametrize(("binding", "said"), UNFIT, ids=lambda x: x[:28])
def test_settings_that_do_not_fit(teacher, tmp_path, capsys, binding, said):
  macros = {
    "MODEL_DIR": f"{tmp_path}/student",
    "TEACHER_CHECKPOINT_PATH": teacher,
  }
  line = ["train", SMOKE, *gin(**macros), f"--gin.{binding}", "--dry_run"]
  assert said in refused(capsys, *line)


# ---- data that cannot be read ------------------------------------------------------

TASKS = """
import pathlib

import seqio
import tensorflow as tf

from gkd_jax.tasks import arithmetic

here = pathlib.Path(__file__).parent
like = seqio.TaskRegistry.get("arithmetic_cot")


def columns(rows):
  split = lambda x: tf.io.decode_csv(x, ["", ""], "\\t", use_quote_delim=False)
  return rows.map(lambda x: dict(zip(("inputs", "targets"), split(x))))


def add(name, text, split="train"):
  if text is not None:
    (here / f"{name}.tsv").write_text(text)
  seqio.TaskRegistry.add(
    f"of_bad_inputs_{name}",
    source=seqio.TextLineDataSource({split: str(here / f"{name}.tsv")}),
    preprocessors=[
      columns,
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features=like.output_features,
    metric_fns=[],
  )


seqio.TaskRegistry.add(
  "of_bad_inputs_prompts",
  source=seqio.TextLineDataSource({"train": str(here / "fine.tsv")}),
  preprocessors=[
    lambda rows: columns(rows).map(lambda x: {"inputs": x["inputs"]}),
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos,
  ],
  output_features=like.output_features,
  metric_fns=[],
)
add("gone", None)
add("columns", "1+1\\t2\\n3\\n")
add("empty", "")
add("fine", "1+1\\t2\\n" * 20)
add("test", "1+1\\t2\\n" * 20, "test")
mixed = ["of_bad_inputs_prompts", "of_bad_inputs_fine"]
seqio.MixtureRegistry.add("of_bad_inputs_mixed", mixed, 1.0)
"""
DATA = [
  ("gone", {}, "gone.tsv; No such file or directory"),
  ("columns", {}, "got 'Expect 2 fields but have 1 in record 0'"),
  ("empty", {}, "enough examples for a batch in the split 'train'"),
  ("test", {}, "a split 'train', got of_bad_inputs_test with ['test']"),
  (
    "mixed",
    {"STUDENT_DATA_FRACTION": 0.5},
    "alone from of_bad_inputs_prompts;",
  ),
  ("fine", {"USE_CACHED_TASKS": True}, "set USE_CACHED_TASKS = False or --seq"),
]


@pytest.fixture(scope="module")
def tasks_of_mine(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tasks")
  (folder / "tasks_of_bad_inputs.py").write_text(TASKS)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    yield "tasks_of_bad_inputs"


@pytest.mark.parametrize(("name", "macros", "said"), DATA, ids=lambda x: str(x))
def test_data(teacher, tasks_of_mine, tmp_path, capsys, name, macros, said):
  settings = {
    "MODEL_DIR": f"{tmp_path}/student",
    "TEACHER_CHECKPOINT_PATH": teacher,
    "MIXTURE_OR_TASK_NAME": f"of_bad_inputs_{name}",
    "MIXTURE_OR_TASK_MODULE": tasks_of_mine,
  }
  line = ["train", SMOKE, *gin(**(settings | macros)), "--dry_run"]
  assert said in refused(capsys, *line)


def test_references_of_prompts_alone(teacher, tasks_of_mine, capsys):
  settings = {
    "CHECKPOINT_PATH": teacher,
    "MIXTURE_OR_TASK_NAME": "of_bad_inputs_prompts",
    "MIXTURE_OR_TASK_MODULE": tasks_of_mine,
    "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 8},
    "OUTPUT_PATH": "out",
    "EVAL_SPLIT": "train",
    "TARGETS": "references",
  }
  files = "models/toy.gin", "runs/teacher_data.gin"
  line = ["infer", *(f"--gin_file={file}" for file in files)]
  line += ["--gin.STUDENT=%TOY_TEACHER", *gin(**settings)]
  said = refused(capsys, *line)
  assert "got prompts alone from of_bad_inputs_prompts" in said
  assert "; set TARGETS = 'outputs'" in said


# ---- the macros of the other run files ---------------------------------------------

OF_RL = {
  "REWARD": (0, None, "x"),
  "ALPHA": (-4, 16.0, None, "x"),
  "SAMPLES_PER_PROMPT": (0, -4, 16.0, None, "x"),
  "BASELINE": (0, None, "leave_two_out"),
  "BASELINE_DECAY": (1, -4, None, "x"),
  "CREDIT": (0, None, "tokens"),
  "DISCOUNT": (0, -4, 16.0, None, "x"),
  "WHITEN_REWARDS": (0, None, "x"),
  "CUT_OUTPUTS": (0, None, "leave"),
  "CUT_PENALTY": (-4, None, "x"),
  "MAX_MISSING_REWARDS": (16.0, -4, None, "x"),
}
OF_DISTILLED = {
  "TEACHER_DATA_PATH": (0, None, ""),
  "ORIGINAL_TASK": (0, None, "", "aritmetic_cot"),
  "DROP_CUT_OUTPUTS": (0, None, "x"),
}
OF_SCORER = {
  "SCORER": (0, None, "toy"),
  "SCORER_CHECKPOINT_PATH": (0, None, ""),
  "SCORER_VOCABULARY": (0, None, "x"),
  "SCORER_INPUT_LENGTH": (1, -4, 16.0, None, "x"),
  "SCORER_BATCH_SIZE": (0, -4, 16.0, None, "x"),
  "SCORER_ANSWERS": (0, None, "10", ("1",), ("1", 0), ("1", "")),
  "SCORER_OVER": (0, None, "answer"),
  "SCORER_WEIGHTS": (0, None, "int4"),
  "SCORER_INPUT_PREFIX": (0, None),
}
OF_FILES = {
  **dict.fromkeys(("TRAIN_FILES", "VALIDATION_FILES", "TEST_FILES"), ("", 0)),
  **dict.fromkeys(
    ("TARGET_FIELD", "PROMPT_TEMPLATE", "VOCABULARY_PATH"), (0, "")
  ),
  "INPUT_FIELD": (0, None, ""),
  "CHAT": (0, None, "True"),
  "METRICS": (0, None, "rogue"),
  "VALIDATION_FRACTION": (1, -4, None, "x"),
  "BAD_LINES": (0, None, "cut"),
  "LONG_LINES": (0, None, "crop"),
}
OF_MINILLM = {
  "TEACHER_MIX": (1, -4, None, "x"),
  "IMPORTANCE": (0, None, "tokens"),
  "NORMALIZE_RETURNS": (0, None, "x"),
}
OF_INFER = {
  "CHECKPOINT_PATH": (0, None, ""),
  "EVAL_NUM_EXAMPLES": (0, -4, 16.0, "x"),
  "USE_CACHED_TASKS": (0, None, "x"),
  "BATCH_SIZE": (0, -4, 16.0, None, "x"),
  "SAMPLING_TEMPERATURE": (-4, None, "x"),
  "SAMPLING_TOP_K": (-4, 16.0, None, "x"),
  "SAMPLING_TOP_P": (0, -4, 16.0, None, "x"),
  "DECODE_SLOTS": (0, -4, 16.0, "x"),
  "SEED": (-4, 16.0, None, "x"),
  "WEIGHTS": (0, None, "int4"),
  "EVAL_SPLIT": (0, None, ""),
  "OUTPUT_PATH": (0, None, ""),
  "NUM_SHARDS": (0, -4, 16.0, None, "x"),
  "NUM_SAMPLES": (0, -4, 16.0, None, "x"),
  "TARGETS": (0, None, "output"),
  "TOP_K": (-4, 16.0, None, "x"),
  "TOP_K_DTYPE": (0, None, "float8"),
  "TEACHER_TEMPERATURE": (0, -4, None, "x"),
}
OF_EVAL = {
  "EVAL_OUTPUT_DIR": (0, None, ""),
  "NUM_SAMPLES": (0, -4, 16.0, None, "x"),
}
TASK = gin(
  MIXTURE_OR_TASK_NAME="arithmetic_cot",
  TASK_FEATURE_LENGTHS={"inputs": 16, "targets": 48},
)
TOY = ["--gin_file=models/toy.gin", "--gin.STUDENT=%TOY_STUDENT", *TASK]
TRAIN = [
  *("train", *TOY, "--gin.TEACHER=%TOY_TEACHER", "--gin.TRAIN_STEPS=2"),
  *("--gin.MODEL_DIR='run'", "--gin.TEACHER_CHECKPOINT_PATH='t'", "--dry_run"),
]
DECODE = [*TOY, "--gin.CHECKPOINT_PATH='c'", "--gin.DROPOUT_RATE=0.0"]
REWARD = "--gin.REWARD=@optimizers.adafactor"
LINES = {
  "rl": ([*TRAIN, "--gin_file=runs/rl_gkd.gin", REWARD], OF_RL),
  "distilled": (
    [
      *(*TRAIN, "--gin_file=runs/gkd.gin"),
      *("--gin_file=runs/distilled_task.gin", "--gin.TEACHER_DATA_PATH='d'"),
      *gin(ORIGINAL_TASK="arithmetic_cot"),
      "--gin.MIXTURE_OR_TASK_NAME=@data.distilled_task()",
    ],
    OF_DISTILLED,
  ),
  "scorer": (
    [
      *(*TRAIN, "--gin_file=runs/rl_gkd.gin", "--gin_file=runs/entailment.gin"),
      *("--gin.SCORER=%TOY_TEACHER", "--gin.SCORER_CHECKPOINT_PATH='s'"),
      "--gin_file=my.gin",
    ],
    OF_SCORER,
  ),
  "minillm": ([*TRAIN, "--gin_file=methods/minillm.gin"], OF_MINILLM),
  "decoder_only": (
    [
      *("train", "--gin_file=experiments/smoke_decoder_only.gin"),
      *(
        "--gin.MODEL_DIR='a'",
        "--gin.TEACHER_CHECKPOINT_PATH='t'",
        "--dry_run",
      ),
    ],
    {"PREFIX_LM": (0, None, "x")},
  ),
  "files": (
    [
      *(*TRAIN, "--gin_file=runs/gkd.gin", "--gin.TRAIN_FILES='a.jsonl'"),
      "--gin.MIXTURE_OR_TASK_NAME=@data.task_of_files()",
    ],
    OF_FILES,
  ),
  "infer": (
    [
      *("infer", *DECODE, "--gin_file=runs/teacher_data.gin"),
      "--gin.OUTPUT_PATH='out'",
    ],
    OF_INFER,
  ),
  "eval": (
    [
      *("eval", *DECODE, "--gin_file=runs/eval.gin"),
      "--gin.EVAL_OUTPUT_DIR='out'",
    ],
    OF_EVAL,
  ),
}


@pytest.mark.parametrize(
  ("name", "macro"),
  [(name, macro) for name, (_, table) in LINES.items() for macro in table],
)
def test_settings_of_other_run_files(tmp_path, capsys, name, macro):
  (tmp_path / "my.gin").write_text(
    "from __gin__ import dynamic_registration\nimport seqio\n"
    "SCORER_VOCABULARY = @seqio.ByteVocabulary()\n"
  )
  line, table = LINES[name]
  for value in table[macro]:
    said = refused(capsys, *line, *gin(**{macro: value}))
    got, _, setting = said.rpartition("; set ")
    assert f", got {value!r}" in got and macro in setting, said


def test_folders_that_cannot_be_written(teacher, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  inside = f"{tmp_path}/file/run"
  for line, macro in (
    ([*TRAIN, "--gin_file=runs/gkd.gin"], "MODEL_DIR"),
    (LINES["infer"][0], "OUTPUT_PATH"),
    (LINES["eval"][0], "EVAL_OUTPUT_DIR"),
  ):
    said = refused(capsys, *line, *gin(**{macro: inside}))
    assert "a folder that can be written, got" in said
    assert f"as {tmp_path}/file is none; set {macro}" in said
  (tmp_path / "file").unlink()


def test_files_that_are_no_run(tmp_path, capsys):
  for line, message in (
    ("report nowhere", "got 'nowhere', which is no folder"),
    ("report .", "a finished run with final.json, or a sweep, got '.'"),
    ("report --output_path=/etc/passwd/x .", "set --output_path"),
    ("sweep --output_dir=/etc/passwd/x --sweep_file=n.toml", "'n.toml'"),
    ("sweep --output_dir=o --axis=BETA --gin_file=a.gin", "got 'BETA'; set --"),
    ("import --checkpoint_path=nowhere --output_path=o", "nothing at"),
  ):
    assert message in refused(capsys, *line.split()), line


# ---- errors that are none of a setting ---------------------------------------------


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch, capsys):
  from gkd_jax import command_line, main

  def fail(args):
    raise ValueError("operands could not be broadcast")

  monkeypatch.setitem(main.COMMANDS, "watch", fail)
  with pytest.raises(SystemExit) as status:
    main.main(["gkd", "watch", "a"])
  said = capsys.readouterr().err
  assert status.value.code == 1
  assert "in fail\n" in said and "ValueError: operands could not be" in said
  assert said.splitlines()[-1].startswith(command_line.version())
  assert "open an issue" in said.splitlines()[-1]


def test_programs_that_do_not_fit_are_a_sentence(monkeypatch, capsys):
  import jax

  from gkd_jax import main

  def fail(args):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")

  monkeypatch.setitem(main.COMMANDS, "watch", fail)
  said = refused(capsys, "watch")
  assert "got RESOURCE_EXHAUSTED: Out of memory; set NUM_MICROBATCHES" in said


def test_gkd_traceback_shows_the_rest(monkeypatch):
  from gkd_jax import main

  monkeypatch.setenv("GKD_TRACEBACK", "1")
  with pytest.raises(ValueError, match="did you mean train"):
    main.main(["gkd", "tarin"])
