"""The command line: `gkd train|eval|infer|precompile|fit|compare|sweep|import|export|report --gin_file=... --gin.X=...`."""

import os
import shlex
import sys

from absl import app, flags, logging

FLAGS = flags.FLAGS
MODES = (
  "train",
  "eval",
  "infer",
  "precompile",
  "fit",
  "compare",
  "sweep",
  "import",
  "export",
  "report",
  "path",
)
flags.DEFINE_multi_string("gin_file", [], "gin files, in order")
flags.DEFINE_multi_string("gin_bindings", [], "gin bindings, after the files")
flags.DEFINE_list("gin_search_paths", [], "further folders of gin files")
flags.DEFINE_string("tfds_data_dir", None, "folder of TFDS data")
flags.DEFINE_bool("dry_run", False, "build everything, print sizes, and stop")
flags.DEFINE_bool(
  "multiprocess", False, "jax.distributed, with what JAX finds (TPU pod, SLURM)"
)
flags.DEFINE_string("coordinator_address", None, "of jax.distributed")
flags.DEFINE_integer("process_count", None, "of jax.distributed")
flags.DEFINE_integer("process_index", None, "of jax.distributed")
flags.DEFINE_integer(
  "lost_after_s",
  40,
  "seconds of silence after which one of several processes counts as lost",
  lower_bound=1,
)
flags.DEFINE_string(
  "compilation_cache_dir",
  None,
  "folder of compiled programs; empty for none; by default"
  " JAX_COMPILATION_CACHE_DIR, or gkd_jax in the user's cache",
)
flags.DEFINE_string("checkpoint_path", None, "import, export: what to read")
flags.DEFINE_string(
  "output_path",
  None,
  "import, export, report, precompile, fit: folder to write",
)
flags.DEFINE_string(
  "markdown",
  None,
  "report: also this file, pictures in the folder beside it",
)
flags.DEFINE_string("format", "gkd", "export: gkd, t5x or hf")
flags.DEFINE_enum(
  "dtype",
  None,
  ["bfloat16", "float16", "float32"],
  "import, export: what parameters are stored in; without it, as they are read",
)
flags.DEFINE_string(
  "vocabulary_path", None, "export to hf: SentencePiece model of the tokenizer"
)
flags.DEFINE_integer(
  "extra_ids", 100, "export to hf: sentinels after its pieces"
)
flags.DEFINE_multi_string(
  "axis", [], "sweep: NAME=value,value of a macro, or gin_file=file,file"
)
flags.DEFINE_integer("seeds", None, "sweep: how many, from 0; 1 by default")
flags.DEFINE_string("sweep_file", None, "sweep: TOML in place of --axis")
flags.DEFINE_string("output_dir", None, "sweep: folder of all cells")
flags.DEFINE_integer("jobs", 1, "sweep: cells at a time", lower_bound=1)
flags.DEFINE_bool(
  "print_commands", False, "sweep: print a command for each cell, run none"
)
flags.DEFINE_string(
  "topology",
  None,
  "precompile, fit: such as v5e:4x4, 2xv5e:4x4 (two slices) or cpu:8; else this"
  " machine",
)
flags.DEFINE_string("title", None, "precompile, fit: of the report")
flags.DEFINE_list(
  "model_axis", None, "fit: its sizes to try; all that are possible by default"
)
flags.DEFINE_integer(
  "compiled_whole",
  3,
  "fit: how many that fit are compiled whole",
  lower_bound=1,
)
flags.DEFINE_list(
  "phases", None, "precompile: of sampling, teacher, data, student, mixed"
)


def _gin_flags(argv):
  """`--gin.X=Y` is the binding `X = Y`, as in T5X."""
  rewritten = []
  for argument in argv:
    if argument.startswith("--gin."):
      name, _, value = argument[len("--gin.") :].partition("=")
      argument = f"--gin_bindings={name} = {value}"
    rewritten.append(argument)
  return rewritten


def _run(argv):
  # Orbax tells each of its steps; what a user wants to read is printed by us.
  logging.set_verbosity(logging.WARNING)
  mode = argv[1] if len(argv) > 1 else None
  if mode not in MODES:
    raise ValueError(
      f"expected a mode of {', '.join(MODES)}, got {mode!r};"
      " run `gkd MODE --gin_file=...`"
    )
  if FLAGS.coordinator_address or FLAGS.multiprocess:
    from gkd_jax.training import processes

    processes.initialize(
      FLAGS.coordinator_address,
      FLAGS.process_count,
      FLAGS.process_index,
      FLAGS.lost_after_s,
    )
  if FLAGS.tfds_data_dir:
    import seqio

    seqio.set_tfds_data_dir_override(FLAGS.tfds_data_dir)
  if mode in ("import", "export"):
    _convert(mode)
    return
  if mode == "compare":
    from gkd_jax.evaluation import compare

    print(compare.report(argv[2:]))
    return
  if mode == "path":
    from gkd_jax.tasks import shipped

    print(shipped.model_path(*argv[2:]))
    return
  if mode in ("precompile", "fit"):
    _compile_only(mode)
    return
  if mode == "sweep":
    _sweep()
    return
  if mode == "report":
    from gkd_jax.experiments import report_page

    report_page.report(argv[2:], FLAGS.output_path or ".", FLAGS.markdown)
    return
  _run_configured(mode)


