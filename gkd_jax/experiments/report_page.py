"""A report as one HTML page that needs nothing else, and as Markdown.

`gkd report`: a page, pictures and tables of runs and sweeps.
"""

import base64
import functools
import html
import io
import json
import os
from collections.abc import Sequence

from gkd_jax import files
from gkd_jax.experiments import (
  figures,
  figures_behaviour,
  report_tables,
  run_folders,
)

_DPI = 130
_LONG = 20  # rows of a table that is folded, and opens by a click
_STYLE = """
body { margin: 0; background: #f6f7f9; color: #1d2733;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.2rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 0 0 .6rem; }
nav { margin: .8rem 0 1.6rem; font-size: .92rem; }
nav a { color: #0b5cad; text-decoration: none; margin-right: 1.1rem; }
section { background: #fff; border: 1px solid #e2e6eb; border-radius: 10px;
  padding: 1.2rem 1.4rem; margin: 0 0 1.4rem; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
p.caption { color: #53606e; font-size: .92rem; max-width: 90ch;
  margin: .8rem 0 0; }
summary { cursor: pointer; color: #0b5cad; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; }
th, td { text-align: right; padding: .32rem .6rem; white-space: nowrap;
  border-bottom: 1px solid #edf0f3; font-variant-numeric: tabular-nums; }
th { color: #53606e; font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
table.texts th, table.texts td { text-align: left; white-space: normal;
  overflow-wrap: anywhere; vertical-align: top; min-width: 6.5rem; }
table.texts td.same { background: #e6f4ea; }
"""


def page(
  study: run_folders.Study,
  pictures: Sequence[figures.Picture],
  tables: Sequence[report_tables.Table],
) -> str:
  """The page, its pictures inlined: no script, no other file, no request.

  Args:
    study: what it is about.
    pictures: in order.
    tables: in order; the first stands above the pictures.
  """
  parts = [(_anchor(tables[0].title), tables[0].title, _table(tables[0]))]
  for picture in pictures:
    parts.append((picture.name, picture.title, _picture(picture)))
  for table in tables[1:]:
    parts.append((_anchor(table.title), table.title, _table(table)))
  if study.unfinished:
    names = "".join(f"<li>{html.escape(n)}</li>" for n in study.unfinished)
    parts.append(("unfinished", "Not finished", f"<ul>{names}</ul>"))
  links = "".join(
    f'<a href="#{name}">{html.escape(title)}</a>' for name, title, _ in parts
  )
  body = "\n".join(
    f'<section id="{name}"><h2>{html.escape(title)}</h2>\n{content}</section>'
    for name, title, content in parts
  )
  title = html.escape(study.title)
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n"
    f"<body><main><h1>{title}</h1>\n<div>{html.escape(summary(study))}</div>\n"
    f"<nav>{links}</nav>\n{body}\n</main></body></html>\n"
  )


def markdown(
  study: run_folders.Study,
  pictures: Sequence[figures.Picture],
  tables: Sequence[report_tables.Table],
  folder: str,
) -> str:
  """The same for a repository, with links to pictures in `folder`."""
  parts = [f"# {study.title}\n", summary(study) + "\n"]
  blocks = [_markdown_table(tables[0])]
  blocks += [
    f"## {p.title}\n\n![{p.title}]({folder}/{p.name}.png)\n\n{p.caption}\n"
    for p in pictures
  ]
  blocks += [_markdown_table(table) for table in tables[1:]]
  if study.unfinished:
    names = "\n".join(f"* {name}" for name in study.unfinished)
    blocks.append(f"## Not finished\n\n{names}\n")
  return "\n".join(parts + blocks)


def summary(study: run_folders.Study) -> str:
  """One line: how many runs and seeds, of what."""
  seeds = {run.seed for run in study.runs if run.seed is not None}
  scored = [run for run in study.runs if figures.has_score(study, run)]
  parts = [f"{len(scored)} finished runs"]
  if study.unfinished:
    parts.append(f"{len(study.unfinished)} not finished")
  if seeds:
    parts.append(f"seeds {', '.join(map(str, sorted(seeds)))}")
  parts.append(f"scored by {figures.axis_label(study)}")
  return "; ".join(parts) + "."


def write_pictures(pictures: Sequence[figures.Picture], folder: str):
  """Writes `NAME.png` of each."""
  for picture in pictures:
    files.write_bytes(os.path.join(folder, f"{picture.name}.png"), png(picture))


