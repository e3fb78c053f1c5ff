"""Compares the names and shapes of two trees, for a message that helps."""

import os
from typing import Any

import jax

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
      f"{len(names)} {kind}: {first(names)}"
      for kind, names in differences.items()
      if names
    )
    raise ValueError(
      f"expected {len(expected)} arrays of the configured model, got"
      f" {len(got)} with other names or shapes in {os.fspath(path)}"
      f" ({listing}); set {setting} to a checkpoint of this model, or"
      " configure the model that wrote it"
    )


def first(names: list[str], limit: int = 5) -> str:
  """Joins the first names, and says if there are more."""
  return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(
      getattr(leaf, "shape", ())
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }
