"""Rows of files, and the places and reasons of those that are bad."""

import pyarrow
import pyarrow.parquet
import pytest
import remote_files

from gkd_jax import files
from gkd_jax.data import row_files


def rows(path):
  (found,) = row_files.find(str(path), "TRAIN_FILES")
  return [
    (row.place.rpartition(":")[2], row.fields or row.problem)
    for row in row_files.read(found)
  ]


def test_each_line_of_json_is_a_row_and_bad_ones_say_why(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(
    b'\xef\xbb\xbf{"a": "\xc3\xa9", "b": 1}\r\n'
    b" \t\r\n"
    b'{"a": "\xff"}\n'
    b"{'a': 1}\n"
    b"[1, 2]\n"
    b'{"a": "x\\ny"}'
  )
  assert rows(path) == [
    ("1", {"a": "é", "b": 1}),
    ("3", "not UTF-8"),
    (
      "4",
      "not JSON (Expecting property name enclosed in double quotes:"
      " line 1 column 2 (char 1))",
    ),
    ("5", "list and no JSON object"),
    ("6", {"a": "x\ny"}),
  ]


def test_tables_have_names_in_their_first_line(tmp_path):
  path = tmp_path / "a.csv"
  path.write_bytes(
    b'a,b\n1,"x, ""y""\nz"\n\nonly\n2,\xff\n3,end\n"4"x,broken\n5,\xe2\x82\xac\n'
  )
  assert rows(path) == [
    ("2", {"a": "1", "b": 'x, "y"\nz'}),
    ("5", "1 cells in 2 columns"),
    ("6", "not UTF-8"),
    ("7", {"a": "3", "b": "end"}),
    ("8", "not CSV (',' expected after '\"')"),
    ("9", {"a": "5", "b": "€"}),
  ]
  path = tmp_path / "a.tsv"
  # With the mark that Windows writes first, and its ends of lines in a cell.
  path.write_bytes(b'\xef\xbb\xbfa\tb\nx, y\tz\n"x\r\ny"\tz\n')
  assert rows(path) == [
    ("2", {"a": "x, y", "b": "z"}),
    ("3", {"a": "x\r\ny", "b": "z"}),
  ]


def test_parquet_keeps_lists_and_numbers(tmp_path):
  messages = [[{"role": "user", "content": "a"}], None]
  path = tmp_path / "a.parquet"
  table = pyarrow.table({"messages": messages, "n": [1, 2]})
  pyarrow.parquet.write_table(table, path)
  assert rows(path) == [
    ("1", {"messages": messages[0], "n": 1}),
    ("2", {"messages": None, "n": 2}),
  ]


def test_a_damaged_parquet_file_is_named(tmp_path):
  path = tmp_path / "a.parquet"
  table = pyarrow.table({"n": ["abcdef", "ghijkl"] * 20})
  pyarrow.parquet.write_table(
    table,
    path,
    use_dictionary=False,
    compression="none",
    write_statistics=False,
  )
  whole = path.read_bytes()
  at = whole.index(b"abcdef")
  inside = whole[: at - 4] + b"\xff" * 10 + whole[at + 6 :]
  no_text = whole[:at] + b"\xff" * 6 + whole[at + 6 :]
  for content in (whole[:-9], b"", b"n\n1\n", inside, no_text):
    path.write_bytes(content)
    with pytest.raises(
      ValueError, match=r"a whole Parquet file, .*a.parquet; "
    ):
      rows(path)


def test_globs_find_files_here_and_in_a_bucket(tmp_path, monkeypatch):
  bucket = remote_files.new()
  for folder in (str(tmp_path), bucket):
    for name in ("b1/x.jsonl", "b1/y.jsonl", "b2/x.jsonl", "b1/z.txt"):
      files.write_text(f"{folder}/{name}", '{"a": "b"}\n')
    find = lambda *p, f=folder: [
      str(path)[len(str(f)) + 1 :]
      for path in row_files.find([f"{f}/{x}" for x in p], "TRAIN_FILES")
    ]
    assert find("b1/*.jsonl") == ["b1/x.jsonl", "b1/y.jsonl"]
    assert find("b?/x.jsonl") == ["b1/x.jsonl", "b2/x.jsonl"]
    assert find("b2/x.jsonl", "*/x.jsonl") == ["b2/x.jsonl", "b1/x.jsonl"]
    assert rows(f"{folder}/b1/x.jsonl") == [("1", {"a": "b"})]
    with pytest.raises(ValueError, match=r"got none at .*q.jsonl; set TRAIN_F"):
      find("q.jsonl")
    with pytest.raises(ValueError, match=r"files of .jsonl, .*b1/z.txt; set"):
      find("b1/z.txt")
  monkeypatch.chdir(tmp_path)
  (found,) = row_files.find("b2/*.jsonl", "TRAIN_FILES")
  assert found == tmp_path / "b2" / "x.jsonl"
