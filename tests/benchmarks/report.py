"""Tables of docs/performance.md from what the benchmarks wrote with `--json`.

Run: python -m tests.benchmarks.report docs/results/performance/*.json
It prints the tables. With --into=docs/performance.md it writes each one there,
between `<!-- NAME -->` and `<!-- end -->`, NAME being the file's without `.json`.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

MIB = 2**20


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A Markdown table."""
  lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
  return "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines)


def of_sampling(result: Mapping[str, Any]) -> str:
  """Tokens per second against transformers'."""
  rows = [
    [
      name.split()[1],
      f"{result[f'ours_{name.split()[1]} tokens/s']:.0f}",
      f"{result[f'hf_{name.split()[1]} tokens/s']:.0f}",
      f"{value:.2f}",
      f"{result['memory ' + name.split()[1]]:.2f}",
    ]
    for name, value in result.items()
    if name.startswith("speed ")
  ]
  head = "encoder length", "ours, tokens/s", "`generate`, tokens/s"
  return table([*head, "ours / `generate`", "peak memory / its"], rows)


def of_cases(result: Mapping[str, Any]) -> str:
  """Seconds, peak memory and what else was measured of each case."""
  cases = [name[:-2] for name in result if name.endswith(" s")]
  more = [x for x in ("busy",) if f"{cases[0]} {x}" in result]
  rows = [
    [
      case,
      f"{result[f'{case} s']:.2f}",
      f"{result[f'{case} bytes'] / MIB:,.0f}",
      *(f"{100 * result[f'{case} {x}']:.0f} %" for x in more),
    ]
    for case in cases
  ]
  ratios = [
    f"{name}: {value:.2f}." for name, value in result.items() if ", " in name
  ]
  text = table(["", "CPU seconds", "MiB", *more], rows)
  return "\n\n".join([text, *([" ".join(ratios)] if ratios else [])])


def of_growth(result: Mapping[str, Any]) -> str:
  """Seconds along each axis, with both slopes."""
  rows = [
    [
      axis,
      ", ".join(f"{value}: {s:.2f}" for value, s, _ in of_axis["rows"]),
      f"{of_axis['slope of seconds']:.2f}",
      f"{of_axis['slope of arithmetic']:.2f}",
    ]
    for axis, of_axis in result["axes"].items()
  ]
  return table(["", "CPU seconds at", "slope", "of the arithmetic"], rows)


KINDS = {"sampling": of_sampling, "growth": of_growth}


def section(path: pathlib.Path) -> str:
  """The table of a file, and when and where it was measured."""
  result = json.loads(path.read_text())
  taken = result["taken"]
  repeats = {len(x) for x in result.get("measurements", {}).values()} or {1}
  line = (
    f"{taken['date']}, one core of {taken['cores']} of an {taken['processor']},"
    f" load {taken['load']}; repeats: {min(repeats)}."
  )
  if "note" in taken:
    line += f" The file was {taken['note']}."
  return f"{KINDS.get(path.stem, of_cases)(result)}\n\n{line}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("files", nargs="+", type=pathlib.Path)
  parser.add_argument("--into", type=pathlib.Path, default=None)
  options = parser.parse_args()
  text = options.into.read_text() if options.into else ""
  for path in options.files:
    made = section(path)
    print(f"{path.stem}\n\n{made}\n")
    marks = rf"(<!-- {path.stem} -->\n).*?(<!-- end -->)"
    if options.into and not re.search(marks, text, re.DOTALL):
      raise SystemExit(
        f"expected '<!-- {path.stem} -->' in {options.into}, got none; set --into"
      )
    put = lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}"
    text = re.sub(marks, put, text, flags=re.DOTALL)
  if options.into:
    options.into.write_text(text)


if __name__ == "__main__":
  main()
