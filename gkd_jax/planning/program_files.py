"""Compiled programs on disk, as text: counted again in seconds, not compiled."""

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
  """What is kept of a compiled program.

  Attributes:
    fingerprint: see `fingerprint`.
    facts: what only the compilation says, such as memory.
    text: `jax.stages.Compiled.as_text()`; None if it could not be compiled.
  """

  fingerprint: str
  facts: dict[str, Any]
  text: str | None


def fingerprint(lowered: jax.stages.Lowered, target: str) -> str:
  """The same for programs that the same compiler makes the same of.

  Args:
    lowered: the program; its text names neither files nor lines.
    target: the devices that it is compiled for.
  """
  efforts = [
    str(jax.config.jax_optimization_level),
    str(jax.config.jax_memory_fitting_level),
  ]
  text = "\n".join([target, *versions().values(), *efforts, lowered.as_text()])
  return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
  """Of what compiles, by package; "none" of what is not installed."""
  return {name: _version(name) for name in ("jax", "jaxlib", "libtpu")}


def read(folder: str, name: str, fingerprint: str) -> Program | None:
  """The program of this name and fingerprint in a folder, or None."""
  path = files.absolute(folder) / f"{name}.program.gz"
  if not path.exists():
    return None
  program = Program(**json.loads(gzip.decompress(path.read_bytes())))
  return program if program.fingerprint == fingerprint else None


def write(folder: str, name: str, program: Program) -> None:
  """Keeps a program in a folder."""
  text = json.dumps(dataclasses.asdict(program))
  files.write_bytes(
    os.path.join(folder, f"{name}.program.gz"), gzip.compress(text.encode())
  )


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "none"
