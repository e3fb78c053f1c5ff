"""Several slices: the numbers of one, and what crosses from one to another."""

import functools
import re

import jax
import numpy as np
import optax
import pytest
import toy_models
import toy_steps
from jax.sharding import Mesh

from gkd_jax import optimizers, partitioning, schedules, training
from gkd_jax.data import shards
from gkd_jax.planning import costs, hlo, precompile, topologies

SGD = optimizers.Optimizer(schedules.constant(1.0), optax.sgd(1.0))
OPTIONS = {"divergence": "jsd", "beta": 0.5, "student_data_fraction": 0.5}


@functools.cache
def build(mesh, over_data=False, microbatches=1, **options):
  """An executor of the step, a state, and the teacher's parameters."""
  model, student, teacher = toy_models.gkd(**OPTIONS, **options)
  rules = partitioning.parameter_rules(over_data)
  state = toy_models.state(student, SGD)
  shardings = training.abstract_state(
    model.student, SGD, toy_models.SHAPES, mesh, rules
  )[1]
  of_teacher = partitioning.abstract_params(
    model.teacher, toy_models.SHAPES, mesh, rules
  )
  step = functools.partial(
    training.train_step,
    model=model,
    optimizer=SGD,
    seed=0,
    num_microbatches=microbatches,
  )
  run = training.jit_step(step, mesh, shardings)
  return (
    run,
    jax.device_put(state, shardings),
    jax.device_put(teacher, of_teacher[1]),
  )


def gradient(mesh, source, **options):
  """The parameters' change under SGD, and metrics."""
  run, state, teacher = build(mesh, **options)
  before = jax.tree.map(np.array, state.params)
  # The step takes its state's memory, which `build` returns again.
  state = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), state)
  new, metrics = run(
    state,
    teacher,
    partitioning.put_batch(toy_models.batch(), mesh),
    source=source,
  )
  return jax.tree.map(
    lambda a, b: a - np.asarray(b), before, new.params
  ), metrics


def slices(number=2, partitions=2):
  return partitioning.make_mesh(partitions, num_slices=number)


MANY = {"over_data": True, "microbatches": 2, "decode_slots": 1} | {
  "loss_chunk_size": 5
}


@pytest.mark.parametrize(
  "options", [MANY, pytest.param({}, marks=pytest.mark.nightly)]
)
def test_a_step_of_slices_is_the_step(options):
  expected, of_one = toy_steps.reference("student", "sequence")
  got, metrics = gradient(slices(), "student", **options)
  difference = optax.tree.norm(jax.tree.map(np.subtract, got, expected))
  assert difference <= 1e-5 * optax.tree.norm(expected)
  for name, pair in of_one.items():
    np.testing.assert_allclose(
      metrics[name], pair, rtol=1e-4, atol=1e-6, err_msg=name
    )


def iota(dims, order, shape):
  """Device numbers as HLO writes them: [2,4]T(1,0), in some shape."""
  dims = [int(n) for n in dims.split(",")]
  order = [int(n) for n in order.split(",")] if order else range(len(dims))
  return np.arange(np.prod(dims)).reshape(dims).transpose(order).reshape(shape)


def groups(attributes):
  """Devices of each group of a collective, `[groups, devices]`."""
  listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
  if listed:
    found = re.findall(r"\{([\d,]+)\}", listed[1])
    return np.array([[int(n) for n in group.split(",")] for group in found])
  tile = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
  counted = re.search(rf"replica_groups=\[([\d,]+)\]<={tile}", attributes)
  if counted:
    shape, *of = counted.groups()
    return iota(*of, [int(n) for n in shape.split(",")])
  mesh = re.search(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({tile}\))?"
    r" \{([^}:]*)\}",
    attributes,
  )
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
  shape = [int(n) for n in sizes.values()]
  ids = iota(mesh[2] or ",".join(sizes.values()), mesh[3], shape)
  used = re.findall(r"'(\w+)'", mesh[4])
  places = [list(sizes).index(name) for name in used]
  ids = np.moveaxis(ids, places, range(-len(places), 0))
  return ids.reshape(-1, np.prod([shape[i] for i in places]))