@functools.lru_cache(maxsize=32)
def png(picture: figures.Picture) -> bytes:
  """A picture as PNG, the same bytes for the same data."""
  content = io.BytesIO()
  picture.figure.savefig(
    content,
    format="png",
    dpi=_DPI,
    bbox_inches="tight",  # with what hangs over the edge, never cut
    metadata={"Software": None},
  )
  return content.getvalue()


def _picture(picture):
  data = base64.b64encode(png(picture)).decode()
  title = html.escape(picture.title)
  return (
    f'<img alt="{title}" src="data:image/png;base64,{data}">\n'
    f'<p class="caption">{html.escape(picture.caption)}</p>\n'
  )


def _table(table):
  """Rows as HTML; outputs that equal a reference are marked."""
  texts = "reference" in table.rows[0]
  head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.rows[0])
  rows = []
  for row in table.rows[1:]:
    same = [
      ' class="same"' if texts and i > 1 and cell in row[1].split(" | ") else ""
      for i, cell in enumerate(row)
    ]
    rows.append(
      "<tr>"
      + "".join(
        f"<td{mark}>{html.escape(cell)}</td>"
        for mark, cell in zip(same, row, strict=True)
      )
      + "</tr>"
    )
  kind = ' class="texts"' if texts else ""
  caption = table.caption + (" Green: the reference." if texts else "")
  content = "\n".join(rows)
  content = f"<table{kind}><tr>{head}</tr>\n{content}</table>"
  if len(rows) > _LONG:
    fold = f"<summary>{len(rows)} rows</summary>"
    content = f"<details>{fold}{content}</details>"
  return (
    f'<div class="scroll">{content}</div>\n'
    f'<p class="caption">{html.escape(caption)}</p>\n'
  )


def _markdown_table(table):
  cell = lambda text: text.replace("|", "\\|").replace("\n", " ")
  lines = ["| " + " | ".join(map(cell, row)) + " |" for row in table.rows]
  lines.insert(1, "|" + " --- |" * len(table.rows[0]))
  rows = "\n".join(lines)
  return f"## {table.title}\n\n{rows}\n\n{table.caption}\n"


def _anchor(title):
  return "".join(c if c.isalnum() else "-" for c in title.lower())


_FIGURES = (
  figures.method_bars,
  figures.heat_maps,
  figures.learning_curves,
  figures_behaviour.quality_diversity,
  figures.data_efficiency,
  figures_behaviour.rl_tradeoff,
  figures_behaviour.by_position,
)
# Error rates in percent, which `results.json` holds as fractions.
_ERROR_RATES = ("wer", "per")


def report(
  items: Sequence[str], output: str, markdown_path: str | None = None
) -> str:
  """Prints and writes the comparison of runs.

  Args:
    items: folders of sweeps, and `NAME=FOLDER` of single runs, in the order of
      the table; a name given twice is another seed.
    output: folder for `index.html`, a PNG of each figure, `table.txt` and
      `results.json` (by method, means over seeds; error rates as fractions).
    markdown_path: file for the same as Markdown; its pictures are written into the
      folder of its name without the extension.

  Returns:
    The table.
  """
  study = run_folders.read(items)
  pictures = [p for p in (draw(study) for draw in _FIGURES) if p]
  results = report_tables.results(study)
  more = (
    report_tables.rl_tradeoff(study),
    report_tables.paper(study),
    report_tables.examples(study),
  )
  tables = [*results, *(table for table in more if table)]
  write_pictures(pictures, output)
  write = lambda name, text: files.write_text(os.path.join(output, name), text)
  write("index.html", page(study, pictures, tables))
  write("results.json", json.dumps(_means(study), indent=2))
  text = "\n\n".join(map(report_tables.text, results))
  write("table.txt", text + "\n")
  if markdown_path:
    folder, _ = os.path.splitext(markdown_path)
    write_pictures(pictures, folder)
    content = markdown(study, pictures, tables, os.path.basename(folder))
    files.write_text(markdown_path, content)
  print(text, flush=True)
  return text


def _means(study: run_folders.Study) -> dict[str, dict[str, float]]:
  """Place of the grid to the means of its scores over seeds."""
  runs = [run for run in study.runs if figures.has_score(study, run)]
  found = run_folders.groups(runs, lambda run: ", ".join(run.place.values()))
  results: dict[str, dict[str, float]] = {}
  for name, members in found.items():
    row = results[name] = {}
    for score in {k: None for run in members for k in run.scores}:
      values = run_folders.scores(members, score)
      how, _, metric = score.rpartition("/")
      scale = 100.0 if metric in _ERROR_RATES else 1.0
      key = metric if how in ("", "greedy") else f"{how}_{metric}"
      row[key] = run_folders.estimate(values).mean / scale
  return results
