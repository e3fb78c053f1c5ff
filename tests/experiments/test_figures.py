"""Pages of hand-written runs: charts, marks, names that spoil a chart."""

import json
import os
import re
from xml.etree import ElementTree

import pytest
import report_pages
import sweep_folders

import gkd_jax
from gkd_jax.experiments import (
  figures,
  figures_training,
  panels,
  report_page,
  report_tables,
  studies,
)

LONG = "on_policy_distillation_of_a_small_student_with_reverse_kl"  # 57 letters


def study(tmp_path, **scores):
  return studies.read(
    [
      f"{name}={sweep_folders.write_run(tmp_path / str(i), wer, wer + 1)}"
      for i, (name, wer) in enumerate(scores.items())
    ]
  )


def test_bars_begin_at_zero(tmp_path):
  picture = figures.method_bars(study(tmp_path, a=20.0, b=60.0))
  (panel,) = picture.figure.axes
  assert sorted(bar.get_width() for bar in panel.patches) == [20, 21, 60, 61]
  assert panel.get_xlim()[0] == 0
  assert "does not start" not in panel.get_xlabel()


def test_scores_that_lie_close_are_points_on_an_axis_that_says_so(tmp_path):
  picture = figures.method_bars(study(tmp_path, a=58.0, b=60.0))
  (panel,) = picture.figure.axes
  assert not panel.patches
  drawn = [
    line.get_xdata()[0]
    for line in panel.get_lines()
    if line.get_marker() == "s" and len(line.get_xdata())
  ]
  assert sorted(drawn) == [58, 59, 60, 61]
  assert panel.get_xlim()[0] > 50
  assert "the axis does not start at 0" in panel.get_xlabel()


def test_a_long_name_leaves_room_for_the_chart(tmp_path):
  picture = figures.method_bars(study(tmp_path, **{LONG: 20.0, "b": 60.0}))
  (panel,) = picture.figure.axes
  (name, _) = (label.get_text() for label in panel.get_yticklabels())
  assert name.replace("\n", "") == LONG
  assert max(map(len, name.splitlines())) <= 24
  picture.figure.canvas.draw()
  assert panel.get_position().width > 0.4
  # Names that differ at the end alone stay apart.
  a, b = (panels.wrapped(2 * LONG + x) for x in "ab")
  assert a != b and len(a) < 80 and "…" in a


def test_a_long_name_leaves_room_for_the_legend(tmp_path):
  names = [f"{LONG}_{i}" for i in range(3)]
  items = [
    f"{name}={sweep_folders.write_run(tmp_path / name, 9, 9, [(1, 9.0), (2, 8.0)])}"
    for name in names
  ]
  figure = figures.learning_curves(studies.read(items)).figure
  figure.canvas.draw()
  (legend,) = figure.legends
  assert legend.get_window_extent().width <= figure.bbox.width
  assert legend.get_window_extent().height < 0.5 * figure.bbox.height


def test_dollar_signs_in_names_are_no_mathematics(tmp_path):
  run = sweep_folders.write_run(tmp_path / "a", 20.0, 21.0, [(1, 9.0)])
  names = ("$x_{1", r"$\frac$", "10$ or 20$")
  text = report_page.report([f"{name}={run}" for name in names], str(tmp_path))
  assert all(name in text for name in names)


def test_pictures_are_drawings_in_the_colours_of_the_page(tmp_path):
  picture = figures.method_bars(study(tmp_path, a=20.0, b=60.0))
  root = ElementTree.fromstring(picture.svg)
  style = "".join(root.itertext())
  assert "color-scheme: light dark" in style
  assert "prefers-color-scheme: dark" in style
  text = picture.svg.decode()
  # Nothing is black, neither by name nor by SVG's default, and no background.
  assert not re.search(r"#000000|black|#ffffff", text)
  assert root.get("fill") == "currentColor"
  assert "<image" not in text


def test_the_page_follows_a_dark_screen(tmp_path):
  run = sweep_folders.write_run(tmp_path / "a", 20.0, 21.0)
  report_page.report([f"a={run}"], str(tmp_path))
  style = (tmp_path / "index.html").read_text().split("</style>")[0]
  assert "color-scheme: light dark" in style
  light, dark = (
    dict(re.findall(r"--(\w+): (#\w+)", part))
    for part in style.split("@media (prefers-color-scheme: dark)")
  )
  assert light.keys() == dark.keys() and light["page"] != dark["page"]
  # Every colour is one of these.
  assert not re.findall(r"#\w+", style.split("} }")[1])


