"""The exact solver: solve for counts, then realise them as moves.

Logic: where the decomposition by PM applies (`columns`), use it: optimum and proof in a fraction of a second, nearly
whatever the size. Otherwise, or if it left a gap, the grouped program (`grouped`), starting from the best plan so far.
Anti-affinity is no part of the counts: which of the VMs that are alike goes where is chosen when they are realised, so
the bound holds with and without it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from central.planner.model.cluster import Cluster
from central.planner.model.problem import Deadline, Limits, Problem, Solution, Step
from central.planner.model.state import Valuation
from central.planner.solvers import columns
from central.planner.solvers.cycles import least_extra
from central.planner.solvers.greedy import Walk, descend
from central.planner.solvers.grouped import Flow, Grouped, Result, flow_between
from central.planner.solvers.patterns import Pricer, applies
from central.planner.solvers.program import INFINITY
from central.planner.solvers.realise import realise
from central.planner.solvers.swap import look_ahead

THREADS = 1  # of HiGHS; its branch and bound hardly gains from more, and the daemon beside it needs the other core
SECONDS_PER_COLUMN = 2e-4  # of the grouped program until it finds anything: HiGHS' presolve cannot be stopped
GREEDY_SHARE = 0.1  # at most, of what the look-ahead heuristic leaves
UNCAPPED_SHARE = 0.35  # of what is left then, to try without a cap per PM
GENERATE_SHARE = 0.85  # of what is left then, for column generation; the rest is for putting the moves in order


def exact(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """Optimum, or the best found in time, with the bound that was proven."""
    cluster = cluster_of(problem)
    return improve(problem, cluster, first_plan(problem, cluster, deadline).steps, deadline, seed)[0]


def first_plan(problem: Problem, cluster: Cluster, deadline: Deadline) -> Walk:
    """A quick plan to beat: by look-ahead, or by plain greedy where that is better and there is time for it.

    Look-ahead may take all the time: where that is too short for it, it is too short for everything after it.
    """
    best = Walk(problem, cluster)
    look_ahead(best, deadline)
    deadline.board.post(Solution(tuple(best.steps)))
    plain = Walk(problem, cluster)
    descend(plain, deadline.part(GREEDY_SHARE))
    if not better(plain, best):
        return best
    deadline.board.post(Solution(tuple(plain.steps)))
    return plain


def cluster_of(problem: Problem) -> Cluster:
    """The arrays the exact solver needs: by tenant if a limit is, and the grouped program has to keep it."""
    cluster = Cluster(problem.mapping, problem.limits.fixed)
    if problem.limits.per_tenant is None or applies(cluster, Valuation.of(problem.objective, cluster)):
        return cluster
    return Cluster(problem.mapping, problem.limits.fixed, by_tenant=True)


def improve(
    problem: Problem, cluster: Cluster, known: Sequence[Step], deadline: Deadline, seed: int
) -> tuple[Solution, Walk]:
    """The best of `known` and what the exact solver makes in time, with the bound; and the walk that did it."""
    before = walk_along(problem, cluster, known)
    after = Walk(problem, cluster)
    hint = flow_between(cluster, after.state.vm_place, before.state.vm_place)
    result = solve_counts(after, deadline, hint, seed)
    if result.infeasible:
        return Solution(impossible=True), before
    bound = None
    if np.isfinite(result.bound) and after.value_needed is None and not problem.objective.cost_per_gb:
        bound = max(0.0, after.valuation.objective(result.bound))
        deadline.board.post(Solution(tuple(before.steps), bound))
    notes: tuple[str, ...] = ()
    proven = False
    if result.flow is not None:
        done = realise(after, result.flow, deadline, seed)
        if not done.complete:
            descend(after, deadline)  # the moves that are left may gain elsewhere
        proven = result.proven and done.complete and not done.extra
        if done.extra:
            least = least_extra(Walk(problem, cluster).state, result.flow, done.extra)
            proof = f"at least {least} needed: proven" if least else "not proven to be the fewest"
            notes += (f"{done.extra} extra moves through a spare place break a cycle ({proof})",)
    if np.isfinite(result.bound) and after.value_needed is not None:
        least = int(np.ceil(-result.bound - 1e-6))
        if least > 1:
            notes += (f"no plan of fewer than {least} moves reaches the goal: proven",)
    best = after if better(after, before) else before
    solution = Solution(tuple(best.steps), bound, notes, proven)
    deadline.board.post(solution)
    return solution, best


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


def best_known(mine: Walk, deadline: Deadline) -> Walk:
    """`mine`, or the plan on the board if that is better."""
    steps = deadline.board.latest()
    if not steps:
        return mine
    other = walk_along(mine.problem, mine.cluster, steps)
    return other if better(other, mine) else mine


def limits_left(walk: Walk) -> Limits:
    """What the walk's budget leaves. Caps per PM and tenant are kept as they are when nothing was moved yet."""
    limits, budget = walk.problem.limits, walk.budget
    copied = None if limits.max_bytes is None else limits.max_bytes - budget.copied_bytes
    return replace(limits, mnl=budget.moves_left, max_bytes=copied)