def _run_configured(mode):
  """What gin files bind: train, eval or infer."""
  import gin
  from gkd_jax import gin_utils, infer, train
  from gkd_jax.training import logs

  logs.use_cache(FLAGS.compilation_cache_dir)
  gin_utils.parse(FLAGS.gin_file, FLAGS.gin_bindings, FLAGS.gin_search_paths)
  if mode == "train":
    if FLAGS.dry_run:
      print(gin.config_str())
    else:
      gin_utils.save()
    gin.get_configurable(train.train)(dry_run=FLAGS.dry_run)
  elif mode == "eval":
    gin.get_configurable(infer.evaluate_checkpoint)()
  else:
    gin.get_configurable(infer.infer)()


def _compile_only(mode):
  """Compiles what `train` would run, for other devices, and says what it needs."""
  from gkd_jax.planning import topologies

  # First of all: JAX is told what not to look for.
  devices, chip = topologies.devices(FLAGS.topology)
  from gkd_jax import gin_utils, train
  from gkd_jax.planning import fit, precompile

  gin_utils.parse(FLAGS.gin_file, FLAGS.gin_bindings, FLAGS.gin_search_paths)
  settings = gin_utils.bindings(train.train, precompile.SETTINGS) | {
    "devices": devices,
    "chip": chip,
    "topology": FLAGS.topology or devices[0].device_kind,
    "output_path": FLAGS.output_path,
    "about": {"command": shlex.join(["gkd", *sys.argv[1:]])},
  }
  if FLAGS.title:
    settings["about"]["title"] = FLAGS.title
  if mode == "fit":
    fit.fit(
      **settings,
      model_axis=_numbers("model_axis"),
      compiled_whole=FLAGS.compiled_whole,
    )
  else:
    precompile.precompile(**settings, phases=FLAGS.phases)


def _numbers(flag):
  """A flag that is a list of whole numbers, or None."""
  given = getattr(FLAGS, flag)
  if given is None:
    return None
  if not all(number.isdecimal() for number in given):
    raise ValueError(
      f"expected whole numbers, got {','.join(given)}; set --{flag}"
    )
  return [int(number) for number in given]


def _sweep():
  """Runs a grid, or prints its commands."""
  from gkd_jax import files, gin_utils
  from gkd_jax.experiments import sweep_runner, sweeps

  if not FLAGS.output_dir:
    raise ValueError("expected a folder for the cells; set --output_dir")
  folders = [*FLAGS.gin_search_paths, gin_utils.shipped_gin()]
  if FLAGS.sweep_file:
    if FLAGS.axis or FLAGS.gin_file:
      raise ValueError(
        "expected a sweep file or flags, got both; set gin_file and axes in"
        f" {FLAGS.sweep_file}"
      )
    definition = sweeps.read(FLAGS.sweep_file, folders)
    if FLAGS.seeds is not None:
      definition["seeds"] = FLAGS.seeds
  else:
    definition = sweeps.from_flags(FLAGS.gin_file, FLAGS.axis, FLAGS.seeds or 1)
  cells = sweeps.cells(definition, FLAGS.gin_bindings)
  output = os.fspath(files.absolute(FLAGS.output_dir))
  if files.is_remote(output):
    raise ValueError(
      "expected a local folder for the cells, which run on this machine under"
      f" locks and logs, got {output}; set --output_dir"
    )
  left = [cell for cell in cells if not sweep_runner.is_finished(cell, output)]
  sweep_runner.check_cells(left, output, FLAGS.gin_search_paths)
  sweep_runner.prepare(cells, output, definition.get("report", {}))
  options = []
  if FLAGS.gin_search_paths:
    options.append(f"--gin_search_paths={','.join(FLAGS.gin_search_paths)}")
  if FLAGS.tfds_data_dir:
    options.append(f"--tfds_data_dir={FLAGS.tfds_data_dir}")
  if FLAGS.print_commands:
    print(sweep_runner.commands(cells, output, options))
  elif not sweep_runner.run(cells, output, jobs=FLAGS.jobs, options=options):
    sys.exit(1)


def _convert(mode):
  """Checkpoint -> our safetensors folder, or another program's format."""
  from gkd_jax.checkpoints import export
  from gkd_jax.experiments import model_card

  if not FLAGS.checkpoint_path or not FLAGS.output_path:
    raise ValueError(
      "expected a checkpoint and an output folder, got"
      f" {FLAGS.checkpoint_path!r} and {FLAGS.output_path!r};"
      " set --checkpoint_path and --output_path"
    )
  if mode == "import":
    config = export.import_checkpoint(
      FLAGS.checkpoint_path, FLAGS.output_path, dtype=FLAGS.dtype
    )
    print(f"imported into {FLAGS.output_path}: {config}", flush=True)
    return
  export.export_checkpoint(
    FLAGS.checkpoint_path,
    FLAGS.output_path,
    format=FLAGS.format,
    dtype=FLAGS.dtype,
    vocabulary_path=FLAGS.vocabulary_path,
    extra_ids=FLAGS.extra_ids,
    card=model_card.write,
  )


def main():
  """Entry point of the console script `gkd`."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  try:
    app.run(_main_or_error, argv=_gin_flags(sys.argv))
  except KeyboardInterrupt:
    sys.exit(130)


def _main_or_error(argv):
  # A wrong setting is one sentence, not a traceback.
  try:
    _run(argv)
  except (ValueError, ImportError, FloatingPointError) as error:
    if os.environ.get("GKD_TRACEBACK"):
      raise
    print(f"gkd: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
