"""A profile of some steps, and the names of a step's parts in it."""

import jax
import pytest
import toy_models

from gkd_jax import training

SCOPES = ("sample", "teacher", "student", "loss", "update")


@pytest.mark.parametrize("chunk_size", [0, 5])
def test_a_steps_parts_are_named_scopes(chunk_size):
  model, student, teacher = toy_models.gkd(loss_chunk_size=chunk_size)
  step, optimizer = toy_models.sgd_step(model, "student")
  text = (
    jax.jit(step)
    .lower(toy_models.state(student, optimizer), teacher, toy_models.batch())
    .as_text(debug_info=True)
  )
  for scope in SCOPES:
    assert f"/{scope}/" in text or f"({scope})/" in text, scope


def traces(folder):
  return sorted((folder / "plugins" / "profile").glob("*/*.xplane.pb"))


def test_the_steps_asked_for_are_traced_once(tmp_path):
  double = jax.jit(lambda x: 2 * x)
  with training.Profiler(str(tmp_path), (2, 3)) as profiler:
    for step in range(5):
      profiler.before(step)
      y = double(step)
      profiler.after(step, y)
      assert len(traces(tmp_path)) == (1 if step >= 2 else 0)  # step 3 is done
  assert len(traces(tmp_path)) == 1


def test_a_run_that_ends_early_writes_its_trace(tmp_path):
  with training.Profiler(str(tmp_path), (1, 9)) as profiler:
    profiler.before(0)
    profiler.after(0, jax.numpy.zeros(()))
    assert not traces(tmp_path)
  assert len(traces(tmp_path)) == 1


def test_without_steps_nothing_is_written(tmp_path):
  with training.Profiler(str(tmp_path), None) as profiler:
    profiler.before(0)
    profiler.after(0, ())
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [(3,), (0, 2), (5, 4)])
def test_wrong_steps(steps):
  with pytest.raises(ValueError, match=r"such as \(10, 13\).*PROFILE_STEPS"):
    training.LogConfig(profile_steps=steps)
