"""Solvers in processes of their own: what they post is kept, where they hang does not matter, what they break is told.

Where a solver hangs it hangs for an hour, so that a test that ends at all has passed.
"""

import os
import time
from dataclasses import replace

import pytest

from central.planner.judge import Judge, check
from central.planner.model.plan import Place
from central.planner.model.problem import Solution, Step
from central.planner.planning import MAKE_ROOM, plan_by
from central.planner.race import _NICE, race, settle
from fabricpilot.errors import FabricpilotError, UsageError

SOON_S = 0.3
LATER_S = 3000.0
GOOD = Solution((Step(0, Place(1, (0,))),))  # one move that makes a slot
POOR = Solution((Step(1, Place(1, (0,))),))
BAD = Solution((Step(3, Place(0, (0,))),))  # it does not fit


@pytest.fixture
def problem(build, pose):
    return pose(build([[20], [20]], [(0, {0: 4}), (0, {0: 2}), (0, {0: 2}), (1, {0: 14})]), 2)


def hang():
    time.sleep(LATER_S)


def test_what_was_posted_before_a_solver_hangs_is_the_plan(problem):
    def solver(problem, deadline, seed):
        deadline.board.post(POOR)
        deadline.board.post(Solution(GOOD.steps, bound=0.125))
        deadline.board.post(POOR)
        hang()

    plan = plan_by(problem, "exact", solver, SOON_S, 0)
    assert [move.vm for move in plan.moves] == [0]
    assert plan.bound == 0.125


def test_a_solver_that_finds_nothing_in_time_changes_nothing(problem):
    def solver(problem, deadline, seed):
        hang()

    plan = plan_by(problem, "pop", solver, SOON_S, 0)
    assert not plan.moves
    assert "nothing was found" in plan.notes[-1]
    with pytest.raises(FabricpilotError, match="not settled"):
        plan_by(problem, MAKE_ROOM, solver, SOON_S, 0)


def test_the_solvers_last_word_stands(problem):
    """With one lane it may have reasons that the objective does not know, as making room has."""

    def solver(problem, deadline, seed):
        deadline.board.post(GOOD)
        return POOR

    assert [move.vm for move in plan_by(problem, "replan", solver, LATER_S, 0).moves] == [1]


def test_the_better_of_two_lanes_wins_whoever_comes_last(problem):
    def first(problem, deadline, seed):
        while deadline.board.latest() != GOOD.steps:  # told of the other lane's plan
            time.sleep(0.01)
        return POOR

    def second(problem, deadline, seed):
        deadline.board.post(GOOD)
        while not deadline.over:
            time.sleep(0.01)
        return Solution()

    judge = Judge(problem)
    race(problem, [("first", first), ("second", second)], 5.0, 0, judge, 0.0)
    assert judge.best.steps == GOOD.steps
    assert judge.best.solver == "second"


def test_lanes_after_the_first_give_way(problem):
    def first(problem, deadline, seed):
        return Solution(bound=os.nice(0) / 100)

    for lanes, nice in (([("only", first)], 0), ([("idle", lambda *_: Solution()), ("second", first)], _NICE)):
        judge = Judge(problem)
        race(problem, lanes, LATER_S, 0, judge, 0.0)
        assert judge.bound == pytest.approx(min(19, os.nice(0) + nice) / 100)


def test_a_proof_ends_the_race(problem):
    def quick(problem, deadline, seed):
        return Solution(GOOD.steps, proven=True)

    def slow(problem, deadline, seed):
        hang()

    judge = Judge(problem)
    race(problem, [("slow", slow), ("quick", quick)], LATER_S, 0, judge, 0.0)
    assert judge.heard == 1
    assert judge.best.steps == GOOD.steps
    settle()  # returns: the slow one was ended


def test_what_a_lane_raises_is_raised(problem):
    def solver(problem, deadline, seed):
        raise UsageError("no such thing")

    with pytest.raises(UsageError, match="no such thing"):
        plan_by(problem, "exact", solver, LATER_S, 0)


@pytest.mark.parametrize("final", [True, False])
def test_no_unchecked_plan_leaves(problem, final):
    def solver(problem, deadline, seed):
        if not final:
            deadline.board.post(BAD)
            hang()
        return BAD

    with pytest.raises(FabricpilotError, match="the checker refuses"):
        plan_by(problem, "exact", solver, LATER_S, 0)


def test_a_process_that_dies_is_told_unless_there_is_a_plan(problem):
    def dies(problem, deadline, seed):
        os._exit(9)

    def posts_and_dies(problem, deadline, seed):
        deadline.board.post(GOOD)
        os._exit(9)

    with pytest.raises(FabricpilotError, match="its process died"):
        plan_by(problem, "exact", dies, LATER_S, 0)
    assert len(plan_by(problem, "exact", posts_and_dies, LATER_S, 0).moves) == 1


@pytest.mark.parametrize(("cost_per_gb", "kept"), [(0.0, 0), (0.01, 1)])
def test_the_judge_counts_what_copying_costs(build, pose, cost_per_gb, kept):
    """Either VM's move makes one slot; what was heard first stays, unless the other one is cheaper to copy."""
    problem = pose(build([[30], [30]], [(0, {0: 10}), (0, {0: 8}), (1, {0: 16})]), 2)
    problem = replace(problem, objective=replace(problem.objective, cost_per_gb=cost_per_gb))
    judge = Judge(problem)
    for vm in (0, 1, 0):
        judge.hear(check(problem, Solution((Step(vm, Place(1, (0,))),)), "test"))
    assert [move.vm for move in judge.best.moves] == [kept]