def test_only_sums_leave_a_slice():
  run, state, teacher = build(slices(), **MANY)
  batch = partitioning.put_batch(toy_models.batch(), slices())
  text = run.lower(state, teacher, batch, source="student").compile().as_text()
  kinds = {"all-gather": set(), "all-reduce": set()}
  for computation in hlo.parse(text).computations.values():
    for i in computation.values():
      if i.opcode in hlo.COLLECTIVE_KINDS:
        assert i.opcode != "collective-permute"
        crosses = len(set(groups(i.attributes)[0] // 4)) > 1
        kinds.setdefault(i.opcode, set()).add(crosses)
  # Devices 0 to 3 are the first slice. Weights are gathered within one.
  assert kinds.pop("all-reduce") == {True, False}
  assert all(crosses == {False} for crosses in kinds.values()), kinds


def test_collectives_between_slices_are_counted_apart():
  send = """HloModule step, num_partitions=4

ENTRY %main () -> f32[] {
  %x = f32[256,8]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (f32[256,8]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %y = f32[256,8]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}
}
"""
  (once,) = costs.count(send, loop_length=1)
  size = 256 * 8 * 4
  assert once.dcn_bytes == 2 * 2 * size // 3  # of three slices, twice around
  assert once.sent_bytes == size  # of two chips
  assert once.collectives["dcn all-reduce"].operand_bytes == size


def test_rows_are_split_over_slices_first():
  mesh = slices()
  assert dict(mesh.shape) == {"slice": 2, "data": 2, "model": 2}
  assert partitioning.row_shards(mesh) == 4
  ids = [device.id for device in mesh.devices.flat]
  assert ids == [device.id for device in jax.devices()]
  # As the data would be read by a process for each slice, and by one for each
  # pair of devices in another order.
  for of_device, rows in (
    ([0, 0, 0, 0, 1, 1, 1, 1], {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
    ([0, 0, 1, 1, 1, 1, 0, 0], {0: [0, 1, 6, 7], 1: [2, 3, 4, 5]}),
  ):
    grid = np.array(of_device).reshape(4, 2)
    found = shards.rows_of_processes(grid, 8)
    assert {p: r.tolist() for p, r in found.items()} == rows
  assert partitioning.process_grid(mesh).shape == (4, 2)
  one = partitioning.make_mesh(2, num_slices=1)
  assert one == partitioning.make_mesh(2) and one.axis_names == (
    "data",
    "model",
  )


@pytest.mark.parametrize("order", [range(8), [3, 1, 0, 2, 7, 6, 4, 5]])
def test_a_process_finds_its_rows_again(order):
  devices = np.array(jax.devices())[list(order)].reshape(2, 2, 2)
  mesh = Mesh(devices, ("slice", "data", "model"))
  rows = np.arange(24).reshape(8, 3)
  placed = partitioning.put_batch({"x": rows}, mesh)["x"]
  assert placed.addressable_shards[0].data.shape == (2, 3)
  np.testing.assert_array_equal(partitioning.local_rows(placed), rows)


class Chip:
  """What `make_mesh` asks of a TPU."""

  platform, device_kind = "tpu", "TPU v4"

  def __init__(self, of_slice):
    self.slice_index = of_slice


@pytest.mark.parametrize(
  ("partitions", "number", "devices", "sentence"),
  [
    (1, 3, None, "NUM_SLICES to divide the 8 devices, got 3; set NUM_SLICES"),
    (1, 0, None, "NUM_SLICES to divide the 8 devices, got 0"),
    (3, 2, None, "divide the 4 devices of a slice, got 3; set NUM_PARTITIONS"),
    (8, 2, None, "divide the 4 devices of a slice, got 8; set NUM_PARTITIONS"),
    (3, None, None, "NUM_PARTITIONS to divide the 8 devices, got 3"),
    (1, None, [0, 0, 1], r"slices of one size, got sizes \[1, 2\]"),
    (1, 4, [0, 0, 1, 1], "NUM_SLICES of 2, which .* or 1, got 4; set NUM_SLI"),
  ],
)
def test_wrong_slices_are_a_sentence(partitions, number, devices, sentence):
  if devices:
    devices = [Chip(index) for index in devices]
  with pytest.raises(ValueError, match=sentence):
    partitioning.make_mesh(partitions, devices, number)


@pytest.fixture
def libtpu():
  pytest.importorskip("libtpu", reason="needs the TPU compiler, extra `tpu`")


def distances(devices):
  """Links between each device and the next."""
  coords = np.array([device.coords for device in devices])
  return np.abs(np.diff(coords, axis=0)).sum(axis=1)


def test_tpus_are_in_the_order_of_their_links(libtpu):
  found, _ = topologies.devices("v5e:4x4")
  ring = partitioning.make_mesh(1, found).devices.ravel()
  assert set(distances(ring)) == {1} and sorted(d.id for d in ring) == sorted(
    d.id for d in found
  )
  pairs = partitioning.make_mesh(2, found)
  assert dict(pairs.shape) == {"data": 8, "model": 2}
  assert all(distances(pair) == 1 for pair in pairs.devices)


def test_slices_of_tpus_exchange_sums_alone(libtpu):
  found, chip = topologies.devices("2xv5e:2x2")
  mesh = partitioning.make_mesh(2, found)
  assert dict(mesh.shape) == {"slice": 2, "data": 2, "model": 2}
  for index, part in enumerate(mesh.devices):
    assert {device.slice_index for device in part.flat} == {index}
  one = partitioning.make_mesh(2, found, 1)
  assert one.devices.ravel().tolist() == mesh.devices.ravel().tolist()
  assert dict(one.shape) == {"data": 4, "model": 2}
  programs = precompile.Programs(
    toy_models.gkd(student_data_fraction=0.0)[0],
    SGD,
    mesh,
    {"inputs": 6, "targets": 7},
    16,
    shard_params_over_data=True,
  )
  kinds = {
    phase: programs.report(phase, chip, "2xv5e:2x2")["collectives"]
    for phase in ("teacher", "data")
  }
  of_slices = {
    phase: {kind for kind in found if kind.startswith("dcn")}
    for phase, found in kinds.items()
  }
  assert of_slices == {"teacher": set(), "data": {"dcn all-reduce"}}
  assert kinds["teacher"]["all-gather"]["count"] > 0
