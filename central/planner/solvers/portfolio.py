"""`auto`: the anytime portfolio.

Logic: two lanes. The first, `auto` itself, is (1) the look-ahead heuristic, and plain greedy if there is time: good
plans in a fraction of a second, whatever else happens; (2) the exact solver from the better of them, with all the time
there is; if its plan meets the bound, nothing can be added; (3) what time is left goes to large-neighbourhood search of
the best, which treats anti-affinity exactly. `beside` runs on a second core. Where there is anti-affinity, of which
the exact solver's counts know nothing, it is `lns` from the first moment; elsewhere the other solvers, the quick ones
first. The search goes on from the best plan that either lane has found. The judge keeps the best of all they post, so
`auto` is no worse than `exact`, `swap` and `greedy` in the same time, nor than any other solver that `beside` gets to;
and once the bound is met, than none. With one core only the first lane runs.
"""

from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.solvers.exact import best_known, better, cluster_of, first_plan, improve, walk_along
from central.planner.solvers.greedy import Walk, descend
from central.planner.solvers.neighbourhood import neighbourhood, search, searchable
from central.planner.solvers.packing import packing
from central.planner.solvers.registry import solver
from fabricpilot.errors import UsageError

PACKING_SHARE = 0.3  # of what is left after the exact solver, on one core
# Beside it: (solver, most of the time left for it if a search is to follow, least seconds: the policy's library takes
# one to load)
OTHERS = (("packing", 1.0, 0.0), ("pop", 0.35, 0.5), ("learned", 0.7, 2.0))


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
    """What is worth trying while the exact solver works: all of `lns` where anti-affinity binds, else the others."""
    if problem.mapping.anti_affinity and searchable(problem):
        return neighbourhood(problem, deadline, seed)
    cluster = cluster_of(problem)
    best = Walk(problem, cluster)
    descend(best, deadline)
    deadline.board.post(Solution(tuple(best.steps)))
    for name, share, least_s in OTHERS:
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


def _met(walk: Walk, bound: float | None) -> bool:
    """Whether the plan is as good as the bound says any can be."""
    return bound is not None and walk.valuation.objective(walk.value()) <= bound + 1e-9
