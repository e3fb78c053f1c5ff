"""Counting of compiled programs, against figures worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gkd_jax.planning import costs, hlo

# A loop of 3 runs in one that does not say how often it runs.
PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (param_0: f32[100,16], param_1: s32[], param_2: f32[1,16]) -> f32[100,16] {
  %param_0 = f32[100,16]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %param_2 = f32[1,16]{1,0:T(1,128)S(1)} parameter(2)
  ROOT %update = f32[100,16]{1,0} dynamic-update-slice(%param_0, %param_2, %param_1, %zero)
}

%fused_read (p.0: bf16[50,16], p.1: s32[]) -> bf16[1,16] {
  %p.0 = bf16[50,16]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %none = s32[] constant(0)
  ROOT %slice = bf16[1,16]{1,0} dynamic-slice(%p.0, %p.1, %none), dynamic_slice_sizes={1,16}
}

%inner_condition (c: (f32[16,16])) -> pred[] {
  %c = (f32[16,16]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%inner_body (b: (f32[16,16])) -> (f32[16,16]) {
  %b = (f32[16,16]{1,0}) parameter(0)
  %h = f32[16,16]{1,0:T(8,128)S(1)} get-tuple-element(%b), index=0
  %shard = f32[2,16]{1,0:T(8,128)S(1)} slice(%h), slice={[0:2], [0:16]}
  %whole = f32[16,16]{1,0:T(8,128)S(1)} all-gather(%shard), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}, use_global_device_ids=true
  ROOT %out = (f32[16,16]{1,0}) tuple(%whole)
}

%outer_condition (oc: (f32[16,16])) -> pred[] {
  %oc = (f32[16,16]{1,0}) parameter(0)
  ROOT %maybe = pred[] constant(true)
}

%outer_body (ob: (f32[16,16])) -> (f32[16,16]) {
  %ob = (f32[16,16]{1,0}) parameter(0)
  %g = f32[16,16]{1,0:T(8,128)S(1)} get-tuple-element(%ob), index=0
  %product = f32[16,16]{1,0:T(8,128)S(1)} dot(%g, %g), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %in = (f32[16,16]{1,0}) tuple(%product)
  ROOT %while.1 = (f32[16,16]{1,0}) while(%in), condition=%inner_condition, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (a: f32[16,16], cache: f32[100,16], i: s32[], new: f32[1,16], t: bf16[50,16]) -> (f32[16,16]) {
  %a = f32[16,16]{1,0:T(8,128)} parameter(0)
  %cache = f32[100,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %new = f32[1,16]{1,0:T(1,128)S(1)} parameter(3)
  %t = bf16[50,16]{1,0} parameter(4)
  %reduced = f32[16,16]{1,0:T(8,128)} all-reduce(%a), channel_id=1, replica_groups=mesh['data'=2,'model'=4], device_ids=([8]) {'model'}, use_global_device_ids=true, to_apply=%add
  %cached = f32[100,16]{1,0} fusion(%cache, %i, %new), kind=kLoop, calls=%fused
  %row = bf16[1,16]{1,0} fusion(%t, %i), kind=kLoop, calls=%fused_read
  %first = (f32[16,16]{1,0}) tuple(%reduced)
  ROOT %while.2 = (f32[16,16]{1,0}) while(%first), condition=%outer_condition, body=%outer_body
}
"""


def test_loops_collectives_and_memory_of_a_written_program():
  once, outer, inner = costs.count(PROGRAM, loop_length=10)
  assert (once.runs, outer.runs, inner.runs) == (1, 10, 30)
  assert once.trip_count_known and inner.trip_count_known
  assert not outer.trip_count_known
  # 16 x 16 floats are 1024 bytes, read and written by the all-reduce. In the
  # cache 64 bytes are written, the new row is on the chip; of the table a row of
  # 32 bytes is read and written; the index is 4 bytes, twice.
  assert once.hbm_bytes == 2 * 1024 + 64 + 2 * 32 + 2 * 4
  assert outer.hbm_bytes == inner.hbm_bytes == 0  # all on the chip
  assert costs.total([once, outer, inner], lambda s: s.flops) == (
    10 * 2 * 16 * 16 * 16
  )
  found = costs.collectives([once, outer, inner])
  # Groups of 4: 3/4 of the bytes, twice. Groups of 8: 7 parts of 128 bytes.
  assert found == {
    "all-reduce": costs.Collective(1, 1024, 2 * 768),
    "all-gather": costs.Collective(30, 30 * 128, 30 * 7 * 128),
  }


