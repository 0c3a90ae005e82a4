"""Every solver: no violation, never worse than the start. The exact ones: the true optimum, the two models agreeing."""

from dataclasses import replace
from itertools import product

import pytest

from central.planner import checker
from central.planner.generator import SHAPES, Shape, generate
from central.planner.model.cluster import Cluster
from central.planner.model.objective import parse_objective, parse_request
from central.planner.model.plan import Move, Place
from central.planner.model.problem import Deadline, Limits, Problem
from central.planner.model.state import State, Valuation
from central.planner.planning import make_plan, plan_by
from central.planner.replan import replan
from central.planner.solvers.batches import moves_of
from central.planner.solvers.columns import Master
from central.planner.solvers.cycles import least_extra, orderable
from central.planner.solvers.greedy import Walk
from central.planner.solvers.grouped import Grouped, flow_between
from central.planner.solvers.patterns import Pricer, applies
from central.planner.solvers.registry import SOLVERS
from central.planner.solvers.room import make_room
from fabricpilot.errors import FabricpilotError, UsageError


@pytest.fixture(scope="module")
def small():
    kind = replace(
        SHAPES["small"], pms=20, vms=150, affinity_sets=15, immovable_share=0.1, outage_pms=2, pms_per_rack=5
    )
    return generate(kind, 1)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("objective", ["fr", "mixed", "multi", "fr-goal:0.3"])
def test_plans_are_legal_and_no_worse(small, pose, ticking, name, objective):
    plan = make_plan(pose(small, 12, objective), name, 0.5, seed=3, clock=ticking)
    assert plan.final.fragment_rate <= plan.initial.fragment_rate + 1e-12
    assert len(plan.moves) <= 12
    if plan.bound is not None:
        assert plan.bound <= plan.final.fragment_rate + 1e-9


@pytest.mark.parametrize("name", SOLVERS)
def test_limits_hold(small, pose, ticking, name):
    # The checker inside make_plan refuses any plan that breaks one of these.
    limits = {"max_bytes": 200 * 2**30, "per_pm": 2, "per_tenant": 2, "fixed": frozenset(range(0, 150, 3))}
    plan = make_plan(pose(small, 20, "fr", **limits), name, 0.5, clock=ticking)
    assert plan.final.slots >= plan.initial.slots


@pytest.mark.parametrize("name", ["greedy", "swap", "packing", "exact", "auto"])
def test_same_seed_same_plan(small, pose, name):
    one, two = (make_plan(pose(small, 8), name, 60.0, seed=5) for _ in range(2))
    assert one.moves == two.moves


@pytest.mark.parametrize(
    ("shape", "objective"), list(product(["tiny", "small"], ["fr", "mixed", "multi", "16c*0.3+32c/2numa*0.7"]))
)
def test_both_exact_models_agree(shape, objective):
    mapping = generate(SHAPES[shape], 6)
    cluster = Cluster(mapping)
    valuation = Valuation.of(parse_objective(objective), cluster)
    state, limits = State(cluster), Limits(6)
    assert applies(cluster, valuation)
    by_pm = Master(Pricer(state, valuation, limits)).solve(Deadline(20.0))
    whole = Grouped(state, valuation, limits).solve(20.0)
    assert whole.proven
    assert by_pm.value <= whole.bound + 1e-3
    assert by_pm.bound >= whole.value - 1e-3
    if shape == "small":  # rounding the master loses little once there are many more PMs than groups
        assert whole.value - by_pm.value <= max(1.0, 0.02 * whole.value)


def test_memory_is_respected_by_the_decomposition():
    mapping = generate(Shape(pms=30, vms=150, used_share=0.62, mem_gb_per_core=(2, 8)), 2)
    cluster = Cluster(mapping)
    valuation = Valuation.of(parse_objective("fr"), cluster)
    state, limits = State(cluster), Limits(10)
    by_pm = Master(Pricer(state, valuation, limits)).solve(Deadline(20.0))
    whole = Grouped(state, valuation, limits).solve(20.0)
    assert by_pm.bound >= whole.value - 1e-6
    assert by_pm.value <= whole.bound + 1e-6


