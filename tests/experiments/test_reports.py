"""The report, from hand-written cells with numbers known beforehand."""

import base64
import io
import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import report_pages
import sweep_folders
from PIL import Image

from gkd_jax.experiments import (
  figures,
  figures_behaviour,
  report_page,
  report_tables,
  run_folders,
  studies,
)


def score_run(path, greedy, sampled, steps=(), examples=()):
  final = {"greedy": {"bleu": greedy}, "sampled": {"bleu": sampled}}
  (path / "final.json").write_text(
    json.dumps(final | {"seconds": 10.0, "params": 1000, "split": "test"})
  )
  sweep_folders.write_lines(path / "metrics.jsonl", steps)
  sweep_folders.write_lines(path / "examples.jsonl", examples)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
  """Every figure's data: three seeds, two sizes of data, and a cell that failed."""
  folder = tmp_path_factory.mktemp("sweep")
  sweep = sweep_folders.Sweep(
    folder, title="A <small> sweep", task="wmt14_en_de"
  )
  methods = {"SFT": 20.0, "SeqKD": 21.0, "on-policy KD": 23.0}
  for method, base in methods.items():
    for labelled, more in (("1k", 0.0), ("10k", 2.0)):
      for seed in range(3):
        path = sweep.add(
          "methods", seed, method=method, size="small", labelled=labelled
        )
        score = base + more + seed  # mean base + more + 1, deviation 1
        curve = [
          {"step": 10 * i, "loss": 1.0, "eval/bleu": score - 4 + i}
          for i in range(1, 5)
        ]
        example = {
          "step": 40,
          "input": "ein <b>Haus</b>",
          "reference": "a house",
          "teacher": "a house",
          "student": "a house" if method != "SFT" else f"a mouse {labelled}",
        }
        score_run(path, score, score - 5, curve, [example])
        positions = {
          "student_samples": {
            "reverse_kl": [0.1, 0.2, base / 50],
            "count": [9] * 3,
          },
          "data": {"reverse_kl": [0.1, 0.1], "count": [9, 9]},
        }
        (path / "by_position.json").write_text(json.dumps(positions))
  for fraction in ("0", "1"):
    for divergence in ("forward KL", "reverse KL"):
      for seed in range(2):
        path = sweep.add(
          "grid", seed, STUDENT_DATA_FRACTION=fraction, divergence=divergence
        )
        score = 20 + 2 * float(fraction) + (divergence == "reverse KL") + seed
        score_run(path, score, score + 1)
  for alpha, reward in (("0", 0.9), ("0.1", 0.8), ("1", 0.5)):
    for seed in range(2):
      path = sweep.add("rl", seed, alpha=alpha)
      steps = [
        {"step": 10, "reward": 0.0, "reverse_kl": 9.0},
        {"step": 90, "reward": reward, "reverse_kl": 2 - float(alpha) + seed},
        {"step": 100, "reward": reward, "reverse_kl": 2 - float(alpha) + seed},
      ]
      score_run(path, 25.0, 24.0, steps)
  for temperature, diversity in (("0.1", 80.0), ("1", 20.0)):
    path = sweep.add("eval", 0, method="SFT", temperature=temperature)
    scores = {"bleu": 22.0 - float(temperature), "self_bleu": diversity}
    (path / "metrics.json").write_text(json.dumps(scores))
  sweep.add("methods", 7, method="SFT", size="small", labelled="1k")
  return folder


NAMES = {
  "methods",
  "lambda_divergence",
  "learning_curves",
  "training",
  "quality_diversity",
  "data_efficiency",
  "rl_tradeoff",
  "by_position",
}


@pytest.fixture(scope="module")
def report(sweep, tmp_path_factory):
  folder = tmp_path_factory.mktemp("report")
  report_page.report(
    [str(sweep)], str(folder), str(folder / "docs" / "results.md")
  )
  return folder


@pytest.fixture(scope="module")
def study(sweep):
  return studies.read([str(sweep)])


