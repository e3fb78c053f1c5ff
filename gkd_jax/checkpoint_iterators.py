"""The data iterator's position as an item of an Orbax checkpoint."""

import dataclasses
import os
from typing import Protocol

import orbax.checkpoint as ocp
from etils import epath


class SavableIterator(Protocol):
  """A data iterator that writes its position to a folder and reads it back.

  The folder exists, is empty, is that of all processes, and is renamed after
  `save_state` returns: two processes must not write one file, and files must not
  refer to it by an absolute path.
  """

  def save_state(self, path: str) -> None:
    """Writes the position, from which `next` goes on."""

  def restore_state(self, path: str) -> None:
    """Goes to the position that `save_state` wrote."""


class IteratorHandler(ocp.CheckpointHandler):
  """Lets a `SavableIterator` write into Orbax's temporary folder.

  It is a synchronous handler, so `save` returns when the iterator has written:
  the position on disk is that of the step, though the arrays follow later.
  """

  def save(self, directory: epath.Path, args: "IteratorArgs") -> None:
    args.iterator.save_state(os.fspath(directory))

  def restore(self, directory: epath.Path, args: "IteratorArgs") -> None:
    args.iterator.restore_state(os.fspath(directory))


@ocp.args.register_with_handler(
  IteratorHandler, for_save=True, for_restore=True
)
@dataclasses.dataclass
class IteratorArgs(ocp.args.CheckpointArgs):
  """The iterator whose position is saved or restored."""

  iterator: SavableIterator
