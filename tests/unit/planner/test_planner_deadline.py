"""Deadlines, by a clock that only work advances: every solver ends in time, and `auto` is never behind.

The costs are those of clusters of a thousand PMs on a slow core, so they are hard on solvers that do not look at the
clock between two pieces of work. For the first test HiGHS uses all the time it is given, for the second what is usual.
"""

from contextlib import suppress
from dataclasses import replace

import pytest

from central.planner.generator import SHAPES, generate
from central.planner.learned import beam, rollout
from central.planner.learned.weights import warm_up as policy_ready
from central.planner.planning import make_plan, plan_by
from central.planner.solvers import columns, greedy, pricing, swap
from central.planner.solvers.greedy import Walk
from central.planner.solvers.program import Program
from central.planner.solvers.registry import SOLVERS, lanes_of
from central.planner.warm import warm_up
from fabricpilot.errors import UsageError

OVERRUN_S = 0.2


class WorkClock:
    """Seconds of work done so far."""

    def __init__(self):
        self.now_s = 0.0
        self.highs_s = float("inf")  # that HiGHS takes for an integer program, if it may
        self.patience = 1.0  # real seconds that HiGHS gets for one by this clock: more where its result matters
        self.policy_s = 0.015  # of the policy's step, per trajectory

    def __call__(self):
        return self.now_s

    def charge(self, monkeypatch, owner, name, cost):
        """From now on every call of owner.name takes cost(*args) seconds."""
        original = getattr(owner, name)

        def charged(*args, **kwargs):
            self.now_s += cost(*args, **kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, charged)


@pytest.fixture
def clock(monkeypatch):
    warm_up()  # not part of any plan
    policy_ready()
    made = WorkClock()
    made.charge(monkeypatch, Walk, "go", lambda *_: 0.001)
    made.charge(monkeypatch, Walk, "back", lambda *_: 0.001)
    for module in (greedy, swap):
        made.charge(monkeypatch, module, "best_move", lambda *_: 0.01)
    made.charge(monkeypatch, swap, "_best_swap", lambda *_: 0.05)
    made.charge(monkeypatch, pricing, "price_all", lambda pms, *_: 0.002 * len(pms))
    made.charge(monkeypatch, columns, "_solved", lambda solver, deadline, ties: min(0.02, deadline.left_s))
    solve = Program.solve
    monkeypatch.setattr(Program, "solve", lambda self, seconds, **how: solve(self, made.patience * seconds, **how))
    made.charge(monkeypatch, Program, "solve", lambda self, seconds, **_: min(seconds, made.highs_s))
    made.charge(monkeypatch, rollout, "_advance", lambda policy, tokens, paths, *_: made.policy_s * len(paths))
    made.charge(monkeypatch, beam, "_continuations", lambda policy, tokens, plans: 2 * made.policy_s * len(plans))
    return made


@pytest.fixture(scope="module")
def mapping():
    kind = replace(SHAPES["small"], pms=16, vms=110, affinity_sets=8, mem_gb_per_core=(2, 4), used_share=0.8)
    return generate(kind, 3)


LIMITS = {
    "none": {},
    "bytes": {"max_bytes": 150 * 2**30},
    "caps": {"per_pm": 1, "per_tenant": 2},
}


@pytest.mark.parametrize("seconds", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_ends_in_time(mapping, pose, clock, name, seconds):
    for objective, limits in (("fr", "caps"), ("multi", "bytes"), ("mixed", "none"), ("fr-goal:0.2", "none")):
        for lane, run in lanes_of(name):
            started = clock.now_s
            with suppress(UsageError):  # a goal may be proven to be out of reach
                plan_by(pose(mapping, 12, objective, **LIMITS[limits]), lane, run, seconds, 0, clock)
            assert clock.now_s - started <= seconds + OVERRUN_S, (objective, limits, lane)


def rates(problem, clock, names, seconds):
    clock.highs_s, clock.policy_s, clock.patience = 0.25, 0.036, 3.0
    return {name: make_plan(problem, name, seconds, clock=clock).final.fragment_rate for name in names}


CELLS = [("fr", "none"), ("fr", "caps"), ("fr", "bytes"), ("mixed", "none"), ("multi", "none"), ("multi", "bytes")]


@pytest.mark.parametrize(
    ("seconds", "objective", "limits"),
    [
        (1.0, *CELLS[0]),
        (0.3, *CELLS[-1]),
        *(pytest.param(1.0, *cell, marks=pytest.mark.slow) for cell in CELLS[1:]),
        *(pytest.param(2.0, *cell, marks=pytest.mark.slow) for cell in CELLS),
    ],
)
def test_auto_is_never_behind_any_solver(mapping, pose, clock, objective, limits, seconds):
    problem = pose(mapping, 12, objective, **LIMITS[limits])
    found = rates(problem, clock, SOLVERS, seconds)
    assert found["auto"] <= min(found.values()) + 1e-9, found
