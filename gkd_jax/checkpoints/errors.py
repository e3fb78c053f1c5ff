"""What is said, in one sentence, of a checkpoint that cannot be used."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

PyTree = Any


def check_matches(
  params: PyTree,
  expected_shapes: PyTree,
  *,
  setting: str,
  path: os.PathLike[str] | str,
) -> None:
  """Compares names and shapes before anything is compiled.

  Args:
    params: tree of arrays that was read, or of their descriptions.
    expected_shapes: tree of anything with a `shape`, as `jax.eval_shape` makes.
    setting: what to change, for the message.
    path: where `params` come from, for the message.

  Raises:
    ValueError: with the first five missing, unexpected and misshapen names.
  """
  got, expected = _shapes(params), _shapes(expected_shapes)
  differences = {
    "missing": [name for name in expected if name not in got],
    "unexpected": [name for name in got if name not in expected],
    "wrong shape": [
      f"{name} (expected {expected[name]}, got {got[name]})"
      for name in expected
      if name in got and got[name] != expected[name]
    ],
  }
  if any(differences.values()):
    listing = "; ".join(
      f"{len(names)} {kind}: {_first(names)}"
      for kind, names in differences.items()
      if names
    )
    raise ValueError(
      f"expected {len(expected)} arrays of the configured model, got"
      f" {len(got)} with other names or shapes in {os.fspath(path)}"
      f" ({listing}); set {setting} to a checkpoint of this model, or"
      " configure the model that wrote it"
    )


@contextlib.contextmanager
def whole(folder: os.PathLike[str] | str, remedy: str) -> Iterator[None]:
  """Turns an error in its block into one that `folder` cannot be read.

  Orbax, tensorstore and TensorFlow share no class of errors over missing,
  truncated or damaged files: Orbax even raises a plain `Exception`. What JAX
  raises, as when memory runs out, says nothing about the files.

  Args:
    folder: the checkpoint that the block reads.
    remedy: what to do, for the message.

  Raises:
    ValueError: instead of the error in the block.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError):
    raise
  except Exception as error:
    # Tensorstore appends pages about its settings.
    reason = re.split(r"\[tensorstore_spec|See full", str(error))[0]
    raise ValueError(
      f"expected a whole checkpoint, got {type(error).__name__}:"
      f" {' '.join(reason.split())[:300]} in {os.fspath(folder)}; {remedy}"
    ) from error


def listing(folder: os.PathLike[str] | str) -> str:
  """Returns the first names in a folder that may not be there."""
  place = epath.Path(folder)
  names = sorted(p.name for p in place.iterdir()) if place.exists() else []
  return _first(names) if names else "nothing"


def _first(names: list[str], limit: int = 5) -> str:
  return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(
      getattr(leaf, "shape", ())
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }
