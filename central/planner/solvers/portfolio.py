"""`auto`: the anytime portfolio. Exact first, and only if that leaves something open, everything else.

Logic: (1) the exact solver; if its plan meets its own bound there is nothing to add. (2) the look-ahead heuristic and
vector packing, each with a part of what is left. (3) large-neighbourhood search from the best of them, until time is up
or the bound is met: it treats anti-affinity exactly. The best plan wins: highest value (or fewest moves to the goal),
then fewest moves. Every candidate was replayed on a fresh state; the caller's checker replays the winner once more.
"""

from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.solvers.exact import better, cluster_of, improve, walk_along
from central.planner.solvers.greedy import Walk, descend
from central.planner.solvers.neighbourhood import search
from central.planner.solvers.packing import packing
from central.planner.solvers.swap import swap

EXACT_SHARE = 0.7


def auto(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """The best plan found in time, with the best bound."""
    cluster = cluster_of(problem)
    first = Walk(problem, cluster)
    descend(first, deadline.part(0.05))
    solution, best = improve(problem, cluster, first.steps, deadline.part(EXACT_SHARE), seed)
    if solution.impossible or solution.proven or _met(best, solution.bound):
        return solution
    for other, share in ((swap, 0.5), (packing, 0.3)):
        if deadline.over:
            break
        walk = walk_along(problem, cluster, other(problem, deadline.part(share), seed).steps)
        if better(walk, best):
            best = walk
    best = search(problem, cluster, best.steps, deadline, seed, enough=lambda walk: _met(walk, solution.bound))
    return Solution(tuple(best.steps), solution.bound, solution.notes)


def _met(walk: Walk, bound: float | None) -> bool:
    """Whether the plan is as good as the bound says any can be."""
    return bound is not None and walk.valuation.objective(walk.value()) <= bound + 1e-9
