"""Compiled programs on disk, as text, to be counted again without compiling."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
from typing import Any

import jax

from gkd_jax import files


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program as it is stored.

  Attributes:
    fingerprint: see `fingerprint`.
    facts: figures that the text does not contain, such as memory.
    text: `jax.stages.Compiled.as_text()`; None if it does not compile.
  """

  fingerprint: str
  facts: dict[str, Any]
  text: str | None


def fingerprint(lowered: jax.stages.Lowered, target: str) -> str:
  """Returns a cache key: hash of HLO text, target and compiler versions.

  Args:
    lowered: the program; its text contains neither files nor line numbers.
    target: the devices that it is compiled for.
  """
  efforts = [
    str(jax.config.jax_optimization_level),
    str(jax.config.jax_memory_fitting_level),
  ]
  text = "\n".join([target, *versions().values(), *efforts, lowered.as_text()])
  return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
  """Returns the versions of the compiler's packages, "none" if not installed."""
  return {name: _version(name) for name in ("jax", "jaxlib", "libtpu")}


def read(folder: str, name: str, fingerprint: str) -> Program | None:
  """Reads the program of this name and fingerprint in a folder, or None."""
  path = files.absolute(folder) / f"{name}.program.gz"
  if not path.exists():
    return None
  program = Program(**json.loads(gzip.decompress(path.read_bytes())))
  return program if program.fingerprint == fingerprint else None


def write(folder: str, name: str, program: Program) -> None:
  """Writes a program into a folder."""
  text = json.dumps(dataclasses.asdict(program))
  files.write_bytes(
    os.path.join(folder, f"{name}.program.gz"), gzip.compress(text.encode())
  )


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "none"
