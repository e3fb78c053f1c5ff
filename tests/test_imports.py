"""Imports point downward, and the step needs no TensorFlow."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = (
  (
    "types",
    "mesh_axes",
    "divergence_terms",
    "divergences",
    "losses",
    "rewards",
    "stored_targets",
    "chips",
    "hlo_text",
    "hlo_collectives",
    "hlo_costs",
    "precompile_report",
    "fit_report",
    "program_files",
    "fused_chunks",
    "fused_loss",
    "buckets",
    "decode_loops",
    "sampling",
    "instruments",
    "significance",
    "beam_search",
    "decoding",
    "products",
    "schedules",
  ),
  (
    "layers",
    "layer_loops",
    "network",
    "decoder_only_network",
    "partitioning",
    "projections",
  ),
  (
    "base_model",
    "importance",
    "encoder_decoder",
    "decoder_only",
    "gkd_settings",
    "models",
    "reinforce",
    "minillm",
    "stored_teacher",
    "train_state",
    "optimizers",
    "depths",
    "placement",
    "topologies",
  ),
  (
    "data",
    "cut_inputs",
    "feature_converters",
    "checkpoints",
    "checkpoint_errors",
    "checkpoint_formats",
    "checkpoint_iterators",
    "entailment",
    "export",
    "import_hf",
    "import_t5x",
    "layer_stacks",
    "model_card",
    "output_folders",
    "parameter_table",
    "paths",
    "safetensors_io",
    "shards",
    "stored_arrays",
    "stored_weights",
    "tensorstore_io",
  ),
  (
    "trainer",
    "evaluate",
    "measurements",
    "comparisons",
    "fit",
    "infer",
    "precompile",
    "rollouts",
    "sample_ahead",
    "teacher_data",
    "teacher_records",
    "train",
    "logs",
    "preemption",
    "preemption_notice",
    "compilation",
    "processes",
  ),
  (
    "main",
    "cell_table",
    "figures",
    "figures_behaviour",
    "gin_utils",
    "report_data",
    "report_page",
    "report_tables",
    "scale_table",
    "reports",
    "sweep_check",
    "sweep_runner",
    "sweeps",
  ),
)
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}


def _imports(path):
  """Names of gkd_jax modules that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split(".")
      if parts[0] == "gkd_jax":
        found |= {parts[1]} if parts[1:] else {a.name for a in node.names}
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith("gkd_jax."):
          found.add(alias.name.split(".")[1])
  return found


def test_every_module_has_a_layer():
  modules = {p.stem for p in (ROOT / "gkd_jax").glob("*.py")} - {"__init__"}
  assert modules == set(LEVEL)


def test_imports_point_downward():
  for name, level in LEVEL.items():
    for other in _imports(ROOT / "gkd_jax" / f"{name}.py") & set(LEVEL):
      assert LEVEL[other] <= level, f"{name} imports {other}, which is above it"


def test_adapters_are_on_top_and_alone_import_what_they_adapt():
  importers = {
    path.relative_to(ROOT / "gkd_jax").as_posix()
    for path in (ROOT / "gkd_jax").rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ImportFrom | ast.Import)
    for name in [getattr(node, "module", None) or node.names[0].name]
    if name.split(".")[0] == "t5x"
  }
  assert importers == {"adapters/t5x.py"}
  for name in LEVEL:
    assert "adapters" not in _imports(ROOT / "gkd_jax" / f"{name}.py"), name


def test_tasks_import_nothing_of_the_package_but_tasks():
  for path in (ROOT / "tasks").glob("*.py"):
    assert _imports(path) <= {"tasks"}, path


def test_the_step_imports_without_tensorflow():
  code = (
    "import sys\n"
    "from gkd_jax import trainer, models\n"
    "heavy = {'tensorflow', 'seqio', 'gin', 'orbax', 't5x'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