def brute(mapping, moves_left, objective, seen):
    """The best value reachable, by trying everything."""
    best = checker.check(mapping, [], objective, Limits(0)).worths[0].fragment_rate
    if moves_left == 0:
        return best
    for vm, machine in enumerate(mapping.vms):
        here = Place(machine.pm, tuple(share.node for share in machine.shares))
        for pm, host in enumerate(mapping.pms):
            for node in host.nodes:
                there = Place(pm, (node.number,))
                if (
                    there != here
                    and not checker.check(mapping, [Move(vm, here, there)], objective, Limits(1)).violation
                ):
                    share = replace(machine.shares[0], node=node.number)
                    moved = replace(machine, pm=pm, shares=(share,))
                    after = replace(mapping, vms=(*mapping.vms[:vm], moved, *mapping.vms[vm + 1 :]))
                    best = min(best, brute(after, moves_left - 1, objective, seen))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_exact_is_the_optimum_by_brute_force(build, pose, seed):
    import numpy as np

    random = np.random.default_rng(seed)
    vms = []
    for pm, node in product(range(3), range(2)):
        free = 20
        while free > 6 and random.random() < 0.8:
            cores = int(random.choice([2, 4, 6, 8]))
            if cores <= free:
                vms.append((pm, {node: cores}))
                free -= cores
    mapping = build([[20, 20]] * 3, vms)
    expected = brute(mapping, 2, parse_objective("fr"), {})
    for name in ("exact", "auto"):
        plan = make_plan(pose(mapping, 2), name, 100.0)
        assert plan.final.fragment_rate == pytest.approx(expected)
        assert plan.gap == pytest.approx(0.0, abs=1e-6)


def test_cycle_is_broken_through_a_spare_place(build, pose):
    # 8 and 4+4 must change places; both nodes are full, only pm2 has room to wait in.
    mapping = build([[24], [24], [9]], [(0, {0: 8}), (0, {0: 15}), (1, {0: 9}), (1, {0: 15})])
    plan = make_plan(pose(mapping, 10), "exact", 100.0)
    assert checker.check(mapping, plan.moves, parse_objective("fr"), Limits(10)).violation is None


def test_goal_takes_the_fewest_moves(pose):
    mapping = generate(SHAPES["small"], 2)
    best = {mnl: make_plan(pose(mapping, mnl), "exact", 100.0) for mnl in (4, 5)}
    assert all(plan.gap == pytest.approx(0.0, abs=1e-6) for plan in best.values())
    goal = best[5].final.fragment_rate + 1e-6
    assert best[4].final.fragment_rate > goal
    plan = make_plan(pose(mapping, 20, f"fr-goal:{goal:.6f}"), "exact", 100.0)
    assert len(plan.moves) == 5
    with pytest.raises(UsageError, match="out of reach"):
        make_plan(pose(mapping, 4, f"fr-goal:{goal:.6f}"), "exact", 100.0)


def test_affinity_is_kept_where_it_binds(build, pose, ticking):
    # vm0 would complete a slot on pm0 by leaving, but its twin sits on the only PM with room.
    apart = build([[16], [8]], [(0, {0: 4}), (1, {0: 4})], [[0, 1]])
    free = build([[16], [8]], [(0, {0: 4}), (1, {0: 4})])
    for name in SOLVERS:
        assert make_plan(pose(free, 1), name, 0.5, clock=ticking).final.slots == 1
        assert make_plan(pose(apart, 1), name, 0.5, clock=ticking).final.slots == 0


