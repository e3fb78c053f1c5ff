"""`gkd report`: a comparison of runs as text, an HTML page and Markdown."""

import datetime
import json
import os
from collections.abc import Sequence

import gkd_jax
from gkd_jax import files
from gkd_jax.experiments import (
  figures,
  figures_behaviour,
  figures_training,
  metrics,
  panels,
  rendering,
  report_tables,
  run_folders,
  studies,
)

_FIGURES = (
  figures.method_bars,
  figures.heat_maps,
  figures.learning_curves,
  figures_training.training_curves,
  figures_training.cost_and_quality,
  figures_behaviour.quality_diversity,
  figures.data_efficiency,
  figures_behaviour.rl_tradeoff,
  figures_behaviour.by_position,
)


def report(
  items: Sequence[str], output: str, markdown_path: str | None = None
) -> str:
  """Prints and writes the comparison of runs.

  The page contains its pictures and refers to no other file or address.

  Args:
    items: folders of sweeps, and `NAME=FOLDER` of single runs, in the order of
      the table; a name given twice is another seed.
    output: folder for `index.html`, a PNG of each figure, `table.txt` and
      `results.json` (by method, means over seeds; error rates as fractions).
    markdown_path: file for the same as Markdown; its pictures are written into
      the folder of its name without the extension.

  Returns:
    The table.
  """
  study = studies.read(items)
  with panels.plain_text():
    pictures = [p for p in (draw(study) for draw in _FIGURES) if p]
  results = report_tables.results(study)
  more = (
    report_tables.rl_tradeoff(study),
    report_tables.paper(study),
    report_tables.examples(study),
  )
  page = {
    "study": study,
    "head": _head(study),
    "marks": report_tables.marks,
    "sections": [results[0], *pictures, *results[1:], *filter(None, more)],
  }
  write = lambda name, text: files.write_text(os.path.join(output, name), text)
  write("index.html", rendering.html("report.html", **page))
  write("results.json", json.dumps(_means(study), indent=2))
  text = "\n\n".join(map(report_tables.text, results))
  write("table.txt", text + "\n")
  _write_pictures(pictures, output)
  if markdown_path:
    folder, _ = os.path.splitext(markdown_path)
    name = os.path.basename(folder)
    content = rendering.markdown("report.md", folder=name, **page)
    files.write_text(markdown_path, content)
    _write_pictures(pictures, folder)
  print(text, flush=True)
  return text


def _head(study: studies.Study) -> dict[str, str]:
  """Returns what the page is about: runs, tasks, dates, commands, versions."""
  tasks, dates, versions = {}, set(), {}
  for run in study.runs:
    folder = files.absolute(run.folder)
    versions[run_folders.read_origin(folder)[1]] = None
    tasks[run_folders.read_macros(folder).get("MIXTURE_OR_TASK_NAME")] = None
    for name in ("final.json", "metrics.json"):
      if (folder / name).exists():
        seconds = (folder / name).stat().mtime
        dates.add(datetime.datetime.fromtimestamp(seconds, datetime.UTC).date())
  found = {
    "Runs": _summary(study),
    "Task": ", ".join(filter(None, tasks)),
    "Finished": " to ".join(map(str, sorted({min(dates), max(dates)})))
    if dates
    else "",
    "Commands": "\n".join(study.commands),
    "Run by": "; ".join(filter(None, versions)),
    "Report by": f"gkd_jax {gkd_jax.__version__}",
  }
  return {name: text for name, text in found.items() if text}


def _summary(study: studies.Study) -> str:
  """Says in one line how many runs and seeds there are, and of what."""
  seeds = {run.seed for run in study.runs if run.seed is not None}
  parts = [f"{sum(map(study.has_score, study.runs))} finished runs"]
  if study.unfinished:
    parts.append(f"{len(study.unfinished)} not finished")
  if seeds:
    parts.append(f"seeds {', '.join(map(str, sorted(seeds)))}")
  parts.append(f"scored by {study.metric_label}")
  return "; ".join(parts) + "."


def _means(study: studies.Study) -> dict[str, dict[str, float]]:
  """Returns the means over seeds of each place's scores."""
  runs = filter(study.has_score, study.runs)
  found = studies.groups(runs, lambda run: ", ".join(run.place.values()))
  results: dict[str, dict[str, float]] = {}
  for name, members in found.items():
    row = results[name] = {}
    for score in {k: None for run in members for k in run.scores}:
      how, _, metric = score.rpartition("/")
      scale = 100.0 if metrics.of(metric).is_error_rate else 1.0
      key = metric if how in ("", "greedy") else f"{how}_{metric}"
      mean = studies.estimate(studies.scores(members, score)).mean
      row[key] = mean / scale
  return results


def _write_pictures(pictures: Sequence[panels.Picture], folder: str):
  for picture in pictures:
    path = os.path.join(folder, f"{picture.name}.png")
    files.write_bytes(path, picture.png)
