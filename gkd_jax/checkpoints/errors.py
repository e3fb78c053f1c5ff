"""Errors about checkpoints that are damaged or do not match the model."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

PyTree = Any

# Of a file system or a service, not of the files: their own words say more.
_ELSEWHERE = (
  jax.errors.JaxRuntimeError,
  MemoryError,
  PermissionError,
  ConnectionError,
  TimeoutError,
)
_STATUS_ELSEWHERE = re.compile(
  "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED"
  "|RESOURCE_EXHAUSTED|ABORTED|No space left|Too many open files"
)


def check_matches(
  params: PyTree,
  expected_shapes: PyTree,
  *,
  setting: str,
  path: os.PathLike[str] | str,
) -> None:
  """Checks names and shapes of a checkpoint before anything is compiled.

  Args:
    params: tree of arrays, or of anything with a `shape`.
    expected_shapes: tree of anything with a `shape`, as from `jax.eval_shape`.
    setting: what to change, for the message.
    path: of the checkpoint, for the message.

  Raises:
    ValueError: with the first five missing, unexpected and wrong-shaped names.
  """
  got, expected = _shapes(params), _shapes(expected_shapes)
  found = differences(got, expected)
  if any(found.values()):
    raise ValueError(
      f"expected {len(expected)} arrays of the configured model, got"
      f" {len(got)} with other names or shapes in {os.fspath(path)}"
      f" ({_summary(found, limit=5)}); set {setting} to a checkpoint of this"
      " model, or configure the model that wrote it"
    )


def differences(
  got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, list[str]]:
  """Returns missing, unexpected and wrong-shaped names, by kind.

  Args:
    got: name to shape.
    expected: name to shape.
  """
  return {
    "missing": [name for name in expected if name not in got],
    "unexpected": [name for name in got if name not in expected],
    "wrong shape": [
      f"{name} (expected {expected[name]}, got {got[name]})"
      for name in expected
      if name in got and got[name] != expected[name]
    ],
  }


def raise_if_any(
  problems: Mapping[str, list[str]],
  *,
  expected: str,
  setting: str,
  path: os.PathLike[str] | str,
) -> None:
  """Raises an error that lists all names with a problem, if there are any.

  Args:
    problems: kind of problem to names.
    expected: what was expected, for the message.
    setting: what to change, for the message.
    path: of the checkpoint, for the message.

  Raises:
    ValueError: if there is any name.
  """
  if any(problems.values()):
    raise ValueError(
      f"expected {expected}, got {_summary(problems)} in {os.fspath(path)}; set"
      f" {setting} to a whole checkpoint"
    )


@contextlib.contextmanager
def whole(folder: os.PathLike[str] | str, remedy: str) -> Iterator[None]:
  """Converts errors in its block to one about a damaged checkpoint.

  Orbax, tensorstore and TensorFlow have no common class of errors for missing,
  truncated or damaged files; Orbax even raises a plain `Exception`. Errors that
  are not about the files, such as running out of memory or a missing permission,
  pass as they are.

  Args:
    folder: the checkpoint that the block reads.
    remedy: what to do, for the message.

  Raises:
    ValueError: instead of an error in the block.
  """
  try:
    yield
  except _ELSEWHERE:
    raise
  except Exception as error:
    if _STATUS_ELSEWHERE.search(str(error)):
      raise
    # Tensorstore appends pages about its settings.
    reason = re.split(r"\[tensorstore_spec|See full", str(error))[0]
    raise ValueError(
      f"expected a whole checkpoint, got {type(error).__name__}:"
      f" {' '.join(reason.split())[:300]} in {os.fspath(folder)}; {remedy}"
    ) from error


def check_finite(
  params: PyTree, *, of: str, path: os.PathLike[str] | str, remedy: str
) -> None:
  """Checks that there is no NaN and no infinity in parameters.

  Args:
    params: tree of arrays, on their devices.
    of: whose parameters, for the message.
    path: of the checkpoint, for the message.
    remedy: what to do, for the message.

  Raises:
    ValueError: with the first five names.
  """
  flat = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  finite = jax.device_get(_finite(flat))
  wrong = [name for name in flat if not np.all(finite[name])]
  if wrong:
    raise ValueError(
      f"expected finite parameters of the {of}, got NaN or infinity in"
      f" {len(wrong)} of {len(flat)} arrays ({_first(wrong)}) in"
      f" {os.fspath(path)}; {remedy}"
    )


@jax.jit
def _finite(arrays):
  return {name: jnp.all(jnp.isfinite(x)) for name, x in arrays.items()}


def listing(folder: os.PathLike[str] | str) -> str:
  """Returns the first names in a folder, which may not exist."""
  place = epath.Path(folder)
  names = sorted(p.name for p in place.iterdir()) if place.exists() else []
  return _first(names) if names else "nothing"


def _summary(
  problems: Mapping[str, list[str]], limit: int | None = None
) -> str:
  return "; ".join(
    f"{len(names)} {kind}: {_first(names, limit)}"
    for kind, names in problems.items()
    if names
  )


def _first(names: list[str], limit: int | None = 5) -> str:
  cut = limit is not None and len(names) > limit
  return ", ".join(names[:limit]) + (", ..." if cut else "")


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(
      getattr(leaf, "shape", ())
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }
