"""From a problem to a plan that may be shown: run a solver, or several side by side, and report the best checked plan.

No plan leaves here that the independent checker has not replayed.
"""

import os
import time
from collections.abc import Callable, Sequence

from central.planner.judge import Judge, check
from central.planner.model.plan import Plan
from central.planner.model.problem import Deadline, Problem, Solution, check_limits
from central.planner.race import Run, race
from central.planner.solvers.registry import lanes_of
from central.planner.warm import warm_up
from fabricpilot.errors import FabricpilotError, UsageError

MAKE_ROOM = "make-room"
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
    return _plan(problem, name, lanes_of(name), seconds, seed, clock)


def plan_by(
    problem: Problem,
    name: str,
    run: Run,
    seconds: float,
    seed: int,
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """Like `make_plan`, by any function that is a solver."""
    return _plan(problem, name, [(name, run)], seconds, seed, clock)


def _plan(
    problem: Problem,
    name: str,
    lanes: Sequence[tuple[str, Run]],
    seconds: float,
    seed: int,
    clock: Callable[[], float],
) -> Plan:
    check_limits(problem.limits, problem.mapping.vms)
    if not any(pm.active for pm in problem.mapping.pms):
        count = len(problem.mapping.pms)
        raise UsageError(
            f"{problem.mapping.name or 'the mapping'} has {f'{count} PMs, none of them' if count else 'no PM that is'} "
            "ACTIVE: there is nothing to plan on"
        )
    if name != MAKE_ROOM and not _movable(problem):
        lanes = [(name, _stay)]
    prepare(name)
    if name == "auto":
        from central.planner.solvers.portfolio import specialist

        prepare(specialist(problem, seconds) or name)
    looked = clock()
    judge = Judge(problem)
    begun = clock()
    if clock is time.monotonic:
        race(problem, lanes[: len(os.sched_getaffinity(0))], seconds, seed, judge, begun - looked)
    else:
        _in_turn(problem, lanes, Deadline(seconds, clock), seed, judge)
    goal = problem.objective.goal
    if judge.impossible:
        raise UsageError(
            f"goal {goal:g} is out of reach with at most {problem.limits.mnl} moves: proven; raise --mnl or the goal"
        )
    if not judge.heard and name == MAKE_ROOM:
        raise FabricpilotError(f"whether room can be made was not settled in {seconds:g} s; raise --deadline")
    best = judge.best
    notes = best.notes
    if not judge.heard:
        notes += (f"nothing was found in {seconds:g} s; raise --deadline",)
    if goal is not None and best.worths[-1].fragment_rate > goal + 1e-9:
        notes += (f"the goal {goal:g} was not reached",)
    return Plan(
        moves=best.moves,
        initial=best.worths[0],
        final=best.worths[-1],
        prefixes=best.worths[1:],
        bound=judge.bound,
        solver=name,
        seconds=clock() - begun,
        mnl=problem.limits.mnl,
        seed=seed,
        objective=problem.objective.text,
        notes=notes,
    )


def _in_turn(problem: Problem, lanes: Sequence[tuple[str, Run]], deadline: Deadline, seed: int, judge: Judge) -> None:
    """Like `race` by a clock of one's own, by which each lane has all the time."""
    for lane, run in lanes:
        solution = run(problem, Deadline(deadline.seconds, deadline.clock), seed)
        judge.impossible = solution.impossible
        judge.hear(check(problem, solution, lane), final=len(lanes) == 1)
        if solution.proven or solution.impossible:
            return


def _movable(problem: Problem) -> bool:
    """Whether any VM may move at all."""
    pms, fixed = problem.mapping.pms, problem.limits.fixed
    return any(vm.movable and pms[vm.pm].active and i not in fixed for i, vm in enumerate(problem.mapping.vms))


def _stay(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """The solver for clusters in which nothing can move."""
    return Solution(notes=("no VM may move, so this is the best there is",), proven=True)


def prepare(name: str) -> None:
    """Load what a solver needs, so that its libraries' loading is no part of its time."""
    if name in COMPILED:
        warm_up()
    if name in POLICIES:
        from central.planner.learned.weights import warm_up as policy_ready

        policy_ready()
