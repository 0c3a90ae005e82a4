"""Make room: the fewest moves after which one large request fits, exactly.

The grouped program with one request on one PM instead of slots: choose the PM and its nodes, leave that much there,
minimise the moves. If the order of moves or anti-affinity stands against the answer, that PM is left out and the
program solved again, so that what is found can always be carried out.
"""

import numpy as np

from central.planner.model.objective import SlotTerm
from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.model.state import State
from central.planner.solvers.exact import THREADS, cluster_of
from central.planner.solvers.greedy import Walk
from central.planner.solvers.grouped import Grouped
from central.planner.solvers.realise import realise
from fabricpilot.errors import FabricpilotError


def make_room(problem: Problem, request: SlotTerm, deadline: Deadline, seed: int) -> Solution:
    """Fewest moves that let `request` in.

    Raises:
        FabricpilotError: impossible within the limits (proven), or not settled in time.
    """
    cluster = cluster_of(problem)
    walk = Walk(problem, cluster)
    where = hosts(walk.state, request)
    if where:
        return Solution((), None, (f"{request.label} fits already on {len(where)} PMs, as on {_name(walk, where[0])}",))
    excluded: set[int] = set()
    limits = problem.limits
    while not deadline.over:
        program = Grouped(walk.state, walk.valuation, limits, room=request)
        program.exclude_hosts(excluded)
        result = program.solve(deadline.left_s * 0.9, threads=THREADS, seed=seed)
        if result.infeasible:
            tail = "" if not excluded else f", or only on {len(excluded)} PMs where the moves cannot be put in order"
            raise FabricpilotError(
                f"no plan of at most {limits.mnl} moves makes room for {request.label}"
                f": proven{tail}; raise --mnl or ask for less"
            )
        if result.flow is None:
            break
        done = realise(walk, result.flow, deadline, seed, whole=True)
        if done.complete:
            found = hosts(walk.state, request)
            at_least = max(0, int(np.ceil(-result.bound - 1e-6)))
            notes: tuple[str, ...] = (f"{request.label} then fits on {_name(walk, found[0])}",)
            if result.proven and not excluded and not done.extra:
                notes += (f"no plan of fewer than {at_least} moves makes room: proven",)
            return Solution(tuple(walk.steps), None, notes)
        assert program.chosen_host is not None
        excluded.add(program.chosen_host)
    raise FabricpilotError(
        f"whether room can be made for {request.label} was not settled in {deadline.seconds:g} s; raise --deadline"
    )


def hosts(state: State, request: SlotTerm) -> list[int]:
    """ACTIVE PMs where `request` fits now."""
    fit = np.logical_and(state.free_cores >= request.cores, state.free_mem_mb >= request.mem_mb)
    fit &= state.cluster.node_active
    count = np.bincount(state.cluster.node_pm, fit, len(state.cluster.mapping.pms))
    return [int(pm) for pm in np.flatnonzero(count >= request.nodes)]


def _name(walk: Walk, pm: int) -> str:
    return f"PM {walk.cluster.mapping.pms[pm].name}"
