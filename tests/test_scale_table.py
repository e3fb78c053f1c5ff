"""The table of `docs/scale.md`."""

import pathlib

import pytest

from gkd_jax import scale_table

ROOT = pathlib.Path(__file__).parent.parent


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
  reports = sorted((ROOT / "docs" / "results" / "scale").glob("*.json"))
  scale_table.write(str(tmp_path / "scale.md"), [str(r) for r in reports])
  assert (tmp_path / "scale.md").read_text() == (
    ROOT / "docs" / "scale.md"
  ).read_text()


def test_without_reports_it_says_what_to_run(tmp_path):
  with pytest.raises(ValueError, match="got none; run `gkd precompile"):
    scale_table.write(str(tmp_path / "scale.md"), [])
