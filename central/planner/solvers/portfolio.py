"""`auto`: the anytime portfolio.

Logic: two lanes. The first, `auto` itself, is (1) the look-ahead heuristic, and plain greedy if there is time: good
plans in a fraction of a second, whatever else happens; (2) the exact solver from the better of them, with all the time
there is; if its plan meets the bound, nothing can be added; (3) what time is left goes to large-neighbourhood search of
the best, which treats anti-affinity exactly. `beside` runs on a second core. Where another solver may well be ahead of
the exact one (`specialist`) it begins with all of that, then come the others, the quick ones first, and the search goes
on from the best plan that either lane has found. The judge keeps the best of all they post, so `auto` is no worse than
`exact`, `swap` and `greedy` in the same time, nor than any other solver that `beside` gets to; and once the bound is
met, than none. With one core only the first lane runs.
"""

from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.solvers.exact import best_known, better, cluster_of, first_plan, improve, walk_along
from central.planner.solvers.greedy import Walk
from central.planner.solvers.neighbourhood import search, searchable
from central.planner.solvers.packing import packing
from central.planner.solvers.pop import PMS_PER_PART
from central.planner.solvers.registry import solver
from fabricpilot.errors import UsageError

PACKING_SHARE = 0.3  # of what is left after the exact solver, on one core
SPECIALIST_LEAST_S = 0.2  # with less than that the quick solvers come first
LEARNED_LEAST_S = 0.8  # for the policy, once it is loaded
# Beside it: (solver, most of the time left for it if a search is to follow, least seconds: the policy's library takes
# one to load)
OTHERS = (("greedy", 1.0, 0.0), ("packing", 1.0, 0.0), ("pop", 0.35, 0.5), ("learned", 0.7, 2.0))


def auto(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """The best plan found in time, with the best bound."""
    cluster = cluster_of(problem)
    first = first_plan(problem, cluster, deadline)
    solution, best = improve(problem, cluster, first.steps, deadline, seed)
    if solution.impossible or solution.proven or _met(best, solution.bound):
        return solution
    if not deadline.over:
        walk = walk_along(problem, cluster, packing(problem, deadline.part(PACKING_SHARE), seed).steps)
        if better(walk, best):
            best = walk
    best = search(problem, cluster, best.steps, deadline, seed, enough=lambda walk: _met(walk, solution.bound))
    return Solution(tuple(best.steps), solution.bound, solution.notes)


def beside(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """What is worth trying while the exact solver works: at first all of the solver that may well be ahead of it."""
    first = specialist(problem, deadline.left_s)
    cluster = cluster_of(problem)
    best = Walk(problem, cluster)
    for name, share, least_s in [*([(first, 1.0, 0.0)] if first else []), *OTHERS]:
        if deadline.left_s < least_s:
            continue
        if not searchable(problem):
            share = 1.0
        try:
            found = walk_along(problem, cluster, solver(name)(problem, deadline.part(share), seed).steps)
        except UsageError:  # it is not made for such clusters
            continue
        if better(found, best):
            best = found
            deadline.board.post(Solution(tuple(best.steps)))
    best = search(problem, cluster, best_known(best, deadline).steps, deadline, seed + 1)
    return Solution(tuple(best.steps))


def specialist(problem: Problem, seconds: float) -> str | None:
    """The solver that was seen ahead of the exact one on problems of this kind, when the time was short for a proof.

    Anti-affinity that binds is not in the exact solver's counts; with a cap per PM its bound is poor; a small cluster
    is one part to `pop`, which is then the grouped program; and with a limit on bytes the policy was ahead on larger
    ones.
    """
    limits = problem.limits
    if seconds < SPECIALIST_LEAST_S:
        return None
    if limits.per_pm is not None or (limits.max_bytes is not None and len(problem.mapping.pms) <= PMS_PER_PART):
        return "pop"
    if limits.max_bytes is not None:
        return "learned" if seconds >= LEARNED_LEAST_S else None
    return "lns" if problem.mapping.anti_affinity and searchable(problem) else None


def _met(walk: Walk, bound: float | None) -> bool:
    """Whether the plan is as good as the bound says any can be."""
    return bound is not None and walk.valuation.objective(walk.value()) <= bound + 1e-9
