"""The comparison of runs, from files with known numbers."""

import json

import pytest

from gkd_jax import reports


def write_run(folder, greedy, sampled, curve=(), **more):
  folder.mkdir()
  rates = lambda wer: {"wer": wer, "per": wer / 4}
  final = {"greedy": rates(greedy), "sampled": rates(sampled), "params": 1234}
  (folder / "final.json").write_text(
    json.dumps(final | {"split": "test", "seconds": 56.7} | more)
  )
  if curve:
    lines = [{"step": 1, "loss": 2.0}]
    lines += [{"step": s, "eval/wer": w} for s, w in curve]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
  return folder


@pytest.fixture
def folders(tmp_path):
  teacher = write_run(tmp_path / "a", 28.0, 36.0, validation={"wer": 30.5})
  student = write_run(tmp_path / "b", 60.0, 64.0, [(10, 80.0), (20, 62.0)])
  return teacher, student


def test_report_writes_table_and_results(folders, tmp_path, capsys):
  teacher, student = folders
  output = tmp_path / "out"
  reports.report([f"teacher={teacher}", f"gkd={student}"], str(output))
  lines = (output / "table.txt").read_text().splitlines()
  assert lines[2].split() == (
    ["teacher", "28.0", "7.0", "36.0", "9.0", "1,234", "57"]
  )
  assert lines[3].split()[:3] == ["gkd", "60.0", "15.0"]
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
  }
  assert (output / "wer.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_holds_validation_errors_alone(folders):
  teacher, student = folders
  runs = {
    "teacher": reports.read_run(str(teacher)),
    "gkd": reports.read_run(str(student)),
  }
  (axes,) = reports.curves(runs).axes
  drawn = {line.get_label(): line for line in axes.get_lines()}
  assert list(drawn["gkd"].get_xdata()) == [10, 20]
  assert list(drawn["gkd"].get_ydata()) == [80.0, 62.0]
  assert set(drawn["teacher"].get_ydata()) == {30.5}  # not 28.0, on test
  del runs["teacher"]["validation"]
  (axes,) = reports.curves(runs).axes
  assert [line.get_label() for line in axes.get_lines()] == ["gkd"]


def test_a_run_that_is_not_finished(tmp_path):
  with pytest.raises(ValueError, match=r"final\.json, got .*nothing"):
    reports.read_run(str(tmp_path / "nothing"))
