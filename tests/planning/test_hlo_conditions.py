"""Counting of conditions: the branch with the most work, and no other."""

import pytest

from gkd_jax.planning import costs

# A row in one branch; in the other four, each turn of a loop of five, gathered.
PROGRAM = """HloModule m, num_partitions=4

%short (s: (f32[4,8], f32[8,8])) -> f32[4,8] {
  %s = (f32[4,8], f32[8,8]) parameter(0)
  %x.0 = f32[4,8] get-tuple-element(%s), index=0
  %w.0 = f32[8,8] get-tuple-element(%s), index=1
  %part = f32[1,8] slice(%x.0), slice={[0:1], [0:8]}
  %y.0 = f32[1,8] dot(%part, %w.0), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %back = f32[4,8] all-gather(%y.0), channel_id=1, replica_groups={}, dimensions={0}
}

%go (c: (f32[4,8], f32[8,8])) -> pred[] {
  %c = (f32[4,8], f32[8,8]) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%turn (b: (f32[4,8], f32[8,8])) -> (f32[4,8], f32[8,8]) {
  %b = (f32[4,8], f32[8,8]) parameter(0)
  %x.1 = f32[4,8] get-tuple-element(%b), index=0
  %w.1 = f32[8,8] get-tuple-element(%b), index=1
  %y.1 = f32[4,8] dot(%x.1, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (f32[4,8], f32[8,8]) tuple(%y.1, %w.1)
}

%long (l: (f32[4,8], f32[8,8])) -> f32[4,8] {
  %l = (f32[4,8], f32[8,8]) parameter(0)
  %loop = (f32[4,8], f32[8,8]) while(%l), condition=%go, body=%turn, backend_config={"known_trip_count":{"n":"5"}}
  %last = f32[4,8] get-tuple-element(%loop), index=0
  ROOT %sum = f32[4,8] all-reduce(%last), channel_id=2, replica_groups={}, to_apply=%go
}

ENTRY %main (i: s32[], x: f32[4,8], w: f32[8,8]) -> f32[4,8] {
  %i = s32[] parameter(0)
  %x = f32[4,8] parameter(1)
  %w = f32[8,8] parameter(2)
  %in = (f32[4,8], f32[8,8]) tuple(%x, %w)
  ROOT %y = f32[4,8] CONDITION
}
"""


@pytest.mark.parametrize(
  "condition",
  [
    "conditional(%i, %in, %in), branch_computations={%short, %long}",
    "conditional(%i, %in, %in), true_computation=%long, false_computation=%short",
  ],
)
def test_the_branch_with_the_most_work_counts_alone(condition):
  text = PROGRAM.replace("CONDITION", condition)
  once, branch, loop = costs.count(text, loop_length=100)
  assert (branch.name, branch.runs) == ("long", 1)
  assert (loop.name, loop.runs) == ("loop", 5)
  assert (once.flops, branch.flops, loop.flops) == (0, 0, 2 * 4 * 8 * 8)
  # 4 x 8 floats: read, multiplied with 8 x 8 and written, each turn.
  assert loop.hbm_bytes == 4 * (32 + 64 + 32)
  assert (once.hbm_bytes, branch.hbm_bytes) == (0, 4 * (32 + 32))
  # Of 128 bytes 3/4 are sent, twice; nothing is gathered.
  summed = costs.Collective(1, 128, 192)
  found = costs.collectives([once, branch, loop])
  assert found == {"all-reduce": summed}