@pytest.mark.parametrize(
  ("kind", "groups", "sent"),
  [
    ("reduce-scatter", "{{0,1,2,3},{4,5,6,7}}", 3 * 256),
    ("all-to-all", "{}", 7 * 128),
    ("all-reduce", "mesh['a'=2,'b'=4] {'a','b':(1)2}", 2 * 3 * 256),
    ("collective-permute", "{}", 1024),
  ],
)
def test_bytes_sent_by_each_kind(kind, groups, sent):
  text = (
    "HloModule m, num_partitions=8\n\nENTRY %main (a: f32[256]) -> f32[256] {\n"
    "  %a = f32[256]{0} parameter(0)\n"
    f"  ROOT %r = f32[256]{{0}} {kind}(%a), replica_groups={groups}\n}}\n"
  )
  (once,) = costs.count(text, loop_length=1)
  assert once.collectives == {kind: costs.Collective(1, 1024, sent)}


@pytest.mark.parametrize(
  ("lhs", "rhs", "output", "attributes", "products"),
  [
    # [3, 7] x [7, 5], as a convolution without a window.
    ("3,7", "7,5", "3,5", "dim_labels=bf_io->bf", 3 * 7 * 5),
    # The same four times, a batch: what is dilated meets itself alone.
    (
      *("4,3,7", "4,7,5", "4,3,5"),
      "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
      4 * 3 * 7 * 5,
    ),
    # A window of 3 over 5 places, padded: at both ends it meets 2.
    (
      *("2,5,1", "3,1,6", "2,5,6"),
      "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
      2 * 6 * (3 * 5 - 2),
    ),
  ],
)
def test_products_of_convolutions(lhs, rhs, output, attributes, products):
  text = (
    f"HloModule m\n\nENTRY %main (a: f32[{lhs}], b: f32[{rhs}]) -> f32[1] {{\n"
    f"  %a = f32[{lhs}] parameter(0)\n  %b = f32[{rhs}] parameter(1)\n"
    f"  ROOT %c = f32[{output}] convolution(%a, %b), {attributes}\n}}\n"
  )
  (once,) = costs.count(text, loop_length=1)
  assert once.flops == 2 * products


COUNTED = """HloModule m

%condition (c: (u32[], u32[], f32[])) -> pred[] {
  %c = (u32[], u32[], f32[]) parameter(0)
  %i = u32[] get-tuple-element(%c), index=0
  %most = BOUND
  ROOT %go = pred[] compare(%i, %most), direction=LT
}

%body (b: (u32[], u32[], f32[])) -> (u32[], u32[], f32[]) {
  %b = (u32[], u32[], f32[]) parameter(0)
  %j = u32[] get-tuple-element(%b), index=0
  %by = u32[] constant(2)
  %next = u32[] add(%j, %by)
  %same = u32[] get-tuple-element(%b), index=1
  %x = f32[] get-tuple-element(%b), index=2
  ROOT %out = (u32[], u32[], f32[]) tuple(%next, %same, %x)
}

ENTRY %main (a: f32[], n: u32[]) -> (u32[], u32[], f32[]) {
  %a = f32[] parameter(0)
  %n = u32[] parameter(1)
  %one = u32[] constant(1)
  %first = u32[] copy(%one)
  %eight = u32[] constant(8)
  %in = (u32[], u32[], f32[]) tuple(%first, SECOND, %a)
  ROOT %while.1 = (u32[], u32[], f32[]) while(%in), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
  ("bound", "second", "runs"),
  [
    ("u32[] constant(8)", "%n", 4),  # 1, 3, 5, 7
    ("u32[] constant(9)", "%n", 4),  # and not 9
    ("u32[] get-tuple-element(%c), index=1", "%eight", 4),
    ("u32[] get-tuple-element(%c), index=1", "%n", None),  # known in the run
  ],
)
def test_runs_of_a_loop_that_counts_to_a_constant(bound, second, runs):
  text = COUNTED.replace("BOUND", bound).replace("SECOND", second)
  _, loop = costs.count(text, loop_length=100)
  assert loop.runs == (100 if runs is None else runs)
  assert loop.trip_count_known == (runs is not None)


def test_an_asynchronous_slice_reads_what_it_keeps():
  text = (
    "HloModule m\n\nENTRY %main (a: f32[8,100]) -> f32[1,100] {\n"
    "  %a = f32[8,100] parameter(0)\n"
    "  %s = ((f32[8,100]), f32[1,100]{1,0:S(1)}, s32[]) slice-start(%a),"
    " slice={[0:1], [0:100]}\n"
    "  ROOT %d = f32[1,100]{1,0:S(1)} slice-done(%s)\n}\n"
  )
  (once,) = costs.count(text, loop_length=1)
  assert once.hbm_bytes == 400


def test_a_slice_within_a_product_s_fusion_is_read_alone():
  text = """HloModule m

