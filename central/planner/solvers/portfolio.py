"""`auto`: the anytime portfolio.

Logic: (1) the look-ahead heuristic, and plain greedy if there is time: good plans in a fraction of a second, whatever
else happens. (2) the exact solver from the better of them, with all the time there is; if its plan meets the bound,
nothing can be added. (3) what time is left goes to vector packing and to large-neighbourhood search of the best, which
treats anti-affinity exactly. The best plan wins: highest value (or fewest moves to the goal), then fewest moves; the
caller's checker replays it. Steps (1) and (2) are what `exact` does, and (3) only replaces a plan by a better one.
"""

from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.solvers.exact import better, cluster_of, first_plan, improve, walk_along
from central.planner.solvers.greedy import Walk
from central.planner.solvers.neighbourhood import search
from central.planner.solvers.packing import packing

PACKING_SHARE = 0.3  # of what is left after the exact solver


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


def _met(walk: Walk, bound: float | None) -> bool:
    """Whether the plan is as good as the bound says any can be."""
    return bound is not None and walk.valuation.objective(walk.value()) <= bound + 1e-9
