"""`docs/scale.md` from the reports of `gkd precompile` and `gkd fit`."""

import json
import os
from collections.abc import Sequence
from typing import Any

from gkd_jax.planning import hlo, program_report

_GIB = 2**30
_PHASES = {
  "sampling": "sampling",
  "teacher": "teacher",
  "data": "step on data",
  "student": "on-policy step",
  "mixed": "mixed step",
}
_HEAD = """# Does the paper's setting fit?

Programs that `gkd precompile` compiled for TPUs that were not there, and counted;
nothing here was run on a TPU. Memory, in GiB, is `compiled.memory_analysis()` of
one device, and FLOP and GiB sent are of one device too; tokens are of all of them.
The time is the least that operations, bytes and the chip's published rates allow,
with every output of full length; tokens/s and MFU follow from it and are the most
that there can be. FLOPs are of matrix products alone. What a v4 keeps in its CMEM
costs no time here, so that its sampling looks too fast. The seconds of compilation
are of one core that did other work too. Each row is of the JSON that its command
below writes. This file is made by

```
gkd precompile --markdown=docs/scale.md docs/results/scale/*/*.json
```

| setting | devices | batch, lengths | phase | arguments | temporaries | peak of | fits | TFLOP | sent | ms at least | tokens/s | MFU | compiled in |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""
_CHOICES = """
## What `gkd fit` chooses

Estimates are extrapolated from programs of one and two layers (a network whose layers
are scanned keeps its own number), compiled with little effort; the whole program is
compiled as it would run."""


def write(path: str, reports: Sequence[str]) -> None:
  """Writes the document.

  Args:
    path: of the document.
    reports: JSON files, each a `precompile.json` or a `fit.json`; a `note` that
      was added by hand is shown below its command.

  Raises:
    ValueError: no report.
  """
  if not reports:
    raise ValueError(
      "expected reports, got none; run `gkd precompile --markdown=FILE"
      " precompile.json ...`"
    )
  rows, commands, choices = [], [], []
  for report in reports:
    with open(report, encoding="utf-8") as file:
      found = json.load(file)
    title = found.get("title") or os.path.basename(os.path.dirname(report))
    if "candidates" in found:
      choices += choice(title, found)
      continue
    rows += [row(title, found, phase) for phase in found["phases"]]
    command = found.get("command", report)
    commands.append(
      f"- {title}, {found['topology']}, {_compiler(found)}:\n  `{command}`"
    )
    if "note" in found:
      commands.append(f"  {found['note']}")
  text = [_HEAD + "\n".join(rows), "", "Commands:", "", *commands]
  if choices:
    text += [_CHOICES, *choices]
  with open(path, "w", encoding="utf-8") as file:
    file.write("\n".join(text) + "\n")


def choice(title: str, report: dict[str, Any]) -> list[str]:
  """Lines of a section: what `gkd fit` printed, but the programs' reports.

  Args:
    title: of the setting.
    report: see `fit.fit`.
  """
  lengths = report["task_feature_lengths"]
  return [
    "",
    f"### {title}, {report['topology']}",
    "",
    f"Batch {report['batch_size']}, {lengths['inputs']} to"
    f" {lengths['targets']}, the {_PHASES[report['phase']]}.",
    "",
    "```",
    f"$ {report.get('command', '')}",
    *program_report.fit_lines(report),
    "```",
    *(["", report["note"]] if "note" in report else []),
  ]


def _compiler(report):
  versions = report.get("versions")
  if versions is None:
    return "compiler's version not kept"
  return f"jax {versions['jax']}, libtpu {versions['libtpu']}"


def row(title: str, report: dict[str, Any], phase: str) -> str:
  """A line of the table: memory in GiB of one device.

  Args:
    title: of the setting.
    report: see `precompile.precompile`.
    phase: one that is in it.
  """
  found = report["phases"][phase]
  memory, mesh = found["memory"], report["mesh"]
  lengths = report["task_feature_lengths"]
  size = lambda name: f"{memory[name] / _GIB:.2f}" if name in memory else "?"
  least = found.get("roofline")
  numbers = ["?"] * 5
  if least:
    sent = hlo.sent_bytes(found["collectives"], False)
    numbers = [
      f"{found['flops'] / 1e12:.2f}",
      f"{sent / _GIB:.2f}",
      f"{least['seconds'] * 1e3:.1f}",
      f"{found['tokens_per_second']:,.0f}",
      f"{found['mfu']:.0%}",
    ]
  cells = [
    title,
    f"{report['topology']}, {' x '.join(map(str, mesh.values()))}",
    f"{report['batch_size']}, {lengths['inputs']} to {lengths['targets']}",
    _PHASES[phase],
    size("arguments"),
    size("temporaries"),
    f"{size('peak')} of {report['hbm_bytes'] / _GIB:.2f}",
    {True: "yes", False: "no", None: "?"}[found["fits"]],
    *numbers,
    f"{found['compile_seconds']:.0f} s",
  ]
  return f"| {' | '.join(cells)} |"
