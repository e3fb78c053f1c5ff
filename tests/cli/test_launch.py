"""Job files: each dry run gives the command line that `gkd train` takes."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import yaml

from gkd_jax import command_line
from gkd_jax.command_line import gin_settings

ROOT = pathlib.Path(__file__).parents[2]
ARGUMENTS = (
  "--gin_file=experiments/smoke.gin",
  '--gin.MODEL_DIR="gs://b/a run"',
  "--gin.TRAIN_STEPS=20",
)


def dry_run(*command, **environment):
  done = subprocess.run(
    [*command, *ARGUMENTS],
    env=os.environ | {"DRY_RUN": "1"} | environment,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines()]


def parsed(command):
  """What the CLI's own flags make of a command, and gin of its settings."""
  assert command[:2] == ["gkd", "train"], command
  values = command_line.parse("train", command[2:])
  gin_settings.parse(values.gin_file, values.gin_bindings, [])
  return vars(values)


def test_local():
  commands = dry_run("bash", "launch/local.sh", PROCESSES="4", PORT="99")
  assert len(commands) == 4
  for index, command in enumerate(commands):
    got = parsed(command)
    assert got["coordinator_address"] == "localhost:99"
    assert (got["process_count"], got["process_index"]) == (4, index)
    assert got["gin_bindings"][0] == 'MODEL_DIR = "gs://b/a run"'


def test_tpu_vm():
  settings = {"TPU": "pod", "ZONE": "z", "INSTALL": "1"}
  install, train = dry_run("bash", "launch/tpu_vm.sh", **settings)
  assert train[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
  assert train[5:8] == ["pod", "--zone=z", "--worker=all"]
  assert install[-1] == "--command=pip install -q 'gkd_jax[tpu]'"
  got = parsed(shlex.split(train[-1].removeprefix("--command=")))
  assert got["multiprocess"]
  assert got["gin_bindings"][0] == 'MODEL_DIR = "gs://b/a run"'


def test_slurm():
  [command] = dry_run("bash", "launch/slurm.sh")
  assert command[:2] == ["srun", "--kill-on-bad-exit=0"]
  assert parsed(command[2:])["multiprocess"]


def test_xmanager():
  [command] = dry_run(sys.executable, "launch/xmanager.py")
  assert parsed(command)["gin_bindings"][1] == "TRAIN_STEPS = 20"


def test_gke():
  job = yaml.safe_load((ROOT / "launch/gke.yaml").read_text())
  assert job["kind"] == "JobSet"
  spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
  # As many pods as hosts of the slice: a JobSet waits for ever for others.
  assert spec["parallelism"] == spec["completions"] == 4
  pod = spec["template"]["spec"]
  [container] = pod["containers"]
  assert container["resources"]["limits"]["google.com/tpu"] * 4 == 16
  assert parsed(container["command"])["multiprocess"]


@pytest.mark.parametrize("rank", [0, 1])
def test_skypilot(rank):
  task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
  assert set(task["resources"]["job_recovery"]["recover_on_exit_codes"]) == {
    134,
    143,
  }
  # The shell itself fills in SkyPilot's variables; `gkd` prints its arguments.
  script = "gkd() { printf '%q ' gkd \"$@\"; }\n" + task["run"]
  done = subprocess.run(
    ["bash", "-euc", script],
    env=os.environ
    | {
      "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
      "SKYPILOT_NUM_NODES": "2",
      "SKYPILOT_NODE_RANK": str(rank),
    },
    capture_output=True,
    text=True,
    check=True,
  )
  got = parsed(shlex.split(done.stdout))
  assert got["coordinator_address"] == "10.0.0.1:7654"
  assert (got["process_count"], got["process_index"]) == (2, rank)


# In place of `gkd`: training leaves the files of a run, or fails.
STAND_IN = """#!/usr/bin/env bash
case $1 in
  path) echo teacher ;;
  infer) ;;
  watch) exec {python} -m gkd_jax.main "$@" ;;
  report) echo "the table of ${{@: -1}}" && touch a.png ;;
  train)
    for argument; do
      case $argument in --gin.MODEL_DIR=*) folder=$(eval echo "${{argument#*=}}");; esac
    done
    [ "$(basename "$folder")" != "$FAILS" ] || {{ echo a reason; exit 1; }}
    mkdir "$folder" && echo "TRAIN_STEPS = 9" >"$folder/config.gin"
    echo '{{"step": 5, "loss": 1, "seconds_per_step": 1}}' >"$folder/metrics.jsonl"
    echo '{{"seconds": 6, "greedy": {{"wer": 4}}}}' >"$folder/final.json" ;;
esac
"""


@pytest.fixture
def quickstart(tmp_path):
  """Runs the quickstart's shell on a stand-in for `gkd`."""
  (tmp_path / "launch").mkdir()
  shell = tmp_path / "launch" / "quickstart.sh"
  shell.write_text((ROOT / "launch" / "quickstart.sh").read_text())
  gkd = tmp_path / "gkd"
  gkd.write_text(STAND_IN.format(python=sys.executable))
  gkd.chmod(0o755)
  return lambda fails="": subprocess.run(
    ["bash", str(shell), "7"],
    env=os.environ | {"GKD": str(gkd), "PYTHONPATH": str(ROOT), "FAILS": fails},
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_the_quickstart_shows_its_runs_and_names_its_page(quickstart, tmp_path):
  done = quickstart()
  assert done.returncode == 0, done.stderr
  for name in ("sft", "gkd", "sft_longer", "seqkd", "supervised_kd"):
    assert f"{name}: finished in 0:06, greedy WER 4.0" in done.stdout
  assert "the table of gkd=gkd" in done.stdout
  out = tmp_path / "runs" / "quickstart-7"
  assert f"picture     {out}/a.png" in done.stdout
  assert f"page        {out}/index.html" in done.stdout


@pytest.mark.parametrize("name", ["sft", "seqkd"])
def test_the_quickstart_ends_with_the_reason_of_a_run_that_fails(
  quickstart, name
):
  done = quickstart(fails=name)
  assert done.returncode == 1 and "a reason" in done.stdout
  assert "the table" not in done.stdout
