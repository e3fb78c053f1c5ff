"""Models that come with the package."""

import difflib
import os

_HERE = os.path.dirname(os.path.abspath(__file__))


def names() -> list[str]:
  """Names of the shipped models, sorted."""
  return sorted(
    e.name for e in os.scandir(_HERE) if e.is_dir() and e.name[0] != "_"
  )


def model_path(name: str, setting: str = "TEACHER_CHECKPOINT_PATH") -> str:
  """Folder of a shipped model (`model.safetensors`, `config.json`).

  Args:
    name: such as "g2p_teacher".
    setting: what the name is given by, for the error.

  Raises:
    ValueError: no such model.
  """
  if name not in names():
    known = difflib.get_close_matches(name, names(), 1) or names()
    raise ValueError(
      f"expected a shipped model such as {', '.join(known)}, got {name!r};"
      f" set {setting}"
    )
  return os.path.join(_HERE, name)
