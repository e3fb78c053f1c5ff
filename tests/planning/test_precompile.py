"""Programs compiled without their devices' arrays, against counts by hand."""

import json
import math
import pathlib
import re

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_models
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gkd_jax import models, optimizers, partitioning, train, training
from gkd_jax.command_line import gin_settings
from gkd_jax.network import layers
from gkd_jax.planning import costs, precompile, program_report, topologies

ROOT = pathlib.Path(__file__).parents[2]
LENGTHS = {"inputs": 6, "targets": 7}
CHIP = topologies.Chip("test", 1e9, 2**30, 1e8, 1e7)


def compile_toy(model, batch_size=16, partitioner=None, **options):
  return precompile.precompile(
    model,
    optimizers.adafactor(0.1),
    **toy_models.settings(
      batch_size, **{"num_partitions": 2} | (partitioner or {})
    ),
    **(
      {"devices": jax.devices()[:8], "chip": None, "topology": "cpu:8"}
      | options
    ),
  )


def gkd(**options):
  return models.GKDModel(toy_models.model(8), toy_models.model(12), **options)


@pytest.fixture(scope="module")
def model():
  return gkd(student_data_fraction=0.5, loss_chunk_size=10)


@pytest.fixture(scope="module")
def phases(model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("out")
  result = compile_toy(
    model,
    chip=CHIP,
    phases=["teacher", "data", "student"],
    output_path=str(folder),
  )
  written = json.loads((folder / "precompile.json").read_text())
  assert written == result
  assert result["mesh"] == {"data": 4, "model": 2}
  return result["phases"]


def test_arguments_of_a_sharded_teacher_counted_by_hand(phases):
  # D = 12, two heads of 4, mlp 8, vocabulary 16, one layer on each side.
  matrices = 2 * 16 * 12  # embedding and head
  matrices += 3 * 4 * 12 * 8  # encoder, decoder and cross-attention
  matrices += 2 * 3 * 12 * 8  # gated MLPs
  matrices += 2 * 32 * 2  # relative positions
  norms = (3 + 4) * 12
  tokens = (6 + 7 + 7) * 16 // 4  # the loss weights are not read
  memory = phases["teacher"]["memory"]
  assert memory["arguments"] == 4 * (matrices // 2 + norms + tokens)
  # Logits of a quarter of the rows; the half of the vocabulary.
  assert memory["outputs"] in (4 * 4 * 7 * 16, 4 * 4 * 7 * 8)


def test_weights_split_over_data_are_gathered_and_activations_stay(
  model, phases
):
  whole = phases["teacher"]["collectives"]
  split = compile_toy(
    model, phases=["teacher"], partitioner={"shard_params_over_data": True}
  )
  split = split["phases"]["teacher"]["collectives"]
  # The model axis adds up no more; nothing is added up over data.
  for name in ("count", "operand_bytes"):
    assert split["all-reduce"][name] <= whole["all-reduce"][name]
  assert "all-to-all" not in split
  # A quarter of each matrix is here; see the count by hand above. The relative
  # positions have no axis to split, norms have. A table may stay where it is:
  # then what was looked up for all rows, a quarter of its features, is gathered.
  table = 16 * 12
  matrices = 2 * table + 3 * 4 * 12 * 8 + 2 * 3 * 12 * 8
  looked_up = 16 * (6 + 7) * 12 // 4
  more = (
    split["all-gather"]["operand_bytes"]
    - whole.get("all-gather", {"operand_bytes": 0})["operand_bytes"]
  )
  assert 4 * (matrices - table) // 2 // 4 <= more
  assert more <= 4 * (matrices // 2 + 7 * 12) // 4 + 4 * looked_up


def test_a_table_split_over_data_is_not_gathered_to_be_looked_up():
  mesh = partitioning.make_mesh(1, jax.devices()[:8])
  rng = np.random.default_rng(0)
  table, of_rows = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((512, 32), (16, 4, 32))
  )
  tokens = rng.integers(512, size=(16, 4))
  embed = layers.Embed(512, 32)

  def loss(table, tokens, of_rows):
    x = embed.apply({"params": {"embedding": table}}, tokens)
    return jnp.sum(x * of_rows), x

  split, rows = (
    NamedSharding(mesh, P(*p)) for p in ((None, "data"), ("data",))
  )
  program = partitioning.jit(
    jax.grad(loss, has_aux=True), mesh, out_shardings=(split, rows)
  )
  arguments = (
    jax.device_put(table, split),
    *(jax.device_put(x, rows) for x in (tokens, of_rows)),
  )
  gradient, x = program(*arguments)
  expected = np.zeros_like(table)
  np.add.at(expected, tokens, of_rows)
  np.testing.assert_array_equal(x, table[tokens])
  np.testing.assert_allclose(gradient, expected, rtol=1e-6)
  text = program.lower(*arguments).compile().as_text()
  found = costs.collectives(costs.count(text, loop_length=1))
  assert sum(c.operand_bytes for c in found.values()) < table.nbytes / 8


def test_figures_are_those_of_a_program_with_real_arrays(model, phases):
  mesh = partitioning.make_mesh(2, jax.devices()[:8])
  shapes = partitioning.input_shapes(LENGTHS)
  _, shardings = partitioning.abstract_params(
    model.teacher, shapes, mesh, partitioning.parameter_rules(False)
  )
  params = jax.device_put(toy_models.params(model.teacher, 2), shardings)
  batch = partitioning.put_batch(toy_models.batch(rows=16), mesh)
  teacher = partitioning.jit(model.teacher.logits, mesh)
  stats = teacher.lower(params, batch).compile().memory_analysis()
  memory = phases["teacher"]["memory"]
  assert memory["arguments"] == stats.argument_size_in_bytes
  assert memory["outputs"] == stats.output_size_in_bytes
  assert memory["temporaries"] == stats.temp_size_in_bytes
  assert memory["peak"] == (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.generated_code_size_in_bytes
  )


def test_an_on_policy_step_is_a_step_on_data_and_the_sampler_s_loop(phases):
  # With dropout 0 the encoder runs once, for sampling and for training.
  (loop,) = [
    s
    for s in phases["student"]["segments"]
    if not s["trip_count_known"] and s["runs"] == LENGTHS["targets"]
  ]
  more = phases["student"]["flops"] - phases["data"]["flops"]
  assert more == loop["runs"] * loop["flops"] > 0


def test_the_old_state_s_memory_holds_the_new_one(model, phases):
  mesh = partitioning.make_mesh(2, jax.devices()[:8])
  state, shardings = training.abstract_state(
    model.student,
    optimizers.adafactor(0.1),
    partitioning.input_shapes(LENGTHS),
    mesh,
    partitioning.parameter_rules(False),
  )
  of_state = partitioning.bytes_per_device(
    partitioning.with_shardings(state, shardings)
  )
  for phase in ("data", "student"):
    assert phases[phase]["memory"]["aliased"] == of_state


def test_a_chunk_of_the_fused_loss_counts_as_often_as_there_are_chunks(phases):
  # 4 rows of 7 tokens on each device: 28, in chunks of at most 10.
  for phase, sampling in (("data", []), ("student", [LENGTHS["targets"]])):
    loops = [s for s in phases[phase]["segments"] if not s["trip_count_known"]]
    assert sorted(loop["runs"] for loop in loops) == [3, *sampling]


@pytest.mark.parametrize(
  ("fraction", "expected"),
  [
    (0.0, ["teacher", "data"]),
    (0.5, ["sampling", "teacher", "data", "student"]),
    (1.0, ["sampling", "teacher", "student"]),
  ],
)
def test_phases_are_those_that_the_run_has(fraction, expected):
  model = gkd(student_data_fraction=fraction)
  with pytest.raises(ValueError) as error:
    compile_toy(model, phases=["nothing"])
  assert f"phases of {', '.join(expected)}, got" in str(error.value)


def test_a_program_in_the_folder_is_counted_and_not_compiled(model, tmp_path):
  def compiled_again(**options):
    options = {"phases": ["teacher"], "output_path": str(tmp_path)} | options
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.glob("*.gz"))
    compile_toy(model, **options)
    after = sorted(p.stat().st_mtime_ns for p in tmp_path.glob("*.gz"))
    return before != after

  assert compiled_again()
  written = json.loads((tmp_path / "precompile.json").read_text())
  assert not compiled_again()
  assert json.loads((tmp_path / "precompile.json").read_text()) == written
  assert compiled_again(batch_size=32)
  assert compiled_again(batch_size=32, topology="another chip")


def test_roofline_by_hand():
  all_reduce = {"all-reduce": costs.Collective(1, 0, 2000)}
  segments = [
    costs.Segment("once", flops=2000, hbm_bytes=10, collectives=all_reduce),
    costs.Segment("while", runs=10, flops=100, hbm_bytes=300),
  ]
  chip = topologies.Chip("test", 1000.0, 0, 100.0, 500.0)
  # Once: 2 s of arithmetic, 0.1 of memory, 4 of links. A run of the loop: 0.1
  # and 3.
  found = program_report.roofline(segments, chip)
  assert found == program_report.Roofline(4 + 30, 2 + 1, 0.1 + 30, 4)


def test_rates_follow_from_the_roofline(phases):
  report = phases["teacher"]
  seconds = report["roofline"]["seconds"]
  assert report["tokens_per_second"] == pytest.approx(16 * 7 / seconds)
  assert report["mfu"] == pytest.approx(report["flops"] / 1e9 / seconds)
  assert report["fits"] and report["free_bytes"] == (
    2**30 - report["memory"]["peak"]
  )
  small = topologies.Chip("small", 1e9, 1000, 1e8, 1e7)
  memory = {"peak": 1001}
  options = {"loop_length": 1, "output_tokens": 1}
  text = (
    "HloModule m\n\nENTRY %main (a: f32[8]) -> f32[8] {\n"
    "  %a = f32[8] parameter(0)\n  ROOT %c = f32[8] copy(%a)\n}\n"
  )
  found = program_report.report(text, memory, small, **options)
  assert not found["fits"] and found["free_bytes"] == -1


def test_a_step_that_does_not_fit_may_fit_with_layers_computed_again(
  model, capsys
):
  chip = topologies.Chip("small", 1e9, 1000, 1e8, 1e7)
  found = compile_toy(model, chip=chip, phases=["teacher", "data"])
  said = capsys.readouterr().out
  assert said.count("DOES NOT FIT") == 2
  # The teacher, compiled first, has no backward pass.
  remedy = (
    "  it may fit with REMAT_POLICY = 'full': the backward pass then computes the"
    " student's layers again instead of keeping them (now 'none')"
  )
  assert said.split("\n")[-3] == remedy and said.count("it may fit") == 1
  of_step = found["phases"]["data"]
  assert not program_report.remedy(of_step, "full")
  assert not program_report.remedy(of_step | {"fits": True}, "none")


def test_what_the_compiler_refuses_is_reported():
  mesh = partitioning.make_mesh(2, jax.devices()[:8])
  sharding = NamedSharding(mesh, P("data", "model"))
  arguments = [
    jax.ShapeDtypeStruct((2**20, 2**10), jnp.bfloat16, sharding=sharding),
    jax.eval_shape(lambda: jax.random.key(0)),
  ]
  error = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory.\nDetails")
  report = program_report.out_of_memory_report(error, arguments)
  assert report == {
    "fits": False,
    "memory": {"arguments": 2**31 // 8},
    "compiler_says": "Ran out of memory.",
  }
  text = "\n".join(
    program_report.lines("step", report | {"compile_seconds": 1.0})
  )
  assert "0.25 GiB: DOES NOT FIT" in text and "Ran out of memory." in text


def test_outputs_for_a_reward_are_rolled_out_before_the_step():
  student, teacher = toy_models.model(8), toy_models.model(12)
  model = models.RLGKDModel(
    student, teacher, reward=lambda *_: [0.0], samples_per_prompt=2
  )
  # The last outputs of 32 rows, four features of 7, a quarter on each device;
  # the encoder's tokens come with them.
  found = compile_toy(model, phases=["sampling"])["phases"]["sampling"]
  features = 3 * 7 + 6
  assert math.isclose(
    found["memory"]["outputs"], 4 * features * 32 // 4, rel_tol=0.1
  )
  with pytest.raises(ValueError, match="phases of sampling, teacher, student"):
    compile_toy(model, phases=["data"])


@pytest.mark.parametrize(
  ("options", "sentence"),
  [
    ({"phases": ["sampling", "nothing"]}, "got nothing; set --phases"),
    ({"partitioner": {"executor": "pmap"}}, "set EXECUTOR = 'jit'"),
    (
      {"partitioner": {"num_microbatches": 3}},
      "a multiple of 12 .*set BATCH_SIZE",
    ),
  ],
)
def test_wrong_settings_are_a_sentence(model, options, sentence):
  with pytest.raises(ValueError, match=sentence):
    compile_toy(model, **options)


def test_only_what_is_asked_for_is_built():
  gin_settings.parse(["experiments/smoke.gin"], [], [])
  found = gin_settings.bindings(train.train, precompile.SETTINGS)
  assert (
    found["dataset"].batch_size == 16 and found["model"].teacher is not None
  )
  assert "teacher_checkpoint_path" not in found
  with pytest.raises(ValueError, match="none of MODEL_DIR; set MODEL_DIR"):
    gin_settings.bindings(train.train, ["model_dir"])
  gin_settings.parse(["methods/gkd.gin"], ["STUDENT_DATA_FRACTION = 0.5"], [])
  # Sizes and task may come from folders and files.
  with pytest.raises(ValueError, match=r"got none of ") as error:
    gin_settings.bindings(train.train, ["model", "dataset"])
  assert str(error.value).split("; set ")[1] == "TASK_FEATURE_LENGTHS"


def test_command_needs_neither_data_nor_checkpoints(tmp_path):
  done = command_line.gkd(
    "precompile",
    "--gin_file=experiments/smoke.gin",
    "--topology=cpu:4",
    "--phases=teacher",
    f"--output_path={tmp_path}",
    NUM_PARTITIONS=2,
  )
  assert done.returncode == 0, done.stderr
  assert "cpu:4: 4 devices as {'data': 2, 'model': 2}" in done.stdout
  assert "no roofline" in done.stdout
  written = json.loads((tmp_path / "precompile.json").read_text())
  memory = written["phases"]["teacher"]["memory"]
  assert f"peak {memory['peak'] / 2**20:.3f} MiB" in done.stdout


def test_heads_that_the_model_axis_does_not_divide_are_named(model):
  for parts, noted in ((1, False), (2, False), (4, True)):
    notes = [*precompile._remarks(model, {"data": 1, "model": parts}, None)]
    assert len(notes) == 2 * noted
    for note, name in zip(notes, ("student", "teacher"), strict=False):
      assert f"axis of 4 does not divide the {name}'s 2 heads" in note
      assert "in place of 0.5; set NUM_PARTITIONS" in note


def test_the_time_of_a_whole_step_is_a_sum_of_its_programs(model):
  of = lambda seconds: {"roofline": {"seconds": seconds}}
  phases = {"data": of(0.001), "student": of(0.003), "sampling": of(0.002)}
  # λ = 0.5 of the fixture: half of the steps are of each kind. Samples are part
  # of the program.
  assert program_report.step_lines(model, phases) == [
    "a whole step on data: at least 1.000 ms",
    "a whole step on student: at least 3.000 ms",
    "the mean step, at λ = 0.5: at least 2.000 ms",
  ]
  assert not program_report.step_lines(model, {"teacher": of(1.0)})
  assert not program_report.step_lines(model, {"data": {"roofline": None}})
  judged = models.RLGKDModel(
    model.student, model.teacher, reward=lambda *_: [0.0], samples_per_prompt=2
  )
  assert program_report.step_lines(judged, phases) == [
    "a whole step on student: at least 5.000 ms, the reward left out"
  ]


@pytest.fixture
def libtpu():
  pytest.importorskip("libtpu", reason="needs the TPU compiler, extra `tpu`")


@pytest.mark.parametrize(
  ("name", "number"),
  [
    *(("v4:2x2x1", 4), ("v4:8x8x8", 512), ("v5e:1x1", 1), ("v5e:4x4", 16)),
    *(("v5e:16x16", 256), ("v5p:4x4x4", 64), ("v5p:8x8x8", 512)),
    *(("v6e:2x2", 4), ("v6e:16x16", 256)),
  ],
)
def test_a_device_is_a_chip(libtpu, name, number):
  found, chip = topologies.devices(name)
  assert (
    len(found) == number and chip is topologies.CHIPS[name.partition(":")[0]]
  )


@pytest.mark.parametrize(
  "name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
)
def test_figures_of_each_chip_are_its_compiler_s(libtpu, model, name):
  found, chip = topologies.devices(name)
  mesh = partitioning.make_mesh(2, found)
  report = compile_toy(
    model, devices=found, chip=chip, phases=["teacher"], topology=name
  )
  memory = report["phases"]["teacher"]["memory"]
  shapes = partitioning.input_shapes(LENGTHS)
  params = partitioning.with_shardings(
    *partitioning.abstract_params(
      model.teacher, shapes, mesh, partitioning.parameter_rules(False)
    )
  )
  batch = {
    key: jax.ShapeDtypeStruct(
      value.shape, value.dtype, sharding=NamedSharding(mesh, P("data"))
    )
    for key, value in toy_models.batch(rows=16).items()
  }
  stats = (
    partitioning.jit(model.teacher.logits, mesh).lower(params, batch).compile()
  ).memory_analysis()
  assert memory["arguments"] == stats.argument_size_in_bytes > 0
  assert memory["outputs"] == stats.output_size_in_bytes > 0
  assert memory["temporaries"] == stats.temp_size_in_bytes


def test_a_shape_that_no_host_has_is_a_sentence(libtpu):
  with pytest.raises(ValueError, match="a shape that v5e comes in"):
    topologies.devices("v5e:3x5")


def test_tpu_program_has_the_arithmetic_of_the_cpu_s(libtpu, model, phases):
  found, chip = topologies.devices("v5e:2x4")
  report = compile_toy(model, devices=found, chip=chip, phases=["teacher"])
  teacher = report["phases"]["teacher"]
  assert teacher["flops"] == phases["teacher"]["flops"]
  assert teacher["fits"] and 0 < teacher["mfu"] < 1


def test_tpu_loops_that_overlap_products_and_collectives_run_to_their_end(
  libtpu,
):
  found, _ = topologies.devices("v5e:4x4")
  mesh = partitioning.make_mesh(1, found)
  x, w = (
    jax.ShapeDtypeStruct(
      shape, jnp.bfloat16, sharding=NamedSharding(mesh, P("data"))
    )
    for shape in ((32, 1024, 2048), (2048, 5120))
  )
  rows = NamedSharding(mesh, P("data"))
  program = jax.jit(jnp.matmul, out_shardings=rows).lower(x, w).compile()
  segments = costs.count(program.as_text(), loop_length=1000)
  assert len(segments) > 1  # the weights go around the ring
  flops = costs.total(segments, lambda s: s.flops)
  assert flops == 2 * (32 // 16) * 1024 * 2048 * 5120


def test_hbm_of_a_chip_is_what_its_compiler_allows(libtpu):
  for name, chip in topologies.CHIPS.items():
    found, _ = topologies.devices(
      f"{name}:2x2x1" if name in ("v4", "v5p") else f"{name}:2x2"
    )
    mesh = partitioning.make_mesh(1, found)
    huge = jax.ShapeDtypeStruct(
      (chip.hbm_bytes,), jnp.int8, sharding=partitioning.replicated(mesh)
    )
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
      jax.jit(lambda x: x + 1).lower(huge).compile()
    allowed = re.search(r"available HBM \(([\d.]+)G\)", str(error.value))
    # Versions of the compiler differ by 0.01 GiB.
    assert 0 <= float(allowed[1]) - round(chip.hbm_bytes / 2**30, 2) < 0.015
