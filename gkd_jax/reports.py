"""Tables and a picture of several runs, from the files that they wrote."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure


def read_run(folder: str) -> dict[str, Any]:
  """The final results of a run, and its validation curve.

  Args:
    folder: MODEL_DIR of a run with `final_eval_split`, or a shipped model.

  Returns:
    `final.json` with `curve`: (step, WER in percent) of each evaluation on
    validation examples.

  Raises:
    ValueError: there is no `final.json`.
  """
  path = os.path.join(folder, "final.json")
  if not os.path.exists(path):
    raise ValueError(
      f"expected a finished run with final.json, got {folder!r};"
      " set train.train.final_eval_split and train to the end"
    )
  with open(path, encoding="utf-8") as f:
    run = json.load(f)
  run["curve"] = []
  metrics = os.path.join(folder, "metrics.jsonl")
  if os.path.exists(metrics):
    with open(metrics, encoding="utf-8") as lines:
      rows = [json.loads(line) for line in lines]
    run["curve"] = [(r["step"], r["eval/wer"]) for r in rows if "eval/wer" in r]
  return run


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
  """Runs with error rates in percent, parameters and seconds, as text."""
  lines = [
    f"{'':14}{'greedy':>16}{'sampled':>18}{'':>12}",
    f"{'':14}{'WER %':>8}{'PER %':>8}{'WER %':>10}{'PER %':>8}"
    f"{'parameters':>12}{'seconds':>9}",
  ]
  for name, run in runs.items():
    greedy, sampled = run["greedy"], run["sampled"]
    lines.append(
      f"{name:14}{greedy['wer']:8.1f}{greedy['per']:8.1f}"
      f"{sampled['wer']:10.1f}{sampled['per']:8.1f}"
      f"{run['params']:12,}{run['seconds']:9.0f}"
    )
  return "\n".join(lines)


def report(folders: Sequence[str], output: str) -> str:
  """Prints and writes the comparison of runs.

  Args:
    folders: `NAME=FOLDER` each, in the order of the table.
    output: folder for `results.json` (error rates as fractions), `table.txt`
      and `wer.png`.

  Returns:
    The table.
  """
  runs = {}
  for item in folders:
    name, _, folder = item.partition("=")
    runs[name] = read_run(folder)
  os.makedirs(output, exist_ok=True)
  results = {
    name: {
      "wer": run["greedy"]["wer"] / 100,
      "per": run["greedy"]["per"] / 100,
      "sampled_wer": run["sampled"]["wer"] / 100,
      "sampled_per": run["sampled"]["per"] / 100,
      "params": run["params"],
      "seconds": run["seconds"],
    }
    for name, run in runs.items()
  }
  with open(os.path.join(output, "results.json"), "w") as f:
    json.dump(results, f, indent=2)
  text = table(runs)
  with open(os.path.join(output, "table.txt"), "w") as f:
    f.write(text + "\n")
  curves(runs).savefig(os.path.join(output, "wer.png"), dpi=120)
  print(text, flush=True)
  return text


def curves(runs: Mapping[str, Mapping[str, Any]]) -> figure.Figure:
  """Validation WER in percent over steps, one line for each run."""
  picture = figure.Figure(figsize=(7, 4.5), layout="constrained")
  axes = picture.subplots()
  for name, run in runs.items():
    if run["curve"]:
      steps, values = zip(*run["curve"], strict=True)
      axes.plot(steps, values, marker="o", markersize=3, label=name)
    elif "validation" in run:
      # A shipped model has no curve; its file says what a run's last point would.
      axes.axhline(
        run["validation"]["wer"], color="grey", linestyle="--", label=name
      )
  axes.set(xlabel="step", ylabel="WER %, greedy (validation)")
  axes.grid(alpha=0.3)
  axes.legend()
  return picture