def test_means_and_intervals_are_those_worked_out_by_hand(report):
  table = (report / "table.txt").read_text().splitlines()
  line = next(x for x in table if x.startswith("SeqKD") and " 10k " in x)
  # Seeds 23, 24, 25: mean 24, deviation 1, interval ± t / √3 = 2.4841.
  half = sweep_folders.T2 / np.sqrt(3)
  assert re.split(r"\s{2,}", line)[:6] == [
    "SeqKD",
    "small",
    "10k",
    "3",
    f"24.0 [{24 - half:.1f}, {24 + half:.1f}]",
    f"19.0 [{19 - half:.1f}, {19 + half:.1f}]",
  ]
  grid = next(
    x for x in table if x.startswith("grid") and re.search(r"1 +reverse KL", x)
  )
  # Seeds 23 and 24: deviation 1/√2, interval ± t / 2.
  assert (
    f"23.5 [{23.5 - sweep_folders.T1 / 2:.1f}, {23.5 + sweep_folders.T1 / 2:.1f}]"
    in grid
  )
  page = report_pages.Page((report / "index.html").read_text())
  shown = [row for row in page.rows if row[:3] == ["SeqKD", "small", "10k"]]
  assert "24.0 [21.5, 26.5]" in shown[0]


def test_the_interval_of_seeds():
  summary = studies.estimate([2.0, 4.0, 9.0])
  # Mean 5, sum of squares 9 + 1 + 16 = 26, variance 13.
  half = sweep_folders.T2 * np.sqrt(13 / 3)
  np.testing.assert_allclose(
    (summary.mean, summary.low, summary.high),
    (5, 5 - half, 5 + half),
    rtol=1e-6,
  )
  assert studies.estimate([3.0]).low is None
  with pytest.raises(ValueError, match="at least one seed"):
    studies.estimate([])


def test_the_page_holds_its_pictures_and_asks_for_nothing(report, sweep):
  text = (report / "index.html").read_text()
  page = report_pages.Page(text)
  assert len(page.images) == len(NAMES)
  for source in page.images:
    header, data = source.split(",", 1)
    assert header == "data:image/svg+xml;base64"
    assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("}svg")
  assert all(link.startswith("#") for link in page.links)
  assert not page.tags & {"script", "link", "iframe", "object", "form"}
  for content in (text, (report / "docs" / "results.md").read_text()):
    readable = re.sub(r"base64,[A-Za-z0-9+/=]+", "", content)
    assert "http" not in readable and "url(" not in readable
    assert "@import" not in readable and str(sweep) not in readable
    assert str(report) not in readable and "/tmp" not in readable
  assert text.count("A &lt;small&gt; sweep") == 2 and "<small>" not in text
  assert "<b>Haus" not in text


def assert_picture(data):
  with Image.open(io.BytesIO(data)) as image:
    pixels = np.asarray(image.convert("L"))
  assert min(pixels.shape) > 250
  assert (pixels < 250).mean() > 0.01  # not blank


def test_each_figure_is_a_file_and_in_the_markdown(report):
  assert {p.stem for p in report.glob("*.png")} == NAMES
  text = (report / "docs" / "results.md").read_text()
  links = re.findall(r"!\[.*?\]\((.*?)\)", text)
  assert {link for link in links} == {f"results/{n}.png" for n in NAMES}
  for link in links:
    assert_picture((report / "docs" / link).read_bytes())
  assert "| SeqKD | small | 10k | 3 | 24.0 [21.5, 26.5] |" in text


def test_a_moved_sweep_renders_the_same(sweep, report, tmp_path):
  moved = shutil.copytree(sweep, tmp_path / "elsewhere")
  report_page.report([str(moved)], str(tmp_path / "out"))
  for name in ("index.html", "table.txt", "results.json"):
    assert (tmp_path / "out" / name).read_bytes() == (
      (report / name).read_bytes()
    ), name


