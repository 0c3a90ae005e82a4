"""Repair a plan after the cluster changed: VMs came and went, some moves were made already.

Logic: go through the earlier plan in its order on the mapping as it is now. A VM that is gone is dropped; one that is
where the plan wanted it is done; any other is moved if the move is legal now. What was kept is the start of the new
plan and its VMs do not move again; the rest of the budget is planned anew from there, exactly.
"""

from dataclasses import replace

import msgspec

from central.planner.model.mapping import Mapping
from central.planner.model.plan import Place
from central.planner.model.problem import Deadline, Problem, Solution, Step
from central.planner.solvers.exact import better, cluster_of, solve_counts, walk_along
from central.planner.solvers.greedy import Walk
from central.planner.solvers.realise import realise
from fabricpilot.errors import UsageError


class _End(msgspec.Struct):
    pm: int | str
    numa: list[int]


class _Move(msgspec.Struct):
    vm: int | str
    target: _End = msgspec.field(name="to")


class _PlanFile(msgspec.Struct):
    moves: list[_Move]


def read_wishes(raw: bytes, mapping: Mapping, source: str) -> tuple[list[Step], int]:
    """The moves of an earlier plan as far as their machines still exist, and how many do not.

    Raises:
        UsageError: not a plan.
    """
    try:
        document = msgspec.json.decode(raw, type=_PlanFile)
    except msgspec.DecodeError as error:
        raise UsageError(f"{source} is not a plan: {error}") from None
    wishes, gone = [], 0
    for entry in document.moves:
        vm, pm = mapping.vm_by_name.get(str(entry.vm)), mapping.pm_by_name.get(str(entry.target.pm))
        numbers = set() if pm is None else {node.number for node in mapping.pms[pm].nodes}
        if vm is None or pm is None or not set(entry.target.numa) <= numbers:
            gone += 1
        elif len(set(entry.target.numa)) != len(mapping.vms[vm].shares):
            gone += 1  # a new VM of the same name that sits differently
        else:
            wishes.append(Step(vm, Place(pm, tuple(entry.target.numa))))
    return wishes, gone


def replan(problem: Problem, wishes: list[Step], gone: int, deadline: Deadline, seed: int) -> Solution:
    """A plan from where the cluster is now that keeps what it can of `wishes`."""
    mapping = problem.mapping
    keeping = Walk(problem)
    dropped = gone
    done = 0
    for wish in wishes:
        vm = mapping.vms[wish.vm]
        here = Place(vm.pm, tuple(share.node for share in vm.shares))
        movable = keeping.cluster.vm_movable[wish.vm] and mapping.pms[wish.target.pm].active
        if wish.target == here:
            done += 1
        elif movable and keeping.may(wish.vm, keeping.cluster.place_index(wish.vm, wish.target)):
            keeping.go(wish.vm, keeping.cluster.place_index(wish.vm, wish.target))
        else:
            dropped += 1
    kept = frozenset(step.vm for step in keeping.steps)
    settled = replace(problem, limits=replace(problem.limits, fixed=problem.limits.fixed | kept))
    cluster = cluster_of(settled)
    before = walk_along(settled, cluster, keeping.steps)
    after = walk_along(settled, cluster, keeping.steps)
    result = solve_counts(after, deadline, None, seed)
    if result.flow is not None:
        realise(after, result.flow, deadline, seed)
    best = after if better(after, before) else before
    notes = (
        f"{done} moves of the earlier plan are done, {len(kept)} kept, {dropped} dropped, "
        f"{len(best.steps) - len(kept)} added",
    )
    return Solution(tuple(best.steps), None, notes)