def test_a_page_shows_markup_as_text_and_breaks_long_words(tmp_path):
  evil = "<script>alert(1)</script> & 'q' \"d\" </td><img src=x onerror=y>"
  run = sweep_folders.write_run(tmp_path / "a", 20.0, 21.0, [(1, 9.0)])
  row = dict.fromkeys(("input", "reference", "teacher", "student"), evil)
  sweep_folders.write_lines(run / "examples.jsonl", [{"step": 1} | row])
  (run / "config.gin").write_text(
    f"# gkd train {evil}\n# gkd {evil}\n\nMIXTURE_OR_TASK_NAME = {evil!r}\n"
  )
  items = [f'<script>{LONG}</script><b>&"={run}']
  report_page.report(items, str(tmp_path / "out"), str(tmp_path / "page.md"))
  text = (tmp_path / "out" / "index.html").read_text()
  page = report_pages.Page(text)
  assert "script" not in page.tags and "b" not in page.tags
  # Each of its pictures is one that the page holds.
  assert all(x.startswith("data:image/svg+xml;base64,") for x in page.images)
  assert [evil] * 4 in [row[:4] for row in page.rows]
  assert f'<script>{LONG}</script><b>&"' in page.rows[1][0]
  assert "<script" not in (tmp_path / "page.md").read_text()
  # What is not in a table that can be moved breaks anywhere.
  body = re.search(r"body \{(.*?)\}", text, re.S)
  assert body and "overflow-wrap: anywhere" in body[1]


def test_a_wide_picture_keeps_its_size_on_a_narrow_screen(tmp_path):
  runs = [sweep_folders.write_run(tmp_path / x, 20.0, 21.0) for x in "ab"]
  position = {"forward_kl": [0.5, 0.4], "reverse_kl": [0.3], "count": [2, 1]}
  (runs[1] / "by_position.json").write_text(
    json.dumps({"student_samples": position})
  )
  items = [f"{run.name}={run}" for run in runs]
  report_page.report(items, str(tmp_path / "out"))
  text = (tmp_path / "out" / "index.html").read_text()
  found = re.findall(
    r'<div class="scroll">\s*<img alt="([^"]*)" style="min-width: min\(([.\d]+)in',
    text,
  )
  widths = {name: float(width) for name, width in found}
  # A little more than half of its size; one panel fits a telephone.
  assert widths["Divergence by position"] == 5.72  # two of 5.2 inches
  assert widths["Methods"] <= 3.2


def test_training_curves_are_what_was_logged(tmp_path):
  rows = [
    {"step": 10, "loss": 3.0, "reverse_kl": 0.5, "student_entropy": None},
    {"step": 20, "loss": 2.0, "reverse_kl": 0.25, "sampled_length": 7.0},
    {"step": 20, "eval/wer": 50.0},
    {"step": 30, "loss": 1.0, "reverse_kl": 0.125, "sampled_length": 8.0},
  ]
  run = sweep_folders.write_run(tmp_path / "a", 20.0, 21.0)
  sweep_folders.write_lines(run / "metrics.jsonl", rows)
  picture = figures_training.training_curves(studies.read([f"a={run}"]))
  assert {
    panel.get_title(): panel.get_lines()[0].get_xydata().tolist()
    for panel in picture.figure.axes
  } == {
    "loss": [[10, 3], [20, 2], [30, 1]],
    "reverse KL": [[10, 0.5], [20, 0.25], [30, 0.125]],
    "length of samples": [[20, 7], [30, 8]],
  }


def test_the_best_method_is_bold_and_the_teacher_is_no_rival(tmp_path):
  items = [
    f"{name}={sweep_folders.write_run(tmp_path / name, greedy, sampled)}"
    for name, greedy, sampled in (
      *(("Teacher", 1.0, 1.0), ("sft", 60.0, 70.0)),
      *(("gkd", 50.0, 70.0), ("seqkd", 55.0, 80.0)),
    )
  ]
  (table,) = report_tables.results(studies.read(items))
  head, *_ = table.rows
  bold = [(table.rows[y][0], head[x]) for y, x in sorted(table.best)]
  # A lower error is better; of equal ones all.
  assert bold == [
    *(("sft", "sampled wer"), ("sft", "sampled per")),
    *(("gkd", "greedy wer"), ("gkd", "greedy per")),
    *(("gkd", "sampled wer"), ("gkd", "sampled per")),
  ]
  markdown = tmp_path / "r.md"
  report_page.report(items, str(tmp_path / "out"), str(markdown))
  assert "| seqkd | 1 | 55.0 | 13.8 | 80.0 | 20.0 |" in markdown.read_text()
  assert "| gkd | 1 | **50.0** | **12.5** |" in markdown.read_text()
  page = (tmp_path / "out" / "index.html").read_text()
  assert page.count('<td class="best">') == 6


