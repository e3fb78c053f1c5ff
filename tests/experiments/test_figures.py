"""Charts with names and scores that a chart is easily spoilt by."""

import re
from xml.etree import ElementTree

import sweep_folders

from gkd_jax.experiments import figures, panels, report_page, studies

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
  for name in ("$x_{1", r"$\frac$", "10$ or 20$"):
    report_page.report([f"{name}={run}"], str(tmp_path / "out"))
    assert name in (tmp_path / "out" / "table.txt").read_text()


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