def test_figures_draw_the_numbers(study):
  (panel, _) = figures.heat_maps(study).figure.axes
  # λ = 1 above λ = 0; forward KL, then reverse KL; means of two seeds.
  assert panel.get_images()[0].get_array().tolist() == (
    [[22.5, 23.5], [20.5, 21.5]]
  )
  assert [t.get_text() for t in panel.texts] == [
    f"{mean}\n± {sweep_folders.T1 / 2:.1f}" for mean in (20.5, 21.5, 22.5, 23.5)
  ]
  panel = figures.data_efficiency(study).figure.axes[0]
  lines = {x.get_label(): x for x in panel.get_lines()}
  np.testing.assert_allclose(lines["SeqKD"].get_xdata(), [1000, 10000])
  assert lines["SFT"].get_xdata()[0] < 1000  # beside it
  np.testing.assert_allclose(lines["SeqKD"].get_ydata(), [22, 24])
  panel = figures.learning_curves(study).figure.axes[0]
  lines = {x.get_label(): x for x in panel.get_lines()}
  np.testing.assert_allclose(
    lines["on-policy KD"].get_xdata(), [10, 20, 30, 40]
  )
  np.testing.assert_allclose(
    lines["on-policy KD"].get_ydata(), [21, 22, 23, 24]
  )


def test_rl_table_pairs_the_seeds(study):
  """The seeds' divergences lie 1 apart, what α changes in them is exact."""
  head, *rows = report_tables.rl_tradeoff(study).rows
  assert head == [
    *("method", "alpha", "seeds", "reward", "reverse KL"),
    *("reward - at α = 1", "reverse KL - at α = 0"),
  ]
  gap = lambda x: f"{x:.4f} [{x:.4f}, {x:.4f}]"
  wide = "[-3.9531, 8.7531]"  # 2.4 ± 12.706 · 0.7071 / √2
  assert rows[1] == [
    *("rl", "0.1", "2", gap(0.8), f"2.4000 {wide}", gap(0.3), gap(-0.1))
  ]
  assert [row[-2:] for row in (rows[0], rows[2])] == [
    [gap(0.4), ""],
    ["", gap(-1.0)],
  ]


def test_reward_diversity_and_position_are_means_of_what_was_logged(study):
  (panel,) = figures_behaviour.rl_tradeoff(study).figure.axes
  line = next(x for x in panel.get_lines() if x.get_label() == "rl")
  # Of the last fifth, steps 90 and 100, not of step 10; seeds differ by 1.
  np.testing.assert_allclose(line.get_xdata(), [2.5, 2.4, 1.5])
  np.testing.assert_allclose(line.get_ydata(), [0.9, 0.8, 0.5])
  (panel,) = figures_behaviour.quality_diversity(study).figure.axes
  line = panel.get_lines()[0]
  np.testing.assert_allclose(line.get_xydata(), [[20, 21], [80, 21.9]])
  panels = figures_behaviour.by_position(study).figure.axes
  own, data = panels[0].get_lines()[:2]
  assert panels[0].get_title() == "small, 1k labelled, reverse KL"
  np.testing.assert_allclose(own.get_xydata(), [[1, 0.1], [2, 0.2], [3, 0.4]])
  assert data.get_linestyle() == "--"
  np.testing.assert_allclose(data.get_xydata(), [[1, 0.1], [2, 0.1]])


def test_the_paper_s_numbers_stand_beside_ours(report, study):
  page = report_pages.Page((report / "index.html").read_text())
  row = next(r for r in page.rows if r[:2] == ["on-policy KD", "26.43"])
  # Those with 10k labelled examples alone: seeds 25, 26, 27.
  assert row[2] == "26.0 [23.5, 28.5]" and row[3:] == ["27.69", "", "27.82", ""]
  few, many = (
    [
      line.get_xydata().tolist()
      for line in panel.get_lines()
      if line.get_marker() == "D" and line.get_xdata().size
    ]
    for panel in figures.method_bars(study).figure.axes
  )
  assert few == []
  assert many == [[[25.58, 0]], [[26.2, 1]], [[26.43, 2]]]


