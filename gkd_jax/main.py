"""The command line: `gkd COMMAND --gin_file=... --gin.X=...`."""

import inspect
import os
import shlex
import sys
from collections.abc import Sequence

from absl import app, flags, logging

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("gin_file", [], "Gin files, parsed in this order.")
flags.DEFINE_multi_string(
  "gin_bindings", [], "Gin bindings, applied after the files."
)
flags.DEFINE_list(
  "gin_search_paths", [], "Folders in which gin files are looked up as well."
)
flags.DEFINE_string("tfds_data_dir", None, "Folder of TFDS data sets.")
flags.DEFINE_list(
  "seqio_additional_cache_dirs",
  [],
  "Folders in which cached seqio tasks are looked up as well.",
)
flags.DEFINE_bool(
  "dry_run", False, "Builds everything, prints the sizes and stops (train)."
)
flags.DEFINE_bool(
  "multiprocess",
  False,
  "Lets JAX find the other processes (TPU pod, SLURM).",
)
flags.DEFINE_string(
  "coordinator_address", None, "Address of process 0 (host:port)."
)
flags.DEFINE_integer("process_count", None, "Number of processes.")
flags.DEFINE_integer("process_index", None, "Index of this process, from 0.")
flags.DEFINE_integer(
  "lost_after_s",
  40,
  "Seconds without a heartbeat after which a process counts as lost.",
  lower_bound=1,
)
flags.DEFINE_string(
  "compilation_cache_dir",
  None,
  "Folder of the cache of compiled programs, empty for none. The default is"
  " JAX_COMPILATION_CACHE_DIR, or gkd_jax in the user's cache folder.",
)
flags.DEFINE_string(
  "checkpoint_path", None, "Checkpoint to read (import, export)."
)
flags.DEFINE_string(
  "output_path",
  None,
  "Folder to write (import, export, report, precompile).",
)
flags.DEFINE_string(
  "markdown",
  None,
  "Markdown file to write as well, its pictures in the folder beside it"
  " (report).",
)
flags.DEFINE_string(
  "format", "gkd", "Format to write: gkd, t5x or hf (export)."
)
flags.DEFINE_enum(
  "dtype",
  None,
  ["bfloat16", "float16", "float32"],
  "Type to store the parameters in; the default is the type that they have"
  " (import, export).",
)
flags.DEFINE_string(
  "vocabulary_path",
  None,
  "SentencePiece model of the tokenizer (export to hf).",
)
flags.DEFINE_integer(
  "extra_ids", 100, "Number of sentinels after its pieces (export to hf)."
)
flags.DEFINE_multi_string(
  "axis",
  [],
  "Axis of the grid: NAME=value,value of a macro, or gin_file=file,file"
  " (sweep).",
)
flags.DEFINE_integer(
  "seeds", None, "Number of seeds, counted from 0; the default is 1 (sweep)."
)
flags.DEFINE_string(
  "sweep_file", None, "TOML file that defines the grid instead (sweep)."
)
flags.DEFINE_string("output_dir", None, "Folder of all runs (sweep).")
flags.DEFINE_integer(
  "jobs", 1, "Number of runs at the same time (sweep).", lower_bound=1
)
flags.DEFINE_bool(
  "print_commands", False, "Prints each run's command, runs none (sweep)."
)
flags.DEFINE_string(
  "topology",
  None,
  "Devices to compile for, such as v5e:4x4, 2xv5e:4x4 (two slices) or cpu:8;"
  " the default is this machine's (precompile).",
)
flags.DEFINE_string("title", None, "Title of the report (precompile).")
flags.DEFINE_list(
  "phases",
  None,
  "Programs to compile, of sampling, teacher, data, student and mixed; the"
  " default is all of the run (precompile).",
)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs a command; a wrong setting is one sentence and exit status 2."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  logging.use_absl_handler()
  app.define_help_flags()
  _, *words = app.parse_flags_with_usage(_gin_flags(argv or sys.argv))
  # Orbax logs each of its steps. What a user wants to read is printed by us.
  logging.set_verbosity(logging.WARNING)
  try:
    command, *arguments = words or [None]
    if command not in COMMANDS:
      raise ValueError(
        f"expected a mode of {', '.join(COMMANDS)}, got {command!r};"
        " run `gkd MODE --gin_file=...`"
      )
    run = COMMANDS[command]
    if arguments and not inspect.signature(run).parameters:
      raise ValueError(
        f"expected flags after {command}, got {shlex.join(arguments)};"
        f" run `gkd {command} --gin_file=...`"
      )
    run(*arguments)
  except (ValueError, ImportError, FloatingPointError) as error:
    if os.environ.get("GKD_TRACEBACK"):
      raise
    print(f"gkd: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    sys.exit(130)


def _gin_flags(argv: Sequence[str]) -> list[str]:
  """Rewrites `--gin.X=Y`, as in T5X, to the binding `X = Y`."""
  rewritten = []
  for argument in argv:
    if argument.startswith("--gin."):
      name, _, value = argument[len("--gin.") :].partition("=")
      argument = f"--gin_bindings={name} = {value}"
    rewritten.append(argument)
  return rewritten


# ---- commands that gin configures --------------------------------------------


def _train():
  _start()
  import jax

  import gin
  from gkd_jax import gin_utils, train

  if FLAGS.dry_run:
    print(gin.config_str())
  elif jax.process_index() == 0:
    gin_utils.save()
  gin.get_configurable(train.train)(dry_run=FLAGS.dry_run)


def _eval():
  _start()
  import gin
  from gkd_jax import infer

  gin.get_configurable(infer.evaluate_checkpoint)()


def _infer():
  _start()
  import gin
  from gkd_jax import infer

  gin.get_configurable(infer.infer)()


def _precompile():
  from gkd_jax.planning import topologies

  # Before anything else initializes JAX with this machine's devices.
  devices, chip = topologies.devices(FLAGS.topology)
  _parse_gin()
  from gkd_jax import gin_utils, train
  from gkd_jax.planning import precompile

  about = {"command": shlex.join(["gkd", *sys.argv[1:]])}
  if FLAGS.title:
    about["title"] = FLAGS.title
  precompile.precompile(
    **gin_utils.bindings(train.train, precompile.SETTINGS),
    devices=devices,
    chip=chip,
    topology=FLAGS.topology or devices[0].device_kind,
    phases=FLAGS.phases,
    output_path=FLAGS.output_path,
    about=about,
  )


def _start() -> None:
  """Joins the other processes and parses gin's files and bindings."""
  if FLAGS.coordinator_address or FLAGS.multiprocess:
    from gkd_jax.training import processes

    processes.initialize(
      FLAGS.coordinator_address,
      FLAGS.process_count,
      FLAGS.process_index,
      FLAGS.lost_after_s,
    )
  _parse_gin()
  from gkd_jax.training import logs

  logs.use_cache(FLAGS.compilation_cache_dir)


def _parse_gin() -> None:
  from gkd_jax import gin_utils

  gin_utils.parse(FLAGS.gin_file, FLAGS.gin_bindings, FLAGS.gin_search_paths)
  if FLAGS.tfds_data_dir or FLAGS.seqio_additional_cache_dirs:
    import seqio

    seqio.set_tfds_data_dir_override(FLAGS.tfds_data_dir)
    seqio.add_global_cache_dirs(FLAGS.seqio_additional_cache_dirs)


# ---- commands on runs, files and checkpoints ---------------------------------


def _sweep():
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
  if FLAGS.seqio_additional_cache_dirs:
    folders = ",".join(FLAGS.seqio_additional_cache_dirs)
    options.append(f"--seqio_additional_cache_dirs={folders}")
  if FLAGS.print_commands:
    print(sweep_runner.commands(cells, output, options))
  elif not sweep_runner.run(cells, output, jobs=FLAGS.jobs, options=options):
    sys.exit(1)


def _report(*runs: str):
  from gkd_jax.experiments import report_page

  report_page.report(runs, FLAGS.output_path or ".", FLAGS.markdown)


def _watch(*runs: str):
  from gkd_jax.experiments import watch

  watch.watch(runs)


def _compare(*outputs: str):
  from gkd_jax.evaluation import compare

  print(compare.report(outputs))


def _path(*names: str):
  from gkd_jax.tasks import shipped

  print(shipped.model_path(*names))


def _import():
  from gkd_jax.checkpoints import export

  _check_paths()
  config = export.import_checkpoint(
    FLAGS.checkpoint_path, FLAGS.output_path, dtype=FLAGS.dtype
  )
  print(f"imported into {FLAGS.output_path}: {config}", flush=True)


def _export():
  from gkd_jax.checkpoints import export
  from gkd_jax.experiments import model_card

  _check_paths()
  export.export_checkpoint(
    FLAGS.checkpoint_path,
    FLAGS.output_path,
    format=FLAGS.format,
    dtype=FLAGS.dtype,
    vocabulary_path=FLAGS.vocabulary_path,
    extra_ids=FLAGS.extra_ids,
    card=model_card.write,
  )


def _check_paths():
  if not FLAGS.checkpoint_path or not FLAGS.output_path:
    raise ValueError(
      "expected a checkpoint and an output folder, got"
      f" {FLAGS.checkpoint_path!r} and {FLAGS.output_path!r};"
      " set --checkpoint_path and --output_path"
    )


COMMANDS = {
  "train": _train,
  "eval": _eval,
  "infer": _infer,
  "precompile": _precompile,
  "compare": _compare,
  "sweep": _sweep,
  "import": _import,
  "export": _export,
  "report": _report,
  "watch": _watch,
  "path": _path,
}


if __name__ == "__main__":
  main()