%layer (stack: f32[24,8,4], turn: s32[]) -> f32[8,4] {
  %stack = f32[24,8,4] parameter(0)
  %turn = s32[] parameter(1)
  %none = s32[] constant(0)
  %one = f32[1,8,4] dynamic-slice(%stack, %turn, %none, %none), dynamic_slice_sizes={1,8,4}
  ROOT %matrix = f32[8,4] bitcast(%one)
}

%product (x: f32[2,8], weights: f32[24,8,4], i: s32[]) -> f32[2,4] {
  %x = f32[2,8] parameter(0)
  %weights = f32[24,8,4] parameter(1)
  %i = s32[] parameter(2)
  %w = f32[8,4] fusion(%weights, %i), kind=kLoop, calls=%layer
  ROOT %y = f32[2,4] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[2,8], weights: f32[24,8,4], i: s32[]) -> f32[2,4] {
  %x = f32[2,8] parameter(0)
  %weights = f32[24,8,4] parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = f32[2,4] fusion(%x, %weights, %i), kind=kOutput, calls=%product
}
"""
  (once,) = costs.count(text, loop_length=1)
  # Of 24 layers one, 8 x 4; x, the index and the result.
  assert once.hbm_bytes == 4 * (8 * 4 + 2 * 8 + 1 + 2 * 4)
  assert once.flops == 2 * 2 * 8 * 4


# What a TPU program makes of an all-gather that a product overlaps with.
PIECES = """HloModule m, num_partitions=4

%begin (p.0: bf16[8,16]) -> (bf16[8,16], bf16[32,16], u32[]) {
  %p.0 = bf16[8,16]{1,0} parameter(0)
  %g.0 = bf16[32,16]{1,0} all-gather(%p.0), channel_id=5, replica_groups={}, dimensions={0}
  ROOT %c.0 = (bf16[8,16]{1,0}, bf16[32,16]{1,0}, u32[]{:S(2)}) custom-call(%g.0), custom_call_target="AsyncCollectiveStart"
}

%go (p.1: bf16[8,16], q.1: bf16[32,16], a.1: bf16[16,64]) -> (bf16[16,16], bf16[8,16], bf16[32,16], bf16[32,16]) {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  %q.1 = bf16[32,16]{1,0} parameter(1)
  %a.1 = bf16[16,64]{1,0} parameter(2)
  %d.1 = bf16[16,16]{1,0} dot(%a.1, %a.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %g.1 = bf16[32,16]{1,0} all-gather(%p.1), channel_id=5, replica_groups={}, dimensions={0}
  ROOT %t.1 = (bf16[16,16]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}, bf16[32,16]{1,0}) tuple(%d.1, %p.1, %q.1, %g.1)
}

