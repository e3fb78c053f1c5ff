"""The page that launch/pretrained.sh ends with, from evaluations by hand."""

import json
import pathlib
import runpy

import pytest

PAGE = pathlib.Path(__file__).parents[2] / "launch/pretrained/page.py"
NAMES = "reverse_kl", "forward_kl", "top1_agreement", "ended"


def write(folder, values):
  """Twelve prompts of 10 tokens; `values` are means of the first prompt.

  The second has 0.1 more of each, and so on.
  """
  folder.mkdir(parents=True)
  rows, totals = [], {}
  for number in range(12):
    statistics = {}
    for name, value in zip(NAMES, values, strict=True):
      weight = 1.0 if name == "ended" else 10.0
      more = 0 if name in ("ended", "top1_agreement") else 0.1 * number
      statistics[f"student_samples/{name}"] = [(value + more) * weight, weight]
    rows.append({"prediction": f"`{number}`\nb", "statistics": statistics})
    for name, (total, weight) in statistics.items():
      before = totals.get(name, (0, 0))
      totals[name] = before[0] + total, before[1] + weight
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "predictions.jsonl").write_text(lines)
  metrics = {name: total / weight for name, (total, weight) in totals.items()}
  (folder / "metrics.json").write_text(json.dumps(metrics))
  (folder / "evaluation.json").write_text(json.dumps({"metrics": [*metrics]}))


@pytest.fixture
def runs(tmp_path):
  write(tmp_path / "eval" / "pruned", (5.45, 6.0, 0.1, 0))
  write(tmp_path / "eval" / "start", (2.45, 3.0, 0.4, 0))
  for step in (4, 8):
    write(tmp_path / "eval" / f"supervised_kd_{step}", (1.45, 1.2, 0.5, 0))
    write(tmp_path / "eval" / f"on_policy_kd_{step}", (0.95, 1.5, 0.5, 0))
  (tmp_path / "start").mkdir()
  (tmp_path / "start" / "metrics.jsonl").write_text('{"step": 6}\n')
  (tmp_path / "start.done").write_text("31\n")
  answers = [json.dumps({"prediction": "x"})] * 12
  (tmp_path / "eval" / "teacher.jsonl").write_text("\n".join(answers))
  return tmp_path


def test_it_says_what_is_left_and_which_method_is_better(runs):
  main = runpy.run_path(str(PAGE))["main"]
  main(str(runs), 8)
  text = (runs / "smollm2.md").read_text()
  # Means over prompts are 0.55 more than the first: 6 and 1.5 of 6.
  assert "| every second layer, untrained | 6.00 [" in text
  [row] = [x for x in text.splitlines() if x.startswith("| on-policy KD, 8")]
  assert row.startswith("| on-policy KD, 8 steps | 1.50 [")
  assert row.endswith("| 50 % [50, 50] | 0 % [0, 0] | 25 % |")
  assert (
    "reverse KL, nats per token: on-policy minus supervised -0.500 [-0.500, -0.500]"
  ) in text
  lines = text.splitlines()
  [reverse] = [x for x in lines if x.startswith("- reverse KL")]
  [forward] = [x for x in lines if x.startswith("- forward KL")]
  assert reverse.endswith("on-policy KD is better.")
  assert forward.endswith("supervised KD is better.")
  assert "- ended within the length: no difference on any prompt." in text
  assert "6 steps of supervised KD" in text and "start 31 s" in text
  assert text.count("- teacher: `x`") == 10
  assert "- on-policy KD: `'3' b`" in text
  assert (runs / "smollm2" / "curves.png").stat().st_size > 10_000
