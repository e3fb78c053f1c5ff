"""The reports in `docs/results/scale`, and `docs/scale.md` made from them."""

import json
import pathlib
import runpy
import shlex

import pytest

from gkd_jax import command_line, train
from gkd_jax.command_line import gin_settings
from gkd_jax.planning import precompile

ROOT = pathlib.Path(__file__).parents[2]
SCALE = ROOT / "docs" / "results" / "scale"
REPORTS = sorted(SCALE.glob("*/*.json"))


def test_the_document_is_what_the_script_makes():
  script = runpy.run_path(str(SCALE / "table.py"))
  assert script["document"]() == (ROOT / "docs" / "scale.md").read_text()


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_a_command_that_is_shown_makes_its_report(path):
  report = json.loads(path.read_text())
  program, mode, *arguments = shlex.split(report["command"])
  assert (program, f"{mode}.json") == ("gkd", path.name)
  flags = command_line.parse(mode, arguments)
  assert ROOT / flags.output_path == path.parent
  assert flags.topology == report["topology"]
  assert flags.title == report["title"]
  gin_settings.parse(flags.gin_file, flags.gin_bindings, [])
  found = gin_settings.bindings(train.train, precompile.SETTINGS)
  dataset, partitioner = found["dataset"], found["partitioner"]
  for name in ("batch_size", "task_feature_lengths"):
    assert getattr(dataset, name) == report[name], name
  if mode == "precompile":
    for name in ("num_microbatches", "shard_params_over_data"):
      assert getattr(partitioner, name) == report[name], name
    assert partitioner.num_partitions == report["mesh"]["model"]
    phases = precompile.chosen_phases(found["model"], flags.phases, "jit")
    assert list(phases) == list(report["phases"])
