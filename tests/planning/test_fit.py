"""The search for settings that fit, and its estimates from shallow models."""

import dataclasses
import json
import shlex

import jax
import optax
import pytest
import toy_models

from gkd_jax import (
  gin_utils,
  models,
  network,
  optimizers,
  schedules,
)
from gkd_jax.planning import depths, fit, precompile, topologies

LENGTHS = {"inputs": 6, "targets": 7}
# Its programs compile in half the time of Adafactor's.
OPTIMIZER = optimizers.Optimizer(schedules.constant(0.1), optax.sgd(0.1))


def deep(student=5, teacher=4):
  """A student and a teacher of these depths, on each side."""

  def network_of(model, depth):
    config = dataclasses.replace(
      model.config, num_encoder_layers=depth, num_decoder_layers=depth
    )
    return models.EncoderDecoderModel(network.Transformer(config))

  return models.GKDModel(
    network_of(toy_models.model(8), student),
    network_of(toy_models.model(12), teacher),
  )


def report(model):
  programs = precompile.Programs(
    model, OPTIMIZER, **toy_models.settings(4), devices=jax.devices()[:1]
  )
  return programs.report("data", None, "cpu")


def test_costs_of_a_deep_network_follow_from_two_shallow_ones():
  asked = []

  def shallow(model, name):
    asked.append(sorted(depths.of(model).values()))
    return report(model)

  model = deep(3, 1).student
  estimate = depths.estimate(model, shallow)
  assert asked == [[1, 1], [2, 2]]
  whole = depths.costs(report(model))
  # What is counted exactly is affine in the depth.
  for name in ("flops", "arguments", "outputs", "aliased"):
    assert estimate[name] == whole[name] > 0, name
  assert estimate["peak"] == pytest.approx(whole["peak"], rel=0.1)
  assert estimate["hbm_bytes"] == pytest.approx(whole["hbm_bytes"], rel=0.1)


def of_depths(found):
  """A report whose memory and work are sums over layers."""
  layers = sum(weight * found[field] for field, weight in WEIGHTS.items())
  segment = {"runs": 1, "trip_count_known": True, "flops": 10 + layers}
  loop = {"runs": 5, "trip_count_known": False, "flops": layers}
  other = {"hbm_bytes": 3, "collectives": {"all-reduce": {"sent_bytes": 2}}}
  other["collectives"]["dcn all-reduce"] = {"sent_bytes": 4}
  return {
    "memory": {"peak": 100 + layers},
    "segments": [segment | other, loop | other],
  }


WEIGHTS = {
  ("student", "num_encoder_layers"): 1,
  ("student", "num_decoder_layers"): 20,
  ("teacher", "num_encoder_layers"): 300,
  ("teacher", "num_decoder_layers"): 4000,
}


@pytest.mark.parametrize(
  ("student", "teacher", "number"), [(5, 7, 3), (2, 9, 2), (2, 1, 1)]
)
def test_only_depths_above_the_shallow_ones_are_extrapolated(
  student, teacher, number
):
  model, asked = deep(student, teacher), []

  def shallow(changed, name):
    asked.append(name)
    return of_depths(depths.of(changed))

  estimate = depths.estimate(model, shallow)
  layers = 21 * student + 4300 * teacher
  assert estimate == {
    **{"peak": 100 + layers, "flops": 10 + layers, "loop_flops": 5 * layers},
    **{"hbm_bytes": 3, "sent_bytes": 2, "dcn_bytes": 4},
    **{"loop_hbm_bytes": 15, "loop_sent_bytes": 10, "loop_dcn_bytes": 20},
  }
  assert len(set(asked)) == len(asked) == number


def test_a_scanned_network_is_compiled_at_its_own_depth():
  model, asked = deep(5, 7), []
  model.teacher.module = model.teacher.module.clone(scan_layers=True)

  def shallow(changed, name):
    asked.append(sorted(depths.of(changed).values()))
    return of_depths(depths.of(changed))

  estimate = depths.estimate(model, shallow)
  assert asked == [[1, 1, 7, 7], [2, 2, 7, 7]]
  assert estimate["flops"] == 10 + 21 * 5 + 4300 * 7


def test_changed_models_leave_the_first_as_it_was():
  model = deep()
  fields = {
    ("student", "remat_policy"): "full",
    ("teacher", "num_encoder_layers"): 9,
  }
  new = depths.changed(model, fields)
  assert new.student.module.config.remat_policy == "full"
  assert new.teacher.config.num_encoder_layers == 9
  assert new.student.config.num_encoder_layers == 5
  assert model.student.config.remat_policy == "none"
  assert model.teacher.config.num_encoder_layers == 4
  sft = depths.changed(model.student, {("student", "remat_policy"): "full"})
  assert sft.student is sft and sft.config.remat_policy == "full"
  assert model.student.config.remat_policy == "none"


def test_seconds_of_costs_by_hand():
  chip = topologies.Chip("test", 1000.0, 0, 100.0, 500.0)
  costs = {
    **{"flops": 2000, "hbm_bytes": 10, "sent_bytes": 2000, "dcn_bytes": 70},
    **{"loop_flops": 1000, "loop_hbm_bytes": 3000, "loop_sent_bytes": 0},
    **{"loop_dcn_bytes": 0},
  }
  assert depths.seconds(costs, chip) == 4 + 30
  with_rate = dataclasses.replace(chip, dcn_bandwidth=10.0)
  assert depths.seconds(costs, with_rate) == 7 + 30


def test_meshes_fill_the_rows_of_a_batch():
  found = [dataclasses.astuple(c)[:2] for c in fit.meshes(8, 4)]
  # 8 x 1 has more parts than rows; 1 x 8 has nothing to split over.
  assert found == [(2, False), (2, True), (4, False), (4, True), (8, False)]


