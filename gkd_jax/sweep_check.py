"""Finds what is wrong with the gin of a grid before any cell is run."""

import concurrent.futures
import multiprocessing
from collections.abc import Sequence

from gkd_jax import sweeps


def check(
  cells: Sequence[sweeps.Cell], output: str, search_paths: Sequence[str]
):
  """Parses the gin of each cell, in a process that ends with it.

  The process keeps what gin imports (jax, TensorFlow) out of the sweep's own,
  which may run for days.

  Args:
    cells: those to be run.
    output: folder of the sweep.
    search_paths: further folders of gin files.

  Raises:
    ValueError: gin that cannot be parsed, a macro that nothing reads, or a
      training cell that would write no `final.json`.
  """
  if not cells:
    return
  with concurrent.futures.ProcessPoolExecutor(
    max_workers=1, mp_context=multiprocessing.get_context("spawn")
  ) as pool:
    pool.submit(check_here, cells, output, search_paths).result()


def check_here(
  cells: Sequence[sweeps.Cell], output: str, search_paths: Sequence[str]
):
  """What `check` does, in this process; gin's state is left as the last cell's."""
  import gin
  from gkd_jax import gin_utils

  # Seeds differ by a number alone: the first is parsed.
  firsts: dict[tuple, sweeps.Cell] = {}
  for cell in cells:
    firsts.setdefault((cell.stage, *cell.axes.values()), cell)
  for cell in firsts.values():
    bindings = [
      f"{name} = {value.replace('{output}', output)}"
      for name, value in cell.settings.items()
    ]
    try:
      gin_utils.parse(cell.gin_files, bindings, search_paths)
    except Exception as error:  # gin raises many kinds
      # The first line is what is wrong, the others say where gin met it.
      reason = str(error).strip().splitlines() or [repr(error)]
      raise ValueError(f"{cell.name}: {reason[0]}") from None
    if cell.command == "train" and cell.done == "final.json":
      try:
        split = gin.query_parameter("train.train.final_eval_split")
      except ValueError:
        split = None
      if not split:
        raise ValueError(
          f"expected a split to score {cell.name} on, got none;"
          " set train.train.final_eval_split"
        )
