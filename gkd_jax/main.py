"""The command line: `gkd train|eval|infer|export|report --gin_file=... --gin.X=...`."""

import os
import sys

from absl import app, flags, logging

FLAGS = flags.FLAGS
MODES = ("train", "eval", "infer", "export", "report", "path")

flags.DEFINE_multi_string("gin_file", [], "gin files, in order")
flags.DEFINE_multi_string("gin_bindings", [], "gin bindings, after the files")
flags.DEFINE_list("gin_search_paths", [], "further folders of gin files")
flags.DEFINE_string("tfds_data_dir", None, "folder of TFDS data")
flags.DEFINE_bool("dry_run", False, "build everything, print sizes, and stop")
flags.DEFINE_string("coordinator_address", None, "of jax.distributed")
flags.DEFINE_integer("process_count", None, "of jax.distributed")
flags.DEFINE_integer("process_index", None, "of jax.distributed")
flags.DEFINE_string("checkpoint_path", None, "export: what to read")
flags.DEFINE_string("output_path", None, "export: folder to write")
flags.DEFINE_enum(
  "dtype",
  None,
  ["bfloat16", "float16", "float32"],
  "export: what parameters are stored in; without it, as they are read",
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
  if FLAGS.coordinator_address:
    import jax

    jax.distributed.initialize(
      FLAGS.coordinator_address, FLAGS.process_count, FLAGS.process_index
    )
  if FLAGS.tfds_data_dir:
    import seqio

    seqio.set_tfds_data_dir_override(FLAGS.tfds_data_dir)
  if mode == "export":
    _export()
    return
  if mode == "path":
    from gkd_jax.tasks import shipped

    print(shipped.model_path(*argv[2:]))
    return
  if mode == "report":
    from gkd_jax import reports

    reports.report(argv[2:], FLAGS.output_path or ".")
    return
  import gin
  from gkd_jax import gin_utils, infer, train

  gin_utils.parse(FLAGS.gin_file, FLAGS.gin_bindings, FLAGS.gin_search_paths)
  if mode == "train":
    if FLAGS.dry_run:
      print(gin.config_str())
    gin.get_configurable(train.train)(dry_run=FLAGS.dry_run)
  else:
    gin.get_configurable(infer.infer)()


def _export():
  """Newest checkpoint of a run -> safetensors and config.json."""
  from gkd_jax import checkpoints

  if not FLAGS.checkpoint_path or not FLAGS.output_path:
    raise ValueError(
      "expected a checkpoint and an output folder, got"
      f" {FLAGS.checkpoint_path!r} and {FLAGS.output_path!r};"
      " set --checkpoint_path and --output_path"
    )
  checkpoints.save_safetensors(
    FLAGS.output_path,
    checkpoints.load_params(FLAGS.checkpoint_path, dtype=FLAGS.dtype),
    checkpoints.load_config(FLAGS.checkpoint_path) or {},
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
