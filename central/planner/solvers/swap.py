"""Greedy that looks ahead a little: gathers fragments, swaps two VMs, and makes moves that only prepare.

Logic: (1) single moves while they gain; of equal ones the one that leaves fragments gathered on few nodes. (2) Else
the best swap: for a pair of groups (a, b) that sit alike, b for a at place p gains what p gets and a for b at q what q
gets; the best p and q are found independently. One of the two must fit before the other has left, so that the swap is
two moves and not three. (3) Else a move that loses no slot but gathers fragments, so that (1) finds something again.
The gathering grows with every such move, so this ends; the plan is cut after its best prefix.
"""

import numpy as np

from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.model.state import Floats
from central.planner.solvers.gains import rows_value
from central.planner.solvers.greedy import Walk, best_move, descend

LOOKED_AT = 6
TIE_BREAK = 1e-3


def swap(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """Gather, swap, prepare until nothing helps. Deterministic: `seed` is not used."""
    del seed
    walk = Walk(problem)
    look_ahead(walk, deadline)
    return Solution(tuple(walk.steps))


def look_ahead(walk: Walk, deadline: Deadline) -> None:
    """Steps (1) to (3) on `walk` until nothing helps, the goal is met, or time or moves are used up."""
    walk.tie_break = TIE_BREAK * min(walk.valuation.coefficients)
    best, length = walk.value(), len(walk.steps)
    while True:
        descend(walk, deadline)
        if walk.value() > best + 1e-9:
            best, length = walk.value(), len(walk.steps)
            deadline.board.sketch(walk.steps)
        if walk.budget.moves_left < 2 or deadline.over or walk.reached():
            break
        if not _best_swap(walk):
            preparing = best_move(walk, 1e-3 * walk.tie_break)
            if preparing is None:
                break
            walk.go(*preparing)
    while len(walk.steps) > length:
        walk.back()


def _best_swap(walk: Walk) -> bool:
    """Make the best swap that gains; whether there was one."""
    cluster, state = walk.cluster, walk.state
    found: list[tuple[float, int, int, int, int]] = []
    fits = [state.fits(group) for group in range(cluster.groups)]
    sources = [walk.occupancy.places(group) for group in range(cluster.groups)]
    for a in range(cluster.groups):
        for b in range(cluster.groups):
            if a == b or cluster.group_kind[a] != cluster.group_kind[b] or not len(sources[a]) or not len(sources[b]):
                continue
            start = cluster.group_places[a].start
            at_p = _exchange(walk, a, b, sources[a])  # a leaves, b arrives
            at_q = _exchange(walk, b, a, sources[b])
            at_q = np.where(fits[a][sources[b] - start], at_q, -np.inf)  # a goes first, so it must fit beside b
            for i in np.argsort(-at_p, kind="stable")[:LOOKED_AT]:
                for j in np.argsort(-at_q, kind="stable")[:LOOKED_AT]:
                    if at_p[i] + at_q[j] > 1e-9:
                        found.append((float(at_p[i] + at_q[j]), a, int(sources[a][i]), b, int(sources[b][j])))
    for _, a, p, b, q in sorted(found, key=lambda one: -one[0])[:200]:
        if cluster.place_pm[p] == cluster.place_pm[q]:
            continue
        first = next((vm for vm in walk.occupancy.at[a, p] if walk.may(vm, q)), None)
        if first is None:
            continue
        value = walk.value()
        second_choice = list(walk.occupancy.at[b, q])
        walk.go(first, q)
        second = next((vm for vm in second_choice if walk.may(vm, p)), None)
        if second is not None:
            walk.go(second, p)
            if walk.value() > value + 1e-9:
                return True
            walk.back()
        walk.back()
    return False


def _exchange(walk: Walk, leaving: int, arriving: int, places: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Floats:
    """(K,) gain at `places` when one VM of a group leaves and one of another arrives; -inf where it cannot fit."""
    cluster, state = walk.cluster, walk.state
    nodes = cluster.pm_nodes[cluster.place_pm[places]]
    cores = np.where(nodes >= 0, state.free_cores[nodes], 0)
    mem_mb = np.where(nodes >= 0, state.free_mem_mb[nodes], 0)
    before = rows_value(walk.valuation, cores, mem_mb)
    for part in range(int(cluster.group_arity[leaving])):
        hit = nodes == cluster.place_nodes[places, part, None]
        cores = cores + hit * (cluster.group_cores[leaving, part] - cluster.group_cores[arriving, part])
        mem_mb = mem_mb + hit * (cluster.group_mem_mb[leaving, part] - cluster.group_mem_mb[arriving, part])
    fits = np.logical_and((cores >= 0).all(axis=1), (mem_mb >= 0).all(axis=1))
    gain: Floats = np.where(fits, rows_value(walk.valuation, cores, mem_mb) - before, -np.inf)
    return gain
