"""Launches the CLI as an XManager experiment on Vertex AI.

  pip install xmanager
  xmanager launch launch/xmanager.py -- --gin_file=... --gin.MODEL_DIR=\\"gs://...\\"

`DRY_RUN=1 python launch/xmanager.py ...` prints the command and needs no
XManager. One machine: Vertex AI's TPUs and GPUs of one host.
"""

import os
import shlex
import sys


def command(arguments):
  """The command line that the container runs."""
  return ["gkd", "train", *arguments]


def main(argv):
  """Launches one job on Vertex AI, or with DRY_RUN prints its command.

  Args:
    argv: the program's name, then what `gkd train` gets.
  """
  if os.environ.get("DRY_RUN"):
    print(shlex.join(command(argv[1:])))
    return
  from xmanager import xm, xm_local

  with xm_local.create_experiment(experiment_title="gkd") as experiment:
    packaged = xm.PythonContainer(
      path=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
      base_image="python:3.11",
      entrypoint=xm.CommandList(
        ["pip install -q '.[gpu]'", f'{shlex.join(command(argv[1:]))} "$@"']
      ),
    )
    executor = xm_local.Vertex(requirements=xm.JobRequirements(a100=1))
    [executable] = experiment.package(
      [xm.Packageable(packaged, executor.Spec())]
    )
    experiment.add(xm.Job(executable=executable, executor=executor))


if __name__ == "__main__":
  if os.environ.get("DRY_RUN"):
    main(sys.argv)
  else:
    from absl import app

    app.run(main)
