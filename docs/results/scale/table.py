"""Writes docs/scale.md from the reports beside this script.

Run `python docs/results/scale/table.py` from the repository's root after
`gkd precompile` wrote a report into a folder here. A `note` that was added to a
report by hand is shown below its command.
"""

import json
import pathlib
from typing import Any

from gkd_jax.planning import hlo, topologies

_HERE = pathlib.Path(__file__).parent
_PHASES = {
  "sampling": "sampling",
  "teacher": "teacher",
  "data": "step on data",
  "student": "on-policy step",
  "mixed": "mixed step",
}
_HEAD = """# Does the paper's setting fit?

Programs that `gkd precompile` compiled for TPUs that were not there; nothing here was
run on a TPU. Memory, in GiB, is `compiled.memory_analysis()` of one device. FLOP and GiB
sent are of one device too, tokens of all devices. The time is a lower bound from
operations, bytes and the chip's published rates, with every output of full length;
tokens/s and MFU follow from it and are upper bounds. FLOPs are of matrix products alone.
What a v4 keeps in its CMEM costs no time here, so that its sampling looks too fast. The
seconds of compilation are of one core that did other work too. Each row shows the JSON
that its command below writes, and this file is written by

```
python docs/results/scale/table.py
```

| setting | devices | batch, lengths | phase | arguments | temporaries | peak of | fits | TFLOP | sent | ms at least | tokens/s | MFU | compiled in |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def document() -> str:
  """Returns the text of docs/scale.md."""
  rows, commands = [], []
  for path in sorted(_HERE.glob("*/*.json")):
    report = json.loads(path.read_text())
    rows += [_row(report, phase) for phase in report["phases"]]
    commands.append(
      f"- {report['title']}, {report['topology']}, {_compiler(report)}:\n"
      f"  `{report['command']}`"
    )
    if "note" in report:
      commands.append(f"  {report['note']}")
  text = [_HEAD + "\n".join(rows), "", "Commands:", "", *commands]
  return "\n".join(text) + "\n"


def _compiler(report):
  versions = report.get("versions")
  if versions is None:
    return "compiler's version not kept"
  return f"jax {versions['jax']}, libtpu {versions['libtpu']}"


def _row(report: dict[str, Any], phase: str) -> str:
  """Returns a line of the table: FLOP, GiB and time of one device."""
  program = report["phases"][phase]
  memory, lengths = program["memory"], report["task_feature_lengths"]
  size = lambda name: (
    f"{memory[name] / topologies.GIB:.2f}" if name in memory else "?"
  )
  numbers = ["?"] * 5
  if least := program.get("roofline"):
    sent = hlo.sent_bytes(program["collectives"], False)
    numbers = [
      f"{program['flops'] / 1e12:.2f}",
      f"{sent / topologies.GIB:.2f}",
      f"{least['seconds'] * 1e3:.1f}",
      f"{program['tokens_per_second']:,.0f}",
      f"{program['mfu']:.0%}",
    ]
  cells = [
    report["title"],
    f"{report['topology']}, {' x '.join(map(str, report['mesh'].values()))}",
    f"{report['batch_size']}, {lengths['inputs']} to {lengths['targets']}",
    _PHASES[phase],
    size("arguments"),
    size("temporaries"),
    f"{size('peak')} of {report['hbm_bytes'] / topologies.GIB:.2f}",
    {True: "yes", False: "no", None: "?"}[program["fits"]],
    *numbers,
    f"{program['compile_seconds']:.0f} s",
  ]
  return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
  (_HERE.parents[1] / "scale.md").write_text(document())