def test_make_room(build, pose):
    mapping = build([[20, 20], [20, 20]], [(0, {0: 8}), (0, {1: 8}), (1, {0: 10}), (1, {1: 12})])
    request = parse_request("32c/64G/2numa")
    plan = plan_by(pose(mapping, 5), "make-room", lambda p, d, s: make_room(p, request, d, s), 100.0, 0)
    free = {(0, 0): 20, (0, 1): 20, (1, 0): 20, (1, 1): 20}
    at = [Place(vm.pm, tuple(share.node for share in vm.shares)) for vm in mapping.vms]
    for move in plan.moves:
        at[move.vm] = move.target
    for vm, place in zip(mapping.vms, at, strict=True):
        free[place.pm, place.nodes[0]] -= vm.cores
    assert any(free[pm, 0] >= 16 and free[pm, 1] >= 16 for pm in (0, 1))
    assert any("fewer" in note for note in plan.notes)
    with pytest.raises(FabricpilotError, match="proven"):
        plan_by(pose(mapping, 5), "make-room", lambda p, d, s: make_room(p, parse_request("80c/2numa"), d, s), 100.0, 0)


def test_replan_keeps_what_holds(pose):
    mapping = generate(SHAPES["small"], 4)
    plan = make_plan(pose(mapping, 10), "exact", 100.0)
    half = plan.moves[:5]
    vms = list(mapping.vms)
    for move in half:  # half of it was carried out
        shares = tuple(replace(s, node=n) for s, n in zip(vms[move.vm].shares, move.target.nodes, strict=True))
        vms[move.vm] = replace(vms[move.vm], pm=move.target.pm, shares=shares)
    now = replace(mapping, vms=tuple(vms))
    from central.planner.model.problem import Step

    wishes = [Step(move.vm, move.target) for move in plan.moves]
    again = plan_by(pose(now, 5), "replan", lambda p, d, s: replan(p, wishes, 0, d, s), 100.0, 0)
    assert again.final.slots >= plan.final.slots
    left = len(plan.moves) - 5
    assert f"5 moves of the earlier plan are done, {left} kept, 0 dropped" in again.notes[0]


def test_cost_of_copying_makes_moves_rarer(pose):
    mapping = generate(SHAPES["small"], 1)
    cheap = pose(mapping, 20)
    dear = replace(cheap, objective=replace(cheap.objective, cost_per_gb=0.1))
    plans = [make_plan(problem, "exact", 100.0) for problem in (cheap, dear)]
    copied = [sum(mapping.vms[move.vm].mem_mb for move in plan.moves) for plan in plans]
    assert 0 < copied[1] < copied[0]


def test_batches_run_in_parallel_only_where_room_is(build):
    from central.planner.model.problem import Step

    mapping = build([[8], [8], [8]], [(0, {0: 8}), (1, {0: 8})])
    moves = moves_of(mapping, [Step(0, Place(2, (0,))), Step(1, Place(0, (0,)))])
    assert [move.batch for move in moves] == [0, 1]
    assert checker.check(mapping, moves, parse_objective("fr"), Limits(2)).violation is None


@pytest.mark.parametrize("limits", [{"mnl": -1}, {"max_bytes": -1}, {"per_pm": -5}])
def test_impossible_limits(build, limits):
    mapping = build([[16]], [(0, {0: 4})])
    problem = Problem(mapping, parse_objective("fr"), Limits(**({"mnl": 1} | limits)))
    with pytest.raises(UsageError, match="expected 0 or more"):
        make_plan(problem, "greedy", 1.0)


@pytest.mark.parametrize("limits", [{"max_bytes": 60 * 2**30}, {"per_tenant": 1}, {"cost": 0.05}])
def test_the_decomposition_keeps_limits_exactly(pose, limits):
    mapping = generate(replace(SHAPES["tiny"], pms=12, vms=90, tenants=6), 3)
    cost = limits.pop("cost", 0.0)
    problem = pose(mapping, 8, "fr", **limits)
    walk = Walk(problem, Cluster(mapping))
    by_pm = Master(Pricer(walk.state, walk.valuation, problem.limits, walk.budget, cost)).solve(Deadline(100.0))
    grouped = Cluster(mapping, by_tenant="per_tenant" in limits)
    whole = Grouped(State(grouped), walk.valuation, problem.limits, cost_per_gb=cost).solve(100.0)
    assert whole.proven
    assert whole.value - 1e-6 <= by_pm.bound
    assert by_pm.value <= whole.bound + 1e-6
    assert by_pm.value >= whole.value - 1.0


