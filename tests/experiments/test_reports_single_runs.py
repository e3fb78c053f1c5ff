"""Reports of single runs, as the quickstart compares them."""

import json

import pytest
import report_pages
import sweep_folders

from gkd_jax.experiments import figures, report_page, report_tables, studies


@pytest.fixture
def folders(tmp_path):
  teacher = sweep_folders.write_run(
    tmp_path / "a", 28.0, 36.0, validation={"wer": 30.5}
  )
  student = sweep_folders.write_run(
    tmp_path / "b", 60.0, 64.0, [(10, 80.0), (20, 62.0)]
  )
  return teacher, student


def test_report_of_single_runs(folders, tmp_path, capsys):
  teacher, student = folders
  output = tmp_path / "out"
  report_page.report([f"teacher={teacher}", f"gkd={student}"], str(output))
  lines = (output / "table.txt").read_text().splitlines()
  assert lines[1].split() == (
    ["teacher", "1", "28.0", "7.0", "36.0", "9.0", "1,234", "57"]
  )
  assert lines[2].split()[:4] == ["gkd", "1", "60.0", "15.0"]
  assert capsys.readouterr().out.splitlines() == lines
  results = json.loads((output / "results.json").read_text())
  assert list(results) == ["teacher", "gkd"]
  assert results["gkd"] == {
    "wer": 0.6,
    "per": 0.15,
    "sampled_wer": 0.64,
    "sampled_per": 0.16,
    "params": 1234,
    "seconds": 56.7,
    "steps": 20,
    "step_seconds": 0.0,
  }
  page = (output / "index.html").read_text()
  assert "One seed: no interval can be given" in page
  assert {p.stem for p in output.glob("*.png")} == (
    {"methods", "learning_curves"}
  )


def test_one_seed_has_an_interval_over_its_examples(folders, tmp_path):
  within = {"greedy/wer": [58.14, 61.96], "greedy/per": [-1.0, 2.0]}
  times = {"start_seconds": 12.4}
  sweep_folders.write_run(folders[1], 60.0, 64.0, intervals=within, **times)
  items = [f"teacher={folders[0]}", f"gkd={folders[1]}"]
  tables = lambda: report_tables.results(studies.read(items))
  (table,) = tables()
  assert table.rows == [
    [
      *("method", "seeds", "greedy wer", "greedy per"),
      *("sampled wer", "sampled per"),
      *("parameters", "seconds", "to the first step"),
    ],
    ["teacher", "1", "28.0", "7.0", "36.0", "9.0", "1,234", "57", ""],
    [
      *("gkd", "1", "60.0 (58.1 to 62.0)", "15.0 (-1.0 to 2.0)"),
      *("64.0", "16.0", "1,234", "57", "12"),
    ],
  ]
  assert "95 % bootstrap interval over the split's examples" in table.caption
  assert "every example" not in table.caption
  for none in (None, [15.0, 15.0]):  # as it is written, and as it was
    within["greedy/per"] = none
    sweep_folders.write_run(folders[1], 60.0, 64.0, intervals=within)
    (table,) = tables()
    assert table.rows[2][2:4] == ["60.0 (58.1 to 62.0)", "15.0 (-)"]
    assert "(-): every example has the same value" in table.caption
  # The picture's caption and the table agree.
  text = report_page.report(items, str(tmp_path / "out"))
  page = (tmp_path / "out" / "index.html").read_text()
  assert "One seed: no interval over seeds" in page and text
  assert "intervals over examples are in the table" in page
  assert "no interval can be given" not in page
  # Of two seeds, the interval is that of their mean.
  again = sweep_folders.write_run(tmp_path / "c", 64.0, 66.0, intervals=within)
  items.append(f"gkd={again}")
  (table,) = tables()
  low, high = (62 + sign * 2 * sweep_folders.T1 for sign in (-1, 1))
  assert table.rows[2][2] == f"62.0 [{low:.1f}, {high:.1f}]"
  assert "bootstrap" not in table.caption


def test_a_name_given_twice_is_two_seeds(folders, tmp_path):
  again = sweep_folders.write_run(tmp_path / "c", 64.0, 66.0)
  text = report_page.report(
    [f"gkd={folders[1]}", f"gkd={again}"], str(tmp_path / "out")
  )
  # 60 and 64: ± t · 2√2 / √2.
  assert (
    f"62.0 [{62 - 2 * sweep_folders.T1:.1f}, {62 + 2 * sweep_folders.T1:.1f}]"
    in text
  )


def test_learning_curves_hold_validation_errors_alone(folders):
  teacher, student = folders
  items = [f"teacher={teacher}", f"gkd={student}"]
  drawn = lambda: {
    line.get_label(): line
    for line in figures.learning_curves(studies.read(items))
    .figure.axes[0]
    .get_lines()
  }
  lines = drawn()
  assert list(lines["gkd"].get_xdata()) == [10, 20]
  assert list(lines["gkd"].get_ydata()) == [80.0, 62.0]
  assert set(lines["teacher"].get_ydata()) == {30.5}  # not 28.0, on test
  sweep_folders.write_run(teacher, 28.0, 36.0)
  assert list(drawn()) == ["gkd"]


def test_what_is_neither_run_nor_sweep(tmp_path):
  with pytest.raises(ValueError, match=r"got .*nothing.* which is no folder"):
    report_page.report([str(tmp_path / "nothing")], str(tmp_path))
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"final\.json, or a sweep, got .*empty"):
    report_page.report([str(tmp_path / "empty")], str(tmp_path))
  sweep = sweep_folders.Sweep(tmp_path / "sweep")
  sweep.add("methods", 0, method="SFT")
  with pytest.raises(ValueError, match="at least one finished run"):
    report_page.report([str(sweep.folder)], str(tmp_path))


def test_markup_in_names_inputs_and_outputs_shows_as_text(folders, tmp_path):
  _, student = folders
  example = {
    "step": 20,
    "input": "<b>in</b> & <script>alert(1)</script>",
    "reference": "a <i>house</i>",
    "teacher": "<img src=x>",
    "student": 'one | two <a href="x">*out*</a>',
  }
  sweep_folders.write_lines(student / "examples.jsonl", [example])
  name = "<u>my & run</u>"
  markdown = tmp_path / "out" / "report.md"
  report_page.report(
    [f"{name}={student}"], str(tmp_path / "out"), str(markdown)
  )
  page = report_pages.Page((tmp_path / "out" / "index.html").read_text())
  assert not page.tags & {"b", "i", "u", "script"}
  assert all(source.startswith("data:") for source in page.images)
  assert all(link.startswith("#") for link in page.links)
  assert name in [row[0] for row in page.rows]
  assert page.rows[-1] == [
    *(example[k] for k in ("input", "reference", "teacher", "student"))
  ]
  rows = markdown.read_text().splitlines()
  assert rows[rows.index("## Decoded examples") + 4] == (
    "| &lt;b>in&lt;/b> &amp; &lt;script>alert(1)&lt;/script> | a &lt;i>house"
    '&lt;/i> | &lt;img src=x> | one \\| two &lt;a href="x">\\*out\\*&lt;/a> |'
  )
