"""The command line: `gkd COMMAND --gin_file=... --gin.X=...`.

Imports nothing heavy: what is wrong with flags and gin files is said at once.
"""

import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from gkd_jax import command_line


def main(argv: Sequence[str] | None = None) -> None:
  """Runs a command; a wrong setting is one sentence and exit status 2."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  _, *words = argv or sys.argv
  try:
    args = _parsed(words)
    if args:
      COMMANDS[args.command](args)
  except KeyboardInterrupt:
    print("gkd: interrupted", file=sys.stderr)
    sys.exit(130)
  except Exception as error:
    if os.environ.get("GKD_TRACEBACK"):
      raise
    sentence = _sentence(error)
    if sentence is None:
      traceback.print_exc()
      print(
        f"{command_line.version()}: this error is none that it expects of a"
        " wrong setting. If it is not of your own code, open an issue with the"
        " lines above, the command and its gin files.",
        file=sys.stderr,
      )
      sys.exit(1)
    print(f"gkd: {sentence}", file=sys.stderr)
    sys.exit(2)


def _parsed(words: Sequence[str]) -> Any:
  """Returns a command's flags; None if help or the version was printed."""
  name, *rest = words or ["--help"]
  if name in ("-h", "--help", "help"):
    print(command_line.of_all())
    return None
  if name in ("-V", "--version"):
    print(command_line.version())
    return None
  args = command_line.parse(name, rest)
  if args.help:
    given = [getattr(args, f, []) for f in ("gin_file", "gin_bindings")]
    paths = getattr(args, "gin_search_paths", [])
    print(command_line.of_command(name, *given, paths))
    return None
  args.command, args.line = name, command_line.shell_line(["gkd", *words])
  return args


def _sentence(error: Exception) -> str | None:
  """Returns an error of the user in one sentence; None for another error."""
  if isinstance(error, OSError) and error.filename:
    return (
      f"expected a file or folder that can be used, got {error.filename!r}"
      f" ({error.strerror}); set another path, or its rights"
    )
  text = str(error).partition("\n")[0]
  if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text:
    return (
      f"expected programs that fit into the devices' memory, got {text}; set"
      " NUM_MICROBATCHES, REMAT_POLICY, SHARD_PARAMS_OVER_DATA or what else"
      " docs/settings.md names, and try it with `gkd precompile`"
    )
  if not isinstance(error, ValueError | ImportError | FloatingPointError):
    return None
  # Gin adds what it was building.
  text = str(error).partition("\n  In call to configurable ")[0]
  return text if re.match(r"(\S+: )?expected ", text) else None


# ---- commands that gin configures --------------------------------------------


def _train(args):
  _start(args)
  import gin
  from gkd_jax import train
  from gkd_jax.command_line import gin_settings

  gin_settings.check_values(train.train)
  if args.dry_run:
    files = args.gin_file, args.gin_bindings, args.gin_search_paths
    print(command_line.of_run(*files) + "\n")
  line = " ".join(args.line.splitlines())
  gin.get_configurable(train.train)(
    # What made the run, for whoever finds its folder.
    config=f"# {line}\n# {command_line.version()}\n\n{gin.config_str()}",
    dry_run=args.dry_run,
  )


def _eval(args):
  _start(args)
  import gin
  from gkd_jax import infer
  from gkd_jax.command_line import gin_settings

  gin_settings.check_values(infer.evaluate_checkpoint)
  gin.get_configurable(infer.evaluate_checkpoint)()


def _infer(args):
  _start(args)
  import gin
  from gkd_jax import infer
  from gkd_jax.command_line import gin_settings

  gin_settings.check_values(infer.infer)
  gin.get_configurable(infer.infer)()


def _precompile(args):
  _check_gin(args)
  from gkd_jax import files

  if args.output_path:
    files.check_folder(args.output_path, "--output_path")
  from gkd_jax.planning import topologies

  # Before anything else initializes JAX with this machine's devices.
  devices, chip = topologies.devices(args.topology)
  _parse_gin(args)
  from gkd_jax import train
  from gkd_jax.command_line import gin_settings
  from gkd_jax.planning import precompile

  about = {"command": args.line}
  if args.title:
    about["title"] = args.title
  precompile.precompile(
    **gin_settings.bindings(train.train, precompile.SETTINGS),
    devices=devices,
    chip=chip,
    topology=args.topology or devices[0].device_kind,
    phases=args.phases,
    output_path=args.output_path,
    about=about,
  )


def _check_gin(args: Any) -> None:
  """Checks gin's files and bindings as text, before the heavy imports."""
  from gkd_jax.command_line import gin_files

  if not args.gin_file and not args.gin_bindings:
    command = f"gkd {args.command}"
    first = command_line.COMMANDS[args.command].run_files[0]
    raise ValueError(
      f"expected gin files, got none; run `{command} --gin_file={first} ...`, or"
      f" see the example of `{command} --help`"
    )
  gin_files.check_read(
    gin_files.read(args.gin_file, args.gin_bindings, args.gin_search_paths)
  )


