"""`gkd report`: a page, pictures and tables of runs and sweeps."""

import json
import os
from collections.abc import Sequence

from gkd_jax import (
  figures,
  figures_behaviour,
  report_data,
  report_page,
  report_tables,
)

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
  items: Sequence[str], output: str, markdown: str | None = None
) -> str:
  """Prints and writes the comparison of runs.

  Args:
    items: folders of sweeps, and `NAME=FOLDER` of single runs, in the order of
      the table; a name given twice is another seed.
    output: folder for `index.html`, a PNG of each figure, `table.txt` and
      `results.json` (by method, means over seeds; error rates as fractions).
    markdown: file for the same as Markdown; its pictures are written into the
      folder of its name without the extension.

  Returns:
    The table.
  """
  study = report_data.read(items)
  pictures = [p for p in (draw(study) for draw in _FIGURES) if p]
  results = report_tables.results(study)
  more = (
    report_tables.rl_tradeoff(study),
    report_tables.paper(study),
    report_tables.examples(study),
  )
  tables = [*results, *(table for table in more if table)]
  report_page.write_pictures(pictures, output)
  _write(output, "index.html", report_page.page(study, pictures, tables))
  _write(output, "results.json", json.dumps(_means(study), indent=2))
  text = "\n\n".join(map(report_tables.text, results))
  _write(output, "table.txt", text + "\n")
  if markdown:
    folder, _ = os.path.splitext(markdown)
    report_page.write_pictures(pictures, folder)
    content = report_page.markdown(
      study, pictures, tables, os.path.basename(folder)
    )
    _write(os.path.dirname(markdown), os.path.basename(markdown), content)
  print(text, flush=True)
  return text


def _means(study: report_data.Study) -> dict[str, dict[str, float]]:
  """Place of the grid to the means of its scores over seeds."""
  runs = [run for run in study.runs if figures.has_score(study, run)]
  found = report_data.groups(runs, lambda run: ", ".join(run.place.values()))
  results: dict[str, dict[str, float]] = {}
  for name, members in found.items():
    row = results[name] = {}
    for score in {k: None for run in members for k in run.scores}:
      values = report_data.scores(members, score)
      how, _, metric = score.rpartition("/")
      scale = 100.0 if metric in _ERROR_RATES else 1.0
      key = metric if how in ("", "greedy") else f"{how}_{metric}"
      row[key] = report_data.estimate(values).mean / scale
  return results


def _write(folder, name, text):
  os.makedirs(folder or ".", exist_ok=True)
  with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
    f.write(text)
