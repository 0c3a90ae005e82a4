"""Vector bin packing (VMR2L's baseline): take the VM whose leaving frees most, put it where it aligns best.

Alignment is the dot product of what the VM takes with what the place has free, each resource as a share of the node's
size (Panigrahy et al., 2011). A move must gain, so that the plan never gets worse.
"""

import numpy as np

from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.model.state import Floats
from central.planner.solvers.greedy import Walk

LOOKED_AT = 30


def packing(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """Deterministic: `seed` is not used."""
    del seed
    walk = Walk(problem)
    while walk.budget.moves_left > 0 and not deadline.over and not walk.reached() and _step(walk):
        pass
    return Solution(tuple(walk.steps))


def _step(walk: Walk) -> bool:
    """Make one move; whether one was found."""
    candidates: list[tuple[float, int, int]] = []
    for group in range(walk.cluster.groups):
        sources = walk.occupancy.places(group)
        if not len(sources):
            continue
        start = walk.cluster.group_places[group].start
        leave = walk.tables.leave[group, sources]
        candidates += [(float(leave[i]), group, int(sources[i])) for i in np.argsort(-leave, kind="stable")[:LOOKED_AT]]
    candidates.sort(key=lambda one: -one[0])
    for gain, group, source in candidates:
        if gain <= 0:
            return False
        start = walk.cluster.group_places[group].start
        window = slice(start, walk.cluster.group_places[group].stop)
        good = np.logical_and(walk.tables.fits[group, window], walk.tables.arrive[group, window] + gain > 1e-9)
        score = np.where(good, _alignment(walk, group), -np.inf)
        for j in np.argsort(-score, kind="stable")[:LOOKED_AT]:
            if score[j] == -np.inf:
                break
            place = start + int(j)
            if walk.cluster.place_pm[place] == walk.cluster.place_pm[source]:
                continue
            vm = next((vm for vm in walk.occupancy.at[group, source] if walk.may(vm, place)), None)
            if vm is not None:
                walk.go(vm, place)
                return True
    return False


def _alignment(walk: Walk, group: int) -> Floats:
    cluster, state = walk.cluster, walk.state
    places = cluster.group_places[group]
    total: Floats = np.zeros(len(places))
    for part in range(int(cluster.group_arity[group])):
        node = cluster.place_nodes[places.start : places.stop, part]
        for free, size, each in (
            (state.free_cores, cluster.node_cores, cluster.group_cores),
            (state.free_mem_mb, cluster.node_mem_mb, cluster.group_mem_mb),
        ):
            whole = np.maximum(1, size[node]).astype(float)
            total += (free[node] / whole) * (each[group, part] / whole)
    return total
