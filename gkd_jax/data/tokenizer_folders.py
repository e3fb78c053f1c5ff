"""Where checkpoints have their tokenizers, and copies of them.

Imports neither seqio nor TensorFlow until a vocabulary is asked for.
"""

import os
from typing import Any

from etils import epath

from gkd_jax import files, model_folders

_NAMES = model_folders.TOKENIZER_FILE, *model_folders.PIECES_FILES


def find(path: files.Path) -> epath.Path | None:
  """Returns the tokenizer's file that belongs to a path; None: there is none.

  Args:
    path: a tokenizer's file, a folder of a model, a run's MODEL_DIR or one of its
      checkpoints.
  """
  place = files.absolute(path)
  if place.is_file():
    return place if place.suffix in (".json", ".model") else None
  for folder in (place, place.parent):
    for name in _NAMES:
      if (folder / name).is_file():
        return folder / name
  return None


def path_of(vocabulary: Any) -> str | None:
  """Returns the file of a vocabulary, ours or a SentencePiece's; None without."""
  for name in ("path", "sentencepiece_model_file"):
    if (path := getattr(vocabulary, name, None)) is not None:
      return os.fspath(path)
  return None


def copy(source: files.Path | None, folder: files.Path) -> bool:
  """Copies the tokenizer that belongs to a path into a folder.

  Args:
    source: see `find`.
    folder: of a model or a run.

  Returns:
    Whether there was one.
  """
  found = None if source is None else find(source)
  if found is None:
    return False
  target = files.absolute(folder)
  # A file of another name gets one by which `find` finds it.
  usual = _NAMES[0] if found.suffix == ".json" else _NAMES[1]
  copies = {name: found.parent / name for name in model_folders.TOKENIZER_FILES}
  copies[found.name if found.name in _NAMES else usual] = found
  for name, file in copies.items():
    if file.is_file() and file != target / name:
      files.write_bytes(target / name, file.read_bytes())
  generation = target / model_folders.GENERATION_FILE
  eos = model_folders.stated_tokens(found.parent)["eos_token_id"]
  if eos and not generation.exists():
    files.write_json(generation, {"eos_token_id": eos})
  return True


def vocabulary(
  vocabulary_path: str | None,
  student_path: str | None = None,
  teacher_path: str | None = None,
) -> Any:
  """Returns the vocabulary of a path, or of checkpoints, as seqio has them.

  Args:
    vocabulary_path: see `find`; None: that of the student's, else the teacher's
      checkpoint.
    student_path: the student's checkpoint.
    teacher_path: the teacher's checkpoint.

  Raises:
    ValueError: there is none, or student and teacher have different ones.
  """
  if vocabulary_path is not None:
    if (found := find(vocabulary_path)) is None:
      raise ValueError(
        f"expected a tokenizer, got nothing at {vocabulary_path}; set"
        " VOCABULARY_PATH to a folder with tokenizer.json or a SentencePiece"
        " model"
      )
    return _of(found)
  given = student_path, teacher_path
  paths = [os.fspath(p) for p in given if isinstance(p, str | os.PathLike)]
  places = [place for place in map(find, paths) if place is not None]
  if not places:
    raise ValueError(
      f"expected a tokenizer, got none in {' or '.join(paths) or 'a checkpoint'}"
      "; set VOCABULARY_PATH"
    )
  first, *others = map(_of, places)
  for other, place in zip(others, places[1:], strict=True):
    if type(first) is type(other) and not _same_ids(first, other):
      raise ValueError(
        f"expected one tokenizer of student and teacher, got {places[0]} and"
        f" {place}, which give texts different ids; set"
        " INITIAL_CHECKPOINT_PATH, TEACHER_CHECKPOINT_PATH or VOCABULARY_PATH"
      )
  return first


def _of(file):
  import seqio

  from gkd_jax.data import tokenizer_files

  if file.suffix == ".json":
    return tokenizer_files.TokenizerVocabulary(file)
  return seqio.SentencePieceVocabulary(os.fspath(file))


def _same_ids(a, b):
  ids = getattr(a, "same_ids", a.__eq__)
  return ids(b)