def solve_counts(walk: Walk, deadline: Deadline, hint: Flow | None, seed: int) -> Result:
    """The best counts for the whole cluster from the walk's state on."""
    cluster, valuation, limits, state = walk.cluster, walk.valuation, limits_left(walk), walk.state
    cost = walk.problem.objective.cost_per_gb
    by_pm = applies(cluster, valuation)
    if walk.value_needed is not None:
        if walk.reached():
            return Result(Flow({}, {}), 0.0, 0.0, True)
        if by_pm:
            part = deadline.part(GENERATE_SHARE)
            result = columns.fewest(state, valuation, limits, walk.value_needed, part, seed, walk.budget)
            if result.flow is not None or result.infeasible:
                return result
    first: Result | None = None
    if by_pm and walk.value_needed is None:
        bound = INFINITY
        if limits.per_pm is not None:  # mostly the cap does not bind; else the bound without it is had
            free = columns.Master(Pricer(state, valuation, replace(limits, per_pm=None), walk.budget, cost))
            first = free.solve(deadline.part(UNCAPPED_SHARE), seed=seed)
            if first.flow is not None and _within(walk, first.flow):
                return first
            bound = first.bound
        master = columns.Master(Pricer(state, valuation, limits, walk.budget, cost))
        first = _bounded(master.solve(deadline.part(GENERATE_SHARE), start=hint, seed=seed), bound)
        hint = first.flow or hint
        # Tenants are groups of their own in the grouped program; that is another cluster, and rarely pays.
        if first.proven or (first.flow is not None and limits.per_tenant is not None):
            return first
    program = Grouped(state, valuation, limits, value_needed=walk.value_needed, cost_per_gb=cost)
    if program.program.columns * SECONDS_PER_COLUMN > deadline.left_s:
        return first or Result(None, -INFINITY, INFINITY, False)
    second = program.solve(deadline.left_s * 0.85, hint=hint, threads=THREADS, seed=seed)
    if first is None:
        return second
    bound = min(first.bound, second.bound)
    best = second if second.value > first.value + 1e-9 else first
    return Result(best.flow, best.value, bound, bound - best.value < program.exact_gap)


def _within(walk: Walk, flow: Flow) -> bool:
    """Whether no PM has more moves than its cap, a move inside one counted twice."""
    touched = Counter(walk.budget.per_pm)
    for counts in (flow.leaving, flow.arriving):
        for (_, place), count in counts.items():
            touched[int(walk.cluster.place_pm[place])] += count
    return max(touched.values(), default=0) <= (walk.budget.limits.per_pm or 0)


def _bounded(result: Result, bound: float) -> Result:
    """The result with a bound that was proven elsewhere, if it is the better one."""
    best = min(result.bound, bound)
    return replace(result, bound=best, proven=result.proven or best - result.value < 1e-6)
