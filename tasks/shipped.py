"""Models that come with the package."""

import os


def model_path(name: str) -> str:
  """Folder of a shipped model (`model.safetensors`, `config.json`).

  Args:
    name: such as "g2p_teacher".

  Raises:
    ValueError: no such model.
  """
  here = os.path.dirname(os.path.abspath(__file__))
  path = os.path.join(here, name)
  if not os.path.isdir(path):
    found = sorted(
      e.name for e in os.scandir(here) if e.is_dir() and e.name[0] != "_"
    )
    raise ValueError(
      f"expected a shipped model of {found}, got {name!r};"
      " set TEACHER_CHECKPOINT_PATH"
    )
  return path
