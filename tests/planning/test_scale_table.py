"""The table of `docs/scale.md`."""

import json
import pathlib
import shlex

import pytest

from gkd_jax import gin_utils, main, train
from gkd_jax.planning import precompile, scale_table

ROOT = pathlib.Path(__file__).parents[2]
REPORTS = sorted((ROOT / "docs" / "results" / "scale").glob("*/*.json"))


def test_a_row_is_what_the_report_says():
  report = {
    "topology": "v5e:4x4",
    "mesh": {"data": 8, "model": 2},
    "batch_size": 32,
    "task_feature_lengths": {"inputs": 10, "targets": 20},
    "hbm_bytes": 16 * 2**30,
    "phases": {
      "student": {
        "memory": {"arguments": 2**30, "temporaries": 2**29, "peak": 3 * 2**29},
        "fits": True,
        "flops": 2.5e12,
        "collectives": {
          "all-gather": {"sent_bytes": 2**29},
          "all-reduce": {"sent_bytes": 2**28},
        },
        "roofline": {"seconds": 0.04},
        "tokens_per_second": 16000.0,
        "mfu": 0.317,
        "compile_seconds": 12.4,
      },
      "teacher": {
        "memory": {"arguments": 20 * 2**30},
        "fits": False,
        "compiler_says": "no",
        "compile_seconds": 3.0,
      },
    },
  }
  assert scale_table.row("A", report, "student") == (
    "| A | v5e:4x4, 8 x 2 | 32, 10 to 20 | on-policy step | 1.00 | 0.50 | 1.50"
    " of 16.00 | yes | 2.50 | 0.75 | 40.0 | 16,000 | 32% | 12 s |"
  )
  assert scale_table.row("A", report, "teacher") == (
    "| A | v5e:4x4, 8 x 2 | 32, 10 to 20 | teacher | 20.00 | ? | ? of 16.00 |"
    " no | ? | ? | ? | ? | ? | 3 s |"
  )


def test_the_document_is_what_the_command_makes(tmp_path):
  scale_table.write(str(tmp_path / "scale.md"), [str(r) for r in REPORTS])
  assert (tmp_path / "scale.md").read_text() == (
    ROOT / "docs" / "scale.md"
  ).read_text()


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_a_command_that_is_shown_makes_its_report(path):
  report = json.loads(path.read_text())
  program, mode, *arguments = shlex.split(report["command"])
  assert (program, f"{mode}.json") == ("gkd", path.name)
  flags = {"gin_file": [], "gin_bindings": []}
  for argument in main._gin_flags(arguments):
    name, _, value = argument.removeprefix("--").partition("=")
    if name in ("gin_file", "gin_bindings"):
      flags[name].append(value)
    else:
      flags[name] = value
  assert ROOT / flags["output_path"] == path.parent
  assert flags["topology"] == report["topology"]
  assert flags["title"] == report["title"]
  gin_utils.parse(flags["gin_file"], flags["gin_bindings"], [])
  found = gin_utils.bindings(train.train, precompile.SETTINGS)
  searched = ("num_microbatches", "shard_params_over_data")
  for name in (
    *("batch_size", "task_feature_lengths"),
    *(searched if mode == "precompile" else ()),
  ):
    assert found[name] == report[name], name
  if mode == "precompile":
    assert found["num_partitions"] == report["mesh"]["model"]
    asked = flags["phases"].split(",") if "phases" in flags else None
    phases = precompile.chosen_phases(found["model"], asked, "jit")
    assert list(phases) == list(report["phases"])


def test_a_choice_is_shown_as_it_was_printed(tmp_path):
  settings = {
    **{"num_partitions": 1, "shard_params_over_data": True},
    **{"num_microbatches": 1, "remat_policy": "none"},
  }
  row = {
    **{"settings": settings, "flags": ["--gin.A=1"], "fits": True},
    **{"peak_bytes": 3 * 2**29, "seconds": 0.04},
    "report": {
      "memory": {"peak": 2**30},
      "roofline": {"seconds": 0.05},
    },
  }
  found = {
    **{"title": "A to B", "command": "gkd fit --topology=v5e:4x4"},
    **{"topology": "v5e:4x4", "batch_size": 32, "phase": "student"},
    "task_feature_lengths": {"inputs": 10, "targets": 20},
    "candidates": [row],
    "best": row,
  }
  (tmp_path / "fit.json").write_text(json.dumps(found))
  scale_table.write(str(tmp_path / "scale.md"), [str(tmp_path / "fit.json")])
  assert (
    (tmp_path / "scale.md")
    .read_text()
    .endswith(
      """### A to B, v5e:4x4

Batch 32, 10 to 20, the on-policy step.

```
$ gkd fit --topology=v5e:4x4
model axis  split over data  microbatches    remat  GiB at peak  ms at least
         1              yes             1     none         1.50        40.00
compiled whole, --gin.A=1:
            GiB at peak  ms at least
  estimated        1.50        40.00
  whole            1.00        50.00
fits: --gin.A=1
```
"""
    )
  )


def test_without_reports_it_says_what_to_run(tmp_path):
  with pytest.raises(ValueError, match="got none; run `gkd precompile"):
    scale_table.write(str(tmp_path / "scale.md"), [])