def test_the_head_names_task_date_and_version(tmp_path):
  run = sweep_folders.write_run(tmp_path / "a", 20.0, 21.0)
  (run / "config.gin").write_text(
    "# gkd train --gin.A=<i>\n# gkd 0.1 (jax 9, commit 1a2b)\n\n"
    "MIXTURE_OR_TASK_NAME = '<b>t</b>'\n"
  )
  os.utime(run / "final.json", (1e9, 1e9))  # 9 September 2001
  report_page.report([f"a={run}"], str(tmp_path))
  text = (tmp_path / "index.html").read_text()
  assert "<dt>Task</dt><dd>&lt;b&gt;t&lt;/b&gt;</dd>" in text
  assert "<dt>Finished</dt><dd>2001-09-09</dd>" in text
  assert "<dt>Commands</dt><dd>gkd train --gin.A=&lt;i&gt;</dd>" in text
  # Several are folded up, a line each.
  other = sweep_folders.write_run(tmp_path / "b", 20.0, 21.0)
  (other / "config.gin").write_text("# gkd train --gin.B=2\n# gkd 0.1\n\n")
  report_page.report([f"a={run}", f"b={other}"], str(tmp_path / "both"))
  both = (tmp_path / "both" / "index.html").read_text()
  assert "<summary>2</summary>" in both
  for line in ("--gin.A=&lt;i&gt;", "--gin.B=2"):
    assert f"<code>gkd train {line}</code><br>" in both
  # Of a sweep, its own command and not those of all cells.
  sweep = sweep_folders.Sweep(
    tmp_path / "sweep", command="gkd sweep --sweep_file=a.toml"
  )
  sweep_folders.write_run(sweep.add("gkd", 0), 20.0, 21.0)
  assert studies.read([str(tmp_path / "sweep"), f"a={run}"]).commands == [
    "gkd sweep --sweep_file=a.toml",
    "gkd train --gin.A=<i>",
  ]
  assert "<dt>Run by</dt><dd>gkd 0.1 (jax 9, commit 1a2b)</dd>" in text
  assert f"gkd_jax {gkd_jax.__version__}" in text


def test_words_that_differ_from_the_nearest_reference_are_marked(tmp_path):
  run = sweep_folders.write_run(tmp_path / "a", 20.0, 21.0)
  example = {
    "step": 1,
    "input": "x",
    "reference": ["a large house", "the cat sat"],
    "student": "the <dog>  sat",
  }
  sweep_folders.write_lines(run / "examples.jsonl", [example])
  report_page.report([f"a={run}"], str(tmp_path))
  text = (tmp_path / "index.html").read_text()
  assert "<td>the <mark>&lt;dog&gt;  </mark>sat</td>" in text
  assert report_pages.Page(text).rows[-1][-1] == example["student"]
  # A word that is missing leaves an empty mark.
  assert report_tables.marks("the sat", "the cat sat") == [
    ("the ", False),
    ("", True),
    ("sat", False),
  ]


def test_cost_is_the_time_of_the_steps(tmp_path):
  items = []
  for seed, (seconds, wer) in enumerate(((2.0, 20.0), (3.0, 24.0))):
    run = sweep_folders.write_run(tmp_path / str(seed), wer, wer)
    rows = [{"step": s, "seconds_per_step": seconds} for s in (10, 20)]
    sweep_folders.write_lines(run / "metrics.jsonl", rows)
    items.append(f"a={run}")
  picture = figures_training.cost_and_quality(studies.read(items))
  (panel,) = picture.figure.axes
  point, interval = panel.get_lines()
  # 40 and 60 seconds; 20 and 24 are 22 ± t · 2√2 / √2.
  assert point.get_xydata().tolist() == [[50, 22]]
  assert list(interval.get_xdata()) == [50, 50]
  half = 2 * sweep_folders.T1
  assert interval.get_ydata() == pytest.approx([22 - half, 22 + half])
  assert panel.get_xlim()[0] == 0
