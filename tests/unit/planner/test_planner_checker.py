"""The checker refuses every kind of violation, and counts slots by itself."""

from dataclasses import replace

import pytest

from central.planner.checker import check
from central.planner.generator import SHAPES, generate
from central.planner.model.objective import parse_objective
from central.planner.model.plan import Move, Place
from central.planner.model.problem import Limits

FR = parse_objective("fr")


def at(pm, *nodes):
    return Place(pm, tuple(nodes))


@pytest.fixture
def two(build):
    # pm0 has 12 + 20 free, pm1 has 4 free: moving vm0 (4 cores) makes 16 + 20 and 0.
    return build([[16, 20], [8, 4]], [(0, {0: 4}), (1, {0: 4}), (1, {1: 4})])


def test_worth_is_recomputed(two):
    report = check(two, [Move(0, at(0, 0), at(1, 0))], FR, Limits(1))
    assert report.violation is None
    assert [worth.slots for worth in report.worths] == [1, 2]
    assert report.worths[0].fragment_rate == pytest.approx((12 + 4 + 4) / 36)
    assert report.worths[1].fragment_rate == pytest.approx((0 + 4 + 0) / 36)


@pytest.mark.parametrize(
    ("move", "limits", "words"),
    [
        (Move(0, at(0, 0), at(1, 1)), Limits(9), "has 0 cores"),
        (Move(0, at(0, 1), at(1, 0)), Limits(9), "not where the move takes it from"),
        (Move(0, at(0, 0), at(0, 0)), Limits(9), "to where it is"),
        (Move(0, at(0, 0), at(1, 5)), Limits(9), "no NUMA node 5"),
        (Move(0, at(0, 0), at(1, 0, 1)), Limits(9), "takes 1 different NUMA nodes"),
        (Move(0, at(0, 0), at(1, 0)), Limits(0), "MNL"),
        (Move(0, at(0, 0), at(1, 0)), Limits(9, fixed=frozenset({0})), "cool-down"),
        (Move(0, at(0, 0), at(1, 0)), Limits(9, max_bytes=2**20), "bytes of memory"),
        (Move(0, at(0, 0), at(1, 0)), Limits(9, per_pm=0), "touch PM"),
    ],
)
def test_violations_are_named(two, move, limits, words):
    violation = check(two, [move], FR, limits).violation
    assert violation is not None
    assert violation.startswith("move 0: ")
    assert words in violation


def test_immovable_and_down(two):
    still = replace(two, vms=(replace(two.vms[0], movable=False), *two.vms[1:]))
    assert "does not allow migration" in check(still, [Move(0, at(0, 0), at(1, 0))], FR, Limits(1)).violation
    down = replace(two, pms=(two.pms[0], replace(two.pms[1], status="OUTAGE")))
    assert "OUTAGE, not ACTIVE" in check(down, [Move(0, at(0, 0), at(1, 0))], FR, Limits(1)).violation


def test_tenant_cap(two):
    owned = replace(two, vms=tuple(replace(vm, tenant="a") for vm in two.vms))
    moves = [Move(0, at(0, 0), at(1, 0)), Move(2, at(1, 1), at(0, 1), 1)]
    assert check(owned, moves, FR, Limits(9, per_tenant=2)).violation is None
    assert "moves of tenant a" in check(owned, moves, FR, Limits(9, per_tenant=1)).violation


def test_anti_affinity_at_every_step(build):
    mapping = build([[8], [8], [8]], [(0, {0: 4}), (1, {0: 4})], [[0, 1]])
    together = [Move(0, at(0, 0), at(1, 0))]
    assert "anti-affinity set 0" in check(mapping, together, FR, Limits(9)).violation
    after_leaving = [Move(1, at(1, 0), at(2, 0), 0), Move(0, at(0, 0), at(1, 0), 1)]
    assert check(mapping, after_leaving, FR, Limits(9)).violation is None
    at_once = [replace(move, batch=0) for move in after_leaving]
    assert "together for a while" in check(mapping, at_once, FR, Limits(9)).violation


def test_rack_anti_affinity(build):
    mapping = build([[8], [8], [8]], [(0, {0: 4}), (1, {0: 4})], [[0, 1]], "rack", ["a", "b", "b"])
    assert "share a rack" in check(mapping, [Move(0, at(0, 0), at(2, 0))], FR, Limits(9)).violation
    assert check(mapping, [Move(1, at(1, 0), at(2, 0))], FR, Limits(9)).violation is None


def test_batch_needs_room_before_anything_left(build):
    mapping = build([[8], [8]], [(0, {0: 8}), (1, {0: 4})])
    # Nothing fits on pm0 until vm0 has left, which it never can here; 4 cores to the free half do.
    moves = [Move(1, at(1, 0), at(0, 0))]
    assert "has 0 cores" in check(mapping, moves, FR, Limits(9)).violation
    roomy = build([[16], [8]], [(0, {0: 4}), (0, {0: 8}), (1, {0: 8})])
    out_then_in = [Move(2, at(1, 0), at(0, 0))]
    assert check(roomy, out_then_in, FR, Limits(9)).violation is not None


def test_multi_node_slots_by_hand(build):
    mapping = build([[64, 32], [32, 16]], [])
    report = check(mapping, [], parse_objective("mixed"), Limits(0))
    assert [term.slots for term in report.worths[0].terms] == [4 + 2 + 2 + 1, 1]


def test_slots_on_some_nodes_of_many(build):
    # Three nodes that hold 2, 1 and 1 halves: two requests over two nodes each.
    mapping = build([[32, 16, 16]], [])
    report = check(mapping, [], parse_objective("32c/2numa"), Limits(0))
    assert report.worths[0].slots == 2


def test_generated_mapping_is_worth_what_numpy_says():
    mapping = generate(SHAPES["small"], 3)
    free = {(i, n.number): n.cores for i, pm in enumerate(mapping.pms) for n in pm.nodes}
    for vm in mapping.vms:
        for share in vm.shares:
            free[vm.pm, share.node] -= share.cores
    worth = check(mapping, [], FR, Limits(0)).worths[0]
    assert worth.slots == sum(cores // 16 for cores in free.values())
    assert worth.fragment_rate == pytest.approx(sum(c % 16 for c in free.values()) / sum(free.values()))
