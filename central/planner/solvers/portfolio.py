"""`auto`: the anytime portfolio.

Logic: (1) the look-ahead heuristic: a good plan in a fraction of a second, whatever else happens. (2) the exact solver
from there; if its plan meets the bound there is nothing to add. (3) vector packing, then large-neighbourhood search of
the best, until time is up or the bound is met: it treats anti-affinity exactly. The best plan wins: highest value
(or fewest moves to the goal), then fewest moves; the caller's checker replays it.
"""

from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.solvers.exact import better, cluster_of, improve, walk_along
from central.planner.solvers.greedy import Walk
from central.planner.solvers.neighbourhood import search
from central.planner.solvers.packing import packing
from central.planner.solvers.swap import look_ahead

FIRST_SHARE = 0.25  # at most; the look-ahead heuristic mostly needs a tenth of that
EXACT_SHARE = 0.75  # of what is left then


def auto(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """The best plan found in time, with the best bound."""
    cluster = cluster_of(problem)
    first = Walk(problem, cluster)
    look_ahead(first, deadline.part(FIRST_SHARE))
    solution, best = improve(problem, cluster, first.steps, deadline.part(EXACT_SHARE), seed)
    if solution.impossible or solution.proven or _met(best, solution.bound):
        return solution
    if not deadline.over:
        walk = walk_along(problem, cluster, packing(problem, deadline.part(0.3), seed).steps)
        if better(walk, best):
            best = walk
    best = search(problem, cluster, best.steps, deadline, seed, enough=lambda walk: _met(walk, solution.bound))
    return Solution(tuple(best.steps), solution.bound, solution.notes)


def _met(walk: Walk, bound: float | None) -> bool:
    """Whether the plan is as good as the bound says any can be."""
    return bound is not None and walk.valuation.objective(walk.value()) <= bound + 1e-9
