"""Words of a command line, as flags of a command and their values."""

import pytest

from gkd_jax import command_line


def test_flags_of_t5x_become_bindings_in_their_order():
  args = command_line.parse(
    "train",
    [
      "--gin.A='x=y'",
      "--gin_bindings=B = 2",
      "--gin.scope/f.x=@g()",
      "--gin_file=a.gin",
      "--gin_file",
      "b.gin",
    ],
  )
  assert args.gin_bindings == ["A = 'x=y'", "B = 2", "scope/f.x = @g()"]
  assert args.gin_file == ["a.gin", "b.gin"]


def test_values_and_defaults():
  args = command_line.parse("train", ["--gin_search_paths=a,b"])
  assert args.gin_search_paths == ["a", "b"] and args.gin_file == []
  assert args.dry_run is False and args.lost_after_s == 40
  assert args.process_count is None and args.compilation_cache_dir is None
  args = command_line.parse(
    "train",
    ["--dry_run", "--process_index=0", "--compilation_cache_dir="],
  )
  assert args.dry_run is True and args.process_index == 0
  assert args.compilation_cache_dir == ""
  assert command_line.parse("train", ["--dry_run=False"]).dry_run is False
  args = command_line.parse("sweep", ["--axis=A=1,2", "--axis=B=3"])
  assert args.axis == ["A=1,2", "B=3"] and args.jobs == 1
  assert args.seeds is None


def test_words_may_stand_among_flags():
  args = command_line.parse("report", ["a=/x", "--output_path=o", "b", "/c"])
  assert args.words == ["a=/x", "b", "/c"] and args.output_path == "o"


def test_a_flag_is_not_shortened():
  with pytest.raises(ValueError, match="such as --gin_file, got --gin_fi;"):
    command_line.parse("train", ["--gin_fi=a.gin"])