def test_only_the_model_axes_that_are_asked_for_are_tried():
  found = [dataclasses.astuple(c)[:2] for c in fit.meshes(8, 4, [4])]
  assert found == [(4, False), (4, True)]
  with pytest.raises(ValueError, match=r"\[2, 4, 8\].*got \[1, 3\]; set --mod"):
    list(fit.meshes(8, 4, [1, 3]))


def test_estimates_leave_out_no_optimization():
  before = jax.config.jax_optimization_level
  with fit._little_effort():
    # With "O1" weights split over data are gathered in float32.
    assert jax.config.jax_optimization_level == before
    assert jax.config.jax_memory_fitting_level == "O1"
  assert jax.config.jax_memory_fitting_level != "O1"


def test_memory_is_saved_step_by_step():
  first = fit.Candidate(2, True)
  levels = [
    [(c.num_microbatches, c.remat_policy) for c in level]
    for level in fit.savers(first, 4)
  ]
  assert levels == [
    [(1, "none")],
    [(1, "minimal"), (2, "none")],
    [(1, "full")],
    [(2, "minimal"), (4, "none")],
    [(2, "full")],
    [(4, "minimal")],
    [(4, "full")],
  ]
  # Rows that do not halve.
  assert [len(level) for level in fit.savers(first, 3)] == [1, 1, 1]


def search(hbm_bytes, folder=None, **options):
  """With one row, which only the model axis can share."""
  chip = topologies.Chip("test", 1e9, hbm_bytes, 1e8, 1e7)
  settings = {
    "devices": jax.devices()[:2],
    "chip": chip,
    "topology": "test:2",
    **toy_models.settings(1, num_microbatches=3),  # of the run; searched
    "output_path": folder,
  }
  return fit.fit(
    toy_models.model(8),
    OPTIMIZER,
    **settings | options,
  )


def test_what_fits_is_compiled_whole_and_its_settings_are_flags(
  tmp_path, capsys
):
  result = search(2**30, str(tmp_path))
  assert json.loads((tmp_path / "fit.json").read_text()) == result
  # With room enough nothing that saves memory is tried.
  (row,) = result["candidates"]
  assert tuple(row["settings"].values()) == (2, False, 1, "none")
  best = result["best"]
  programs = precompile.Programs(
    toy_models.model(8),
    OPTIMIZER,
    **toy_models.settings(1, num_partitions=2),
    devices=jax.devices()[:2],
  )
  assert programs.held_bytes == best["report"]["memory"]["arguments"]
  flags = best["flags"]
  assert f"fits: {shlex.join(flags)}\n" in capsys.readouterr().out
  # The flags are bindings that a run's files take.
  bindings = [
    flag.removeprefix("--gin.").replace("=", " = ", 1) for flag in flags
  ]
  gin_utils.parse(["experiments/smoke.gin"], bindings, [])


def test_where_arguments_do_not_fit_nothing_is_compiled(capsys):
  result = search(1000)
  assert result["best"] is None and "nothing fits" in capsys.readouterr().out
  (row,) = result["candidates"]
  assert row["held_bytes"] > 1000 and not row["fits"]


class Written:
  """In the place of compiled programs: each costs what is written of it."""

  held_bytes = 10

  def __init__(self, candidate, whole):
    self.candidate, self.whole = candidate, whole

  def report(self, phase, chip, topology, folder, name):
    estimate, peak, seconds = self.whole[self.candidate.name]
    if name.endswith("-whole"):
      return {
        "memory": {"peak": peak},
        "fits": peak <= chip.hbm_bytes,
        "roofline": {"seconds": seconds},
        "compile_seconds": 0.0,
        "compiler_says": "",
      }
    once = {"runs": 1, "trip_count_known": True, "collectives": {}}
    flops = estimate[1] * chip.peak_flops
    return {
      "memory": {"peak": estimate[0]},
      "segments": [once | {"flops": flops, "hbm_bytes": 0}],
    }


def choose(written, hbm_bytes=100, number=2):
  chip = topologies.Chip("test", 8.0, hbm_bytes, 8.0, 8.0)
  search = fit._Search(
    deep(1, 1),
    lambda model, candidate: Written(candidate, written),
    chip,
    "test:2",
    "data",
    None,
  )
  rows = list(search.rows(fit.meshes(2, 4), 2, 4))
  best = search.confirm(rows, number)
  return rows, best and fit.Candidate(**best["settings"]).name


def test_the_fastest_of_those_that_fit_is_chosen():
  # Name: (peak and seconds of the estimate), and peak and seconds of the whole.
  written = {
    "1-false-1-none": ((500, 1), 500, 1),
    "1-false-1-minimal": ((90, 9), 90, 9),
    "1-false-2-none": ((80, 2), 101, 2),  # the estimate was too small
    "1-true-1-none": ((70, 3), 70, 5),
    "2-false-1-none": ((60, 4), 60, 4),
  }
  rows, best = choose(written)
  # All that saves memory in the first mesh, nothing more in the others.
  assert [fit.Candidate(**r["settings"]).name for r in rows] == list(written)
  # Of the two first that fit, by the estimate, the second is faster.
  assert best == "2-false-1-none"
  assert choose(written, number=1)[1] == "1-true-1-none"
  assert choose(written, number=9)[1] == "2-false-1-none"


def test_devices_of_no_known_chip_are_a_sentence():
  _, chip = topologies.devices("cpu:2")
  with pytest.raises(ValueError, match="rates are known, got 'cpu:2'; set"):
    search(0, chip=chip, topology="cpu:2")