def _start(args: Any) -> None:
  """Joins the other processes and parses gin's files and bindings."""
  _check_gin(args)
  from absl import flags, logging

  # Tasks of others may define flags of absl; none is given here.
  flags.FLAGS.mark_as_parsed()
  # Orbax logs each of its steps. What a user wants to read is printed by us.
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  if args.coordinator_address or args.multiprocess:
    from gkd_jax.training import processes

    processes.initialize(
      args.coordinator_address,
      args.process_count,
      args.process_index,
      args.lost_after_s,
    )
  _parse_gin(args)
  from gkd_jax.training import logs

  logs.use_cache(args.compilation_cache_dir)


def _parse_gin(args):
  from gkd_jax import files
  from gkd_jax.command_line import gin_settings

  gin_settings.parse(args.gin_file, args.gin_bindings, args.gin_search_paths)
  data_dir = args.tfds_data_dir and files.expanded(args.tfds_data_dir)
  cache_dirs = [*map(files.expanded, args.seqio_additional_cache_dirs or ())]
  if data_dir or cache_dirs:
    import seqio

    seqio.set_tfds_data_dir_override(data_dir)
    seqio.add_global_cache_dirs(cache_dirs)


# ---- commands on runs, files and checkpoints ---------------------------------


def _sweep(args):
  from gkd_jax.command_line import gin_files
  from gkd_jax.experiments import sweep_runner, sweeps

  if not args.gin_file and not args.sweep_file:
    raise ValueError(
      "expected gin files or a sweep file, got none; set --gin_file or"
      " --sweep_file"
    )
  if not args.sweep_file:
    definition = sweeps.from_flags(args.gin_file, args.axis, args.seeds or 1)
  elif args.axis or args.gin_file:
    raise ValueError(
      "expected a sweep file or flags, got both; set gin_file and axes in"
      f" {args.sweep_file}"
    )
  else:
    folders = [*args.gin_search_paths, gin_files.shipped()]
    definition = sweeps.read(args.sweep_file, folders)
    if args.seeds is not None:
      definition["seeds"] = args.seeds
  # `sweep.json` keeps the settings of the report.
  definition["report"] = definition.get("report", {}) | {"command": args.line}
  options = []
  if args.tfds_data_dir:
    options.append(f"--tfds_data_dir={args.tfds_data_dir}")
  if args.seqio_additional_cache_dirs:
    folders = ",".join(args.seqio_additional_cache_dirs)
    options.append(f"--seqio_additional_cache_dirs={folders}")
  finished = sweep_runner.sweep(
    definition,
    args.output_dir,
    bindings=args.gin_bindings,
    search_paths=args.gin_search_paths,
    options=options,
    jobs=args.jobs,
    print_commands=args.print_commands,
  )
  if not finished:
    sys.exit(1)


def _report(args):
  from gkd_jax import files

  if not args.words:
    raise ValueError(
      "expected at least one finished run, got none; run `gkd report RUN ...`"
    )
  files.check_folder(args.output_path or ".", "--output_path")
  from gkd_jax.experiments import report_page

  report_page.report(args.words, args.output_path or ".", args.markdown)


def _watch(args):
  from gkd_jax.experiments import watch

  watch.watch(args.words)


def _compare(args):
  if len(args.words) != 2:
    raise ValueError(
      f"expected two folders of evaluations, got {len(args.words)};"
      " run `gkd compare A B`"
    )
  from gkd_jax.command_line import gin_settings

  gin_settings.import_tensorflow()
  from gkd_jax.evaluation import compare

  print(compare.table(compare.compare(*args.words)))


def _path(args):
  from gkd_jax.tasks import shipped

  if len(args.words) != 1:
    raise ValueError(
      f"expected one of {', '.join(shipped.names())}, got"
      f" {shlex.join(args.words) or 'nothing'}; run `gkd path NAME`"
    )
  print(shipped.model_path(args.words[0], "NAME of `gkd path NAME`"))


def _import(args):
  _check_paths(args)
  from gkd_jax.checkpoints import export

  config = export.import_checkpoint(
    args.checkpoint_path,
    args.output_path,
    dtype=args.dtype,
    layers=args.layers,
    encoder_layers=args.encoder_layers,
  )
  print(f"imported into {args.output_path}: {config}", flush=True)


def _export(args):
  _check_paths(args)
  from gkd_jax.checkpoints import export
  from gkd_jax.experiments import model_card

  export.export_checkpoint(
    args.checkpoint_path,
    args.output_path,
    format=args.format,
    dtype=args.dtype,
    vocabulary_path=args.vocabulary_path,
    extra_ids=args.extra_ids,
    card=model_card.write,
  )
  print(
    f"exported {args.checkpoint_path} to {args.output_path}, in format"
    f" {args.format}",
    flush=True,
  )


def _check_paths(args):
  from gkd_jax import files

  if not args.checkpoint_path or not args.output_path:
    raise ValueError(
      "expected a checkpoint and an output folder, got"
      f" {args.checkpoint_path!r} and {args.output_path!r};"
      " set --checkpoint_path and --output_path"
    )
  files.check_folder(args.output_path, "--output_path")


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
