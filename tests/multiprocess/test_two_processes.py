"""What two processes work out together, all in one pair of them."""

import json
import os
import socket

import command_line
import fork_server
import numpy as np
import pytest
import toy_models
import toy_rollouts

_WORKER = """
import dataclasses
import json
import sys
import jax
import numpy as np
address, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.path.append(sys.argv[4])
jax.distributed.initialize(address, 2, index)
import toy_models
import toy_rollouts
import written_outputs
from gkd_jax import data, partitioning, training
from gkd_jax.evaluation import run_evaluations


def raises_in_one(targets, predictions):
  if index:
    raise KeyError("no such word")
  return {"right": 50.0}


def differs(targets, predictions):
  return {"process": float(index)}


class Log:
  said = []

  def evaluation(self, *_):
    pass

  def failed_evaluation(self, *words):
    self.said.append(words)


task = written_outputs.add_task(
  "of_two_processes",
  {"inputs": ["0", "1"], "targets": ["a", "b"]},
  [raises_in_one, differs],
)
model, teacher = written_outputs.Outputs(), written_outputs.Outputs()
model.teacher = teacher
mesh = partitioning.make_mesh()
rows = np.full([2, 96], 100, np.int32)
params = jax.device_put(rows, partitioning.replicated(mesh))
evaluations = run_evaluations.RunEvaluations(
  model,
  params,
  task=data.load_task(task),
  dataset=training.DatasetConfig(task, {"inputs": 8, "targets": 8}, 2),
  settings=training.EvalConfig(split="test", batch_size=2),
  mesh=mesh,
)
scores = evaluations.at(3, params, Log())
stop = dataclasses.replace(evaluations._settings, errors_stop=True)
evaluations._settings = stop
try:
  evaluations.at(4, params, Log())
except Exception as error:
  raised = str(error)
with open(f"{folder}/evaluation{index}.json", "w") as file:
  json.dump([scores, Log.said, raised], file)

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


def test_an_evaluation_that_fails_in_one_process_fails_in_all(folder):
  for index, words in enumerate(["process 1: KeyError: ", "'no such word'"]):
    found = (folder / f"evaluation{index}.json").read_text()
    scores, [[step, said, count]], raised = json.loads(found)
    # What is best, and saved, is decided by the scores of the first process.
    assert scores == {"right": 50.0, "process": 0.0}
    assert (step, count) == (3, 1)
    assert said.startswith("process 1: KeyError: 'no such word' (")
    assert raised.startswith(words)