def test_a_cap_per_pm_has_a_bound_now(pose):
    mapping = generate(SHAPES["small"], 1)
    plan = make_plan(pose(mapping, 12, per_pm=1), "exact", 100.0)
    assert plan.bound is not None
    free = make_plan(pose(mapping, 12), "exact", 100.0)
    assert plan.bound == pytest.approx(free.final.fragment_rate)


def flow_of(cluster, *moves):
    """The flow of moves (VM, place)."""
    after = cluster.vm_place.copy()
    for vm, place in moves:
        after[vm] = place
    return flow_between(cluster, cluster.vm_place, after)


def test_a_cycle_is_proven_to_need_a_spare_place(build):
    # Two full nodes change their 8 and their 4 + 4: nothing can go first, unless one of the small ones fits beside.
    full = Cluster(build([[8], [8], [8]], [(0, {0: 8}), (1, {0: 4}), (1, {0: 4})]))
    swap = ((0, 1), (1, 0), (2, 0))
    assert orderable(State(full), flow_of(full, *swap)) is False
    roomy = Cluster(build([[12], [12]], [(0, {0: 8}), (1, {0: 4}), (1, {0: 4})]))
    assert orderable(State(roomy), flow_of(roomy, *swap)) is True
    # A ring of three that is full, and the same with room for one.
    ring = Cluster(build([[8], [8], [8]], [(0, {0: 8}), (1, {0: 6}), (2, {0: 7})]))
    turn = ((0, 1), (1, 2), (2, 0))
    assert orderable(State(ring), flow_of(ring, *turn)) is False
    assert least_extra(State(ring), flow_of(ring, *turn), 4) == 1


def test_two_cycles_are_proven_to_need_two_spare_places(build):
    # Two full pairs that change places, each pair of sizes of its own; one waiting VM helps only its own pair.
    sizes = [(0, {0: 8}), (1, {0: 7}), (2, {0: 6}), (3, {0: 5})]
    cluster = Cluster(build([[8], [8], [6], [6], [40]], sizes))
    both = flow_of(cluster, (0, 1), (1, 0), (2, 3), (3, 2))
    assert least_extra(State(cluster), both, 4) == 2
    assert least_extra(State(cluster), both, 1) == 1  # no more than are known to do
    assert least_extra(State(cluster), flow_of(cluster, (2, 3), (3, 2)), 4) == 1
    one = flow_of(cluster, (0, 4))
    assert least_extra(State(cluster), one, 4) == 0


def test_what_the_exact_solver_does_can_be_ordered(pose):
    mapping = generate(SHAPES["small"], 2)
    problem = pose(mapping, 12)
    plan = make_plan(problem, "exact", 100.0)
    cluster = Cluster(mapping)
    moves = [(move.vm, cluster.place_index(move.vm, move.target)) for move in plan.moves]
    assert orderable(State(cluster), flow_of(cluster, *moves)) is True


@pytest.mark.parametrize("name", SOLVERS)
def test_where_nothing_can_move_nothing_is_planned(build, pose, name):
    mapping = build([[20], [20]], [(0, {0: 4}), (1, {0: 14})])
    still = replace(mapping, vms=tuple(replace(vm, movable=False) for vm in mapping.vms))
    for nothing in (still, replace(mapping, vms=()), build([[20]], [])):
        plan = make_plan(pose(nothing, 5), name, 10.0)
        assert not plan.moves
        assert "no VM may move" in plan.notes[0]


def test_a_cluster_without_active_machines_is_told(build, pose):
    mapping = build([[20], [20]], [(0, {0: 4})])
    down = replace(mapping, pms=tuple(replace(pm, status="OUTAGE") for pm in mapping.pms))
    with pytest.raises(UsageError, match="2 PMs, none of them ACTIVE"):
        make_plan(pose(down, 5), "auto", 1.0)
    with pytest.raises(UsageError, match="no PM that is ACTIVE"):
        make_plan(pose(replace(mapping, pms=(), vms=()), 5), "auto", 1.0)
