"""From a problem to a plan that may be shown: run a solver, put moves into batches, check, report.

No plan leaves here that the independent checker has not replayed.
"""

import time
from collections.abc import Callable

from central.planner import checker
from central.planner.model.plan import Plan
from central.planner.model.problem import Deadline, Problem, Solution, check_limits
from central.planner.solvers.batches import moves_of
from central.planner.solvers.registry import Solver, solver
from central.planner.warm import warm_up
from fabricpilot.errors import FabricpilotError, UsageError

COMPILED = ("auto", "exact", "replan")  # what uses compiled kernels
POLICIES = ("learned", "beam", "guided")  # what uses the policy


def make_plan(
    problem: Problem, name: str, seconds: float, seed: int = 0, clock: Callable[[], float] = time.monotonic
) -> Plan:
    """A checked plan by the solver of that name; `clock` says when `seconds` are over.

    Raises:
        UsageError: unknown solver, impossible limits, or a goal that is proven to be out of reach.
        FabricpilotError: the checker refused the plan: a bug, never shown as a plan.
    """
    return plan_by(problem, name, solver(name), seconds, seed, clock)


def plan_by(
    problem: Problem,
    name: str,
    run: Solver | Callable[..., Solution],
    seconds: float,
    seed: int,
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """Like `make_plan`, by any function that is a solver."""
    check_limits(problem.limits, problem.mapping.vms)
    prepare(name)
    deadline = Deadline(seconds, clock)
    solution = run(problem, deadline, seed)
    goal = problem.objective.goal
    if solution.impossible:
        raise UsageError(
            f"goal {goal:g} is out of reach with at most {problem.limits.mnl} moves: proven; raise --mnl or the goal"
        )
    moves = moves_of(problem.mapping, solution.steps)
    report = checker.check(problem.mapping, moves, problem.objective, problem.limits)
    if report.violation:
        raise FabricpilotError(
            f"solver {name} made a plan that the checker refuses ({report.violation}): please report"
        )
    notes = solution.notes
    if goal is not None and report.worths[-1].fragment_rate > goal + 1e-9:
        notes += (f"the goal {goal:g} was not reached",)
    return Plan(
        moves=moves,
        initial=report.worths[0],
        final=report.worths[-1],
        prefixes=report.worths[1:],
        bound=solution.bound,
        solver=name,
        seconds=deadline.elapsed_s,
        mnl=problem.limits.mnl,
        seed=seed,
        objective=problem.objective.text,
        notes=notes,
    )


def prepare(name: str) -> None:
    """Load what a solver needs, so that its libraries' loading is no part of its time."""
    if name in COMPILED:
        warm_up()
    if name in POLICIES:
        from central.planner.learned import weights

        weights.load()