%end (p.2: bf16[8,16], q.2: bf16[32,16]) -> bf16[32,16] {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  %q.2 = bf16[32,16]{1,0} parameter(1)
  %g.2 = bf16[32,16]{1,0} all-gather(%p.2), channel_id=5, replica_groups={}, dimensions={0}
  ROOT %c.2 = bf16[32,16]{1,0} custom-call(%p.2, %q.2, %g.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[8,16], a: bf16[16,64]) -> bf16[32,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %a = bf16[16,64]{1,0} parameter(1)
  %s = (bf16[8,16]{1,0}, bf16[32,16]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %s0 = bf16[8,16]{1,0} get-tuple-element(%s), index=0
  %s1 = bf16[32,16]{1,0} get-tuple-element(%s), index=1
  %m = (bf16[16,16]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}, bf16[32,16]{1,0}) fusion(%s0, %s1, %a), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {})}, calls=%go
  %m1 = bf16[8,16]{1,0} get-tuple-element(%m), index=1
  %m2 = bf16[32,16]{1,0} get-tuple-element(%m), index=2
  ROOT %e = bf16[32,16]{1,0} fusion(%m1, %m2), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
}
"""


def test_a_collective_in_pieces_counts_once():
  (once,) = costs.count(PIECES, loop_length=1)
  # Four shards of 8 x 16 numbers of 2 bytes.
  assert once.collectives == {"all-gather": costs.Collective(1, 256, 768)}
  # 256 bytes are read and 1024 written by it; by the product 2048 and 512.
  assert once.hbm_bytes == 256 + 1024 + 2048 + 512
  assert once.flops == 2 * 16 * 64 * 16


def test_a_loop_that_may_end_early_runs_as_often_as_its_scope_allows():
  def halved(x):
    def body(y):
      return jax.lax.while_loop(lambda z: z[1, 1] > 1, lambda z: z / 3, y / 2)

    with jax.named_scope("loss"):
      return jax.lax.while_loop(lambda y: y[0, 0] > 1, body, x)

  program = compiled(halved, ((8, 8), P()))
  _, outer, inner = costs.count(
    program.as_text(), loop_length=7, max_trips={"loss": 5}
  )
  # The inner loop is not in the scope itself, wherever the outer one is.
  assert (outer.runs, inner.runs) == (5, 5 * 7)
  assert not outer.trip_count_known and not inner.trip_count_known


def test_an_unknown_form_of_groups_is_an_error():
  text = PROGRAM.replace("[1,8]<=[8]", "something_new")
  with pytest.raises(ValueError, match=r"replica_groups of 'whole'"):
    costs.count(text, loop_length=1)
  with pytest.raises(ValueError, match="without an entry"):
    hlo.parse("HloModule m\n")


def compiled(function, *arrays):
  mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
  shapes = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    for shape, spec in arrays
  ]
  whole = NamedSharding(mesh, P())
  return jax.jit(function, out_shardings=whole).lower(*shapes).compile()


def test_a_matrix_product_that_is_summed_over_devices():
  program = compiled(
    jnp.matmul, ((64, 32), P(None, "data")), ((32, 16), P("data"))
  )
  (once, *loops) = costs.count(program.as_text(), loop_length=1)
  assert not loops
  assert once.flops == 2 * 64 * 4 * 16
  # 64 x 16 floats, added over 8 devices.
  assert once.collectives == {
    "all-reduce": costs.Collective(1, 4096, 2 * 7 * 4096 // 8)
  }


def test_a_loop_counts_as_often_as_it_runs():
  def repeated(x, w):
    return jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, length=5)[0]

  program = compiled(repeated, ((8, 32), P("data")), ((32, 32), P()))
  segments = costs.count(program.as_text(), loop_length=1000)
  of_once = 2 * 1 * 32 * 32
  assert costs.total(segments, lambda s: s.flops) == 5 * of_once
  # XLA takes the body once, and adds a handful of elementwise operations.
  assert of_once <= program.cost_analysis()["flops"] < 2 * of_once
