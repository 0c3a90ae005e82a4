"""The exact solver: solve for counts, then realise them as moves.

Logic: where the decomposition by PM applies (`columns`), use it: optimum and proof in a fraction of a second, nearly
whatever the size. Otherwise, or if it left a gap, the grouped program (`grouped`), starting from the best plan so far.
Anti-affinity is no part of the counts: which of the VMs that are alike goes where is chosen when they are realised, so
the bound holds with and without it.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from central.planner.model.cluster import Cluster
from central.planner.model.problem import Deadline, Limits, Problem, Solution, Step
from central.planner.solvers import columns
from central.planner.solvers.greedy import Walk
from central.planner.solvers.grouped import Flow, Grouped, Result, flow_between
from central.planner.solvers.realise import realise
from central.planner.solvers.swap import look_ahead

THREADS = 1  # of HiGHS; its branch and bound hardly gains from more, and the daemon beside it needs the other core
WORTH_TRYING_S = 1.5  # the grouped program needs about that to find anything, and overruns shorter limits
FIRST_SHARE = 0.15  # of the time at most, for a first plan to beat


def exact(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """Optimum, or the best found in time, with the bound that was proven."""
    cluster = cluster_of(problem)
    first = Walk(problem, cluster)
    look_ahead(first, deadline.part(FIRST_SHARE))
    return improve(problem, cluster, first.steps, deadline, seed)[0]


def cluster_of(problem: Problem) -> Cluster:
    """The arrays the exact solver needs: by tenant if a limit is."""
    return Cluster(problem.mapping, problem.limits.fixed, problem.limits.per_tenant is not None)


def improve(
    problem: Problem, cluster: Cluster, known: Sequence[Step], deadline: Deadline, seed: int
) -> tuple[Solution, Walk]:
    """The best of `known` and what the exact solver makes in time, with the bound; and the walk that did it."""
    before = walk_along(problem, cluster, known)
    after = Walk(problem, cluster)
    hint = flow_between(cluster, after.state.vm_place, before.state.vm_place)
    result = solve_counts(after, deadline, hint, seed)
    # The program counts a move inside one PM twice against the cap per PM: good plans, but no bound.
    relaxed = problem.limits.per_pm is None
    if result.infeasible and relaxed:
        return Solution(impossible=True), before
    notes: tuple[str, ...] = ()
    proven = False
    if result.flow is not None:
        done = realise(after, result.flow, deadline, seed)
        proven = relaxed and result.proven and done.complete and not done.extra
        if done.extra:
            notes += (f"{done.extra} extra moves through a spare place break a cycle",)
    bound = None
    if np.isfinite(result.bound) and relaxed:
        least = int(np.ceil(-result.bound - 1e-6))
        if after.value_needed is not None and least > 1:
            notes += (f"no plan of fewer than {least} moves reaches the goal: proven",)
        if after.value_needed is None and not problem.objective.cost_per_gb:
            bound = max(0.0, after.valuation.objective(result.bound))
    best = after if better(after, before) else before
    return Solution(tuple(best.steps), bound, notes, proven), best


def better(one: Walk, other: Walk) -> bool:
    """Whether `one` is the better plan: higher value, or with a goal, reached with fewer moves; then fewer moves."""
    return _merit(one) > _merit(other)


def _merit(walk: Walk) -> tuple[float, float]:
    if walk.value_needed is None:
        return round(walk.net(), 6), -float(len(walk.steps))
    return (1.0, -float(len(walk.steps))) if walk.reached() else (0.0, walk.value())


def walk_along(problem: Problem, cluster: Cluster, steps: Sequence[Step]) -> Walk:
    """A walk that has made `steps`."""
    walk = Walk(problem, cluster)
    for step in steps:
        walk.go(step.vm, cluster.place_index(step.vm, step.target))
    return walk


def limits_left(walk: Walk) -> Limits:
    """What the walk's budget leaves. Caps per PM and tenant are kept as they are when nothing was moved yet."""
    limits, budget = walk.problem.limits, walk.budget
    copied = None if limits.max_bytes is None else limits.max_bytes - budget.copied_bytes
    return replace(limits, mnl=budget.moves_left, max_bytes=copied)


def solve_counts(walk: Walk, deadline: Deadline, hint: Flow | None, seed: int) -> Result:
    """The best counts for the whole cluster from the walk's state on."""
    cluster, valuation, limits, state = walk.cluster, walk.valuation, limits_left(walk), walk.state
    cost = walk.problem.objective.cost_per_gb
    by_pm = columns.applies(cluster, valuation, limits, cost)
    if walk.value_needed is not None:
        if walk.reached():
            return Result(Flow({}, {}), 0.0, 0.0, True)
        if by_pm:
            result = columns.fewest(state, valuation, limits, walk.value_needed, deadline.part(0.9), seed)
            if result.flow is not None or result.infeasible:
                return result
        program = Grouped(state, valuation, limits, value_needed=walk.value_needed)
        return program.solve(deadline.left_s * 0.9, hint=hint, threads=THREADS, seed=seed)
    first: Result | None = None
    if by_pm:
        first = columns.Master(state, valuation, limits).solve(deadline.part(0.8), start=hint, seed=seed)
        if first.proven:
            return first
        hint = first.flow or hint
        if deadline.left_s < WORTH_TRYING_S and first.flow is not None:
            return first
    program = Grouped(state, valuation, limits, cost_per_gb=cost)
    second = program.solve(deadline.left_s * 0.85, hint=hint, threads=THREADS, seed=seed)
    if first is None:
        return second
    bound = min(first.bound, second.bound)
    best = second if second.value > first.value + 1e-9 else first
    return Result(best.flow, best.value, bound, bound - best.value < program.exact_gap)
