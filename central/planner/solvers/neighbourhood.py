"""Large-neighbourhood search: a score picks a few PMs, the exact solver re-optimises everything on them.

This is where anti-affinity is exact: in the neighbourhood every VM is a variable of its own,
    x[v, p] = 1 if VM v ends at place p;  sum over p of x[v, p] = 1;  room per node;  one of a set per PM or rack;
    slots as in `grouped`;  VMs that end elsewhere than in the mapping are the moves, at most MNL in all
so it finds what choosing among twins cannot. The rest of the plan stands. A neighbourhood's result is put in order by
replay; if that works and the plan got better it is the new plan. PMs are drawn with a weight: fragments to be gained,
moves already touching them, and, where the policy is at hand, its probabilities (`score`).
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from central.planner.model.cluster import Cluster, Ints
from central.planner.model.problem import Deadline, Problem, Solution, Step
from central.planner.solvers.exact import THREADS, best_known, better, cluster_of, walk_along
from central.planner.solvers.greedy import Walk, descend
from central.planner.solvers.program import Program
from central.planner.solvers.swap import look_ahead

PMS = 8  # in a neighbourhood: some 60 VMs, a thousand binaries, solved in a tenth of a second
MOST_SECONDS = 1.0  # for one neighbourhood
LEAST_STEP_S = 0.02  # none is begun with less time than this left
Score = Callable[[Walk], npt.NDArray[np.float64]]


def neighbourhood(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """Look-ahead heuristic first, then neighbourhoods until time is up."""
    cluster = cluster_of(problem)
    start = Walk(problem, cluster)
    look_ahead(start, deadline.part(0.4))
    best = search(problem, cluster, start.steps, deadline, seed)
    return Solution(tuple(best.steps))


def search(
    problem: Problem,
    cluster: Cluster,
    steps: list[Step],
    deadline: Deadline,
    seed: int,
    score: Score | None = None,
    enough: Callable[[Walk], bool] = lambda walk: False,
) -> Walk:
    """Improve a plan, or a better one that others find meanwhile, until time is up or it is `enough`."""
    random = np.random.default_rng(seed)
    best = walk_along(problem, cluster, steps)
    if not searchable(problem):
        return best
    weigh = score or fragments
    while deadline.left_s > LEAST_STEP_S and not enough(best) and not best.reached():
        best = best_known(best, deadline)
        weight = weigh(best)
        size = min(PMS, int((weight > 0).sum()))
        if size < 2:
            break
        chosen = random.choice(len(weight), size, replace=False, p=weight / weight.sum())
        target = _solve(best, chosen, min(MOST_SECONDS, deadline.left_s))
        if target is not None:
            walk = _ordered(problem, cluster, target)
            if walk is not None:
                descend(walk, deadline)  # moves the neighbourhood saved may gain elsewhere
                if better(walk, best):
                    best = walk
                    deadline.board.post(Solution(tuple(best.steps)))
    return best


def searchable(problem: Problem) -> bool:
    """Whether neighbourhoods know all of the problem: no limit but MNL, and no term over several nodes."""
    limits = problem.limits
    plain = limits.per_pm is None and limits.per_tenant is None and limits.max_bytes is None
    return plain and all(term.nodes == 1 for term in problem.objective.terms)


def fragments(walk: Walk) -> npt.NDArray[np.float64]:
    """(PMs,) fragments of the first term, and a little for every move that touches the PM already."""
    cluster = walk.cluster
    size = walk.valuation.terms[0].cores or 16
    rest = np.where(cluster.node_active, walk.state.free_cores % size, 0)
    weight = np.bincount(cluster.node_pm, rest, len(cluster.mapping.pms)) / size
    for vm in {step.vm for step in walk.steps}:
        for place in (cluster.vm_place[vm], walk.state.vm_place[vm]):
            weight[cluster.place_pm[place]] += 0.5
    active = np.zeros(len(weight), dtype=np.bool_)
    active[cluster.node_pm[cluster.node_active]] = True
    return np.where(active, weight + 0.02, 0.0)


def _solve(walk: Walk, chosen: Ints, seconds: float) -> Ints | None:
    """Places (V,) of all VMs after re-optimising the chosen PMs; None if nothing was found."""
    cluster, state = walk.cluster, walk.state
    inside = np.zeros(len(cluster.mapping.pms), dtype=np.bool_)
    inside[chosen] = True
    placed = np.flatnonzero(state.vm_place >= 0)
    here = placed[inside[cluster.place_pm[state.vm_place[placed]]]]
    free = here[cluster.vm_movable[here]]
    if not len(free):
        return None
    # Room the chosen nodes have once every VM that may move is taken away.
    cores, mem_mb = state.free_cores.copy(), state.free_mem_mb.copy()
    for vm in free.tolist():
        for part, node in enumerate(cluster.nodes_of(int(state.vm_place[vm]))):
            cores[node] += cluster.group_cores[cluster.vm_group[vm], part]
            mem_mb[node] += cluster.group_mem_mb[cluster.vm_group[vm], part]
    program = Program()
    vm_of, place_of = [], []
    for vm in free.tolist():
        places = cluster.group_places[int(cluster.vm_group[vm])]
        options = np.flatnonzero(inside[cluster.place_pm[places.start : places.stop]]) + places.start
        vm_of.append(np.full(len(options), vm))
        place_of.append(options)
    vms, places_ = np.concatenate(vm_of), np.concatenate(place_of)
    # A slot is worth far more than a move, so among equals the fewest moves win.
    moved = (places_ != cluster.vm_place[vms]).astype(float)
    x = program.add_columns(np.ones(len(vms)), -1e-3 * moved)
    row_of = {vm: row for row, vm in enumerate(free.tolist())}
    each = program.add_rows(len(free), 1.0, 1.0)
    program.enter(each[[row_of[vm] for vm in vms.tolist()]], x, 1.0)
    others = int(((state.vm_place != cluster.vm_place) & ~np.isin(np.arange(len(state.vm_place)), free)).sum())
    program.enter(program.add_rows(1, upper=float(walk.problem.limits.mnl - others)), x, moved)
    nodes = np.flatnonzero(inside[cluster.node_pm])
    at = np.full(len(cluster.node_pm), -1)
    at[nodes] = np.arange(len(nodes))
    usage = []
    for room, amount in ((cores, cluster.group_cores), (mem_mb, cluster.group_mem_mb)):
        for term, coefficient in [(None, 0.0), *zip(walk.valuation.terms, walk.valuation.coefficients, strict=True)]:
            rows = program.add_rows(len(nodes), upper=room[nodes].astype(float))
            for part in range(cluster.place_nodes.shape[1]):
                node = cluster.place_nodes[places_, part]
                held = node >= 0
                program.enter(rows[at[node[held]]], x[held], amount[cluster.vm_group[vms[held]], part].astype(float))
            usage.append((term, coefficient, amount is cluster.group_cores, rows))
    for term, coefficient in zip(walk.valuation.terms, walk.valuation.coefficients, strict=True):
        most = np.minimum(
            cores[nodes] // term.cores if term.cores else np.inf,
            mem_mb[nodes] // term.mem_mb if term.mem_mb else np.inf,
        )
        slots = program.add_columns(most, coefficient)
        for other, _, by_cores, rows in usage:
            size = term.cores if by_cores else term.mem_mb
            if other is term and size:
                program.enter(rows, slots, float(size))
    _keep_apart(program, walk, free, vms, places_, x)
    outcome = program.solve(seconds, threads=THREADS, absolute_gap=1e-4)
    if outcome.values is None:
        return None
    target = state.vm_place.copy()
    picked = outcome.values[x] > 0.5
    target[vms[picked]] = places_[picked]
    return target


def _keep_apart(program: Program, walk: Walk, free: Ints, vms: Ints, places: Ints, x: Ints) -> None:
    """At most one VM of a set per domain, and none where one that is not free stays."""
    cluster, state = walk.cluster, walk.state
    numbers = sorted({number for vm in free.tolist() for number in cluster.vm_sets[vm]})
    is_free = np.zeros(len(cluster.vm_group), dtype=np.bool_)
    is_free[free] = True
    for number in numbers:
        members = cluster.set_members[number]
        domain = cluster.set_domain[number]
        mine = np.isin(vms, members)
        at = domain[cluster.place_pm[places[mine]]]
        fixed = [vm for vm in members.tolist() if not is_free[vm] and state.vm_place[vm] >= 0]
        taken = {int(domain[cluster.place_pm[state.vm_place[vm]]]) for vm in fixed}
        for one in np.unique(at).tolist():
            columns = x[mine][at == one]
            # A set that is broken already may stay as it is: no more VMs than there are now.
            now = sum(domain[cluster.place_pm[state.vm_place[vm]]] == one for vm in members.tolist() if is_free[vm])
            limit = max(0 if one in taken else 1, int(now))
            program.enter(program.add_rows(1, upper=float(limit)), columns, 1.0)


def _ordered(problem: Problem, cluster: Cluster, target: Ints) -> Walk | None:
    """A walk that takes every VM from the mapping to `target`, one move each; None if no order was found."""
    walk = Walk(problem, cluster)
    pending = np.flatnonzero((target >= 0) & (target != cluster.vm_place)).tolist()
    while pending:
        able = next((vm for vm in pending if walk.may(vm, int(target[vm]))), None)
        if able is None:
            return None
        walk.go(able, int(target[able]))
        pending.remove(able)
    return walk
