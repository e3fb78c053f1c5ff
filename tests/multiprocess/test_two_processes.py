"""What two processes work out together, all in one pair of them."""

import os
import socket

import command_line
import fork_server
import numpy as np
import pytest
import toy_models
import toy_rollouts

_WORKER = """
import sys
import jax
import numpy as np
address, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.path.append(sys.argv[4])
jax.distributed.initialize(address, 2, index)
import toy_models
import toy_rollouts
from gkd_jax import data

longest = [(1, 3), (4, 2), (1, 1), (7, 0)]  # of each process
rows = [np.int32([[5] * pair[index] + [0] * (9 - pair[index])]) for pair in longest]
batches = iter([{"encoder_input_tokens": x} for x in rows])
cut = data.CutInputs(batches, (2, 4), {"encoder_input_tokens": 9})
lengths = [next(cut)["encoder_input_tokens"].shape[1] for _ in rows]
np.save(f"{folder}/lengths{index}.npy", lengths)

rows = slice(4 * index, 4 * index + 4)
batch = {k: v[rows] for k, v in toy_models.batch().items()}
got = toy_rollouts.second_batch(batch)
np.savez(f"{folder}/batch{index}.npz", **got)
"""


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
  """The files that two processes have written."""
  folder = tmp_path_factory.mktemp("two")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  helpers = os.path.dirname(toy_models.__file__)
  processes = [
    fork_server.Process(
      ["-c", _WORKER, address, str(index), str(folder), helpers],
      folder,
      command_line.ENV,
    )
    for index in range(2)
  ]
  printed = [process.communicate() for process in processes]
  assert [p.returncode for p in processes] == [0, 0], printed
  return folder


def test_all_processes_cut_inputs_alike(folder):
  for index in range(2):
    lengths = np.load(folder / f"lengths{index}.npy")
    assert lengths.tolist() == [4, 4, 2, 9]


def test_two_processes_judge_their_own_rows(folder):
  expected = toy_rollouts.second_batch(toy_models.batch())
  parts = [np.load(folder / f"batch{index}.npz") for index in range(2)]
  for name, value in expected.items():
    both = np.concatenate([part[name] for part in parts])
    np.testing.assert_allclose(both, value, atol=1e-5, err_msg=name)
