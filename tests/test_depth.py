"""How many of our functions lie between the command line and the formula."""

import pathlib
import traceback

import command_line
import pytest

from gkd_jax import divergences
from gkd_jax.divergences import stable

PACKAGE = str(pathlib.Path(divergences.__file__).parents[1])


class Reached(Exception):
  """Raised where a divergence computes its terms."""


@pytest.mark.parametrize(
  ("chunk_size", "most"),
  [pytest.param(0, 10, marks=pytest.mark.nightly), (16, 12)],
)
def test_few_frames_from_the_command_line_to_the_formula(
  tmp_path, monkeypatch, chunk_size, most
):
  compute = stable.skewed_kl

  def terms(a, b, *shares):
    if a.shape[-1] > 2:  # in the step, not in the check of a divergence's name
      raise Reached
    return compute(a, b, *shares)

  monkeypatch.setattr(stable, "skewed_kl", terms)
  with pytest.raises(Reached) as info:
    command_line.here(
      "train",
      "--gin_file=experiments/smoke.gin",
      *command_line.gin(
        MODEL_DIR=str(tmp_path / "run"),
        TEACHER_CHECKPOINT_PATH=command_line.save_toy_teacher(
          tmp_path / "teacher"
        ),
        MIXTURE_OR_TASK_NAME="arithmetic_cot_1k",
        DIVERGENCE="forward_kl",
        BETA=None,
        STUDENT_DATA_FRACTION=1.0,
        LOSS_CHUNK_SIZE=chunk_size,
      ),
    )
  ours = [
    frame.name
    for frame in traceback.extract_tb(info.value.__traceback__)
    if frame.filename.startswith(PACKAGE)
  ]
  # To the function that is differentiated, and to the divergence's formula.
  assert ours.index("train_loss") + 1 <= 5, ours
  assert ours[-1] == "forward_kl" and len(ours) <= most, ours