def test_the_paper_s_grid_stands_in_the_cells_of_its_sizes(tmp_path):
  sweep = sweep_folders.Sweep(tmp_path, task="wmt14_en_de")
  for size in ("t5-base", "tiny"):
    for fraction, divergence in (("0.5", "JSD(0.9)"), ("1.0", "skew KL")):
      place = {"STUDENT_DATA_FRACTION": fraction, "divergence": divergence}
      score_run(sweep.add("grid", 0, size=size, **place), 20.0, 19.0)
  picture = figures.heat_maps(studies.read([str(tmp_path)]))
  # WMT, base, λ = 0.5, JSD(0.9): 26.98 and a gain of 0.40; beam search is shown
  # beside greedy decoding alone.
  assert {
    panel.get_title(): [t.get_text() for t in panel.texts]
    for panel in picture.figure.axes
  } == {
    "t5-base, greedy": ["20.0", "27.4", "20.0"],
    "t5-base, sampled at temperature 1": ["19.0", "19.0"],
    "tiny, greedy": ["20.0", "20.0"],
    "tiny, sampled at temperature 1": ["19.0", "19.0"],
  }
  assert "In italics the paper's WMT14 en-de by beam" in picture.caption


def test_examples_are_side_by_side_and_unfinished_cells_are_named(report):
  text = (report / "index.html").read_text()
  page = report_pages.Page(text)
  place = next(i for i, r in enumerate(page.rows) if r[0] == "input")
  assert page.rows[place] == [
    *("input", "reference", "teacher", "SFT", "SeqKD", "on-policy KD")
  ]
  assert page.rows[place + 1] == [
    *(
      "ein <b>Haus</b>",
      "a house",
      "a house",
      "a mouse 1k",
      "a house",
      "a house",
    )
  ]
  assert text.count('class="same"') == 3  # the teacher and two students
  assert "<li>methods/SFT_small_1k_seed7</li>" in text
  assert "32 finished runs; 1 not finished; seeds 0, 1, 2;" in text


def test_a_cell_whose_folder_was_deleted_is_left_out(sweep, tmp_path, capsys):
  moved = shutil.copytree(sweep, tmp_path / "elsewhere")
  shutil.rmtree(moved / "methods" / "SFT_small_1k_seed2")
  study = studies.read([str(moved)])
  assert capsys.readouterr().out == (
    "methods/SFT_small_1k_seed2 is left out: its folder has no cell.json\n"
  )
  assert (len(study.runs), len(study.unfinished)) == (34 - 1, 1)


def test_the_table_of_cells(sweep):
  run_folders.write_table(str(sweep))
  rows = json.loads((sweep / "cells.json").read_text())
  assert len(rows) == 3 * 2 * 3 + 8 + 6 + 2 + 1
  row = next(r for r in rows if r["cell"] == "rl/0.1_seed1")
  assert (row["steps"], row["greedy/bleu"], row["alpha"]) == (100, 25.0, "0.1")
  assert rows[-1]["status"] == "not finished"
  header = (sweep / "cells.csv").read_text().splitlines()[0].split(",")
  assert header[:2] == ["cell", "stage"] and header[-1].count("/") == 1


def test_seconds_of_a_resumed_run_count_each_step_once(tmp_path):
  rows = [
    {"step": 10, "seconds_per_step": 2.0},
    {"step": 20, "seconds_per_step": 9.0},
    {"step": 20, "seconds_per_step": 3.0},  # done again after a kill
    {"step": 20, "eval/wer": 1.0},
  ]
  sweep_folders.write_lines(tmp_path / "metrics.jsonl", rows)
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write('{"step": 3')  # killed while it wrote
  row = run_folders.read_cell(str(tmp_path))
  assert (row["steps"], row["step_seconds"]) == (20, 50.0)
