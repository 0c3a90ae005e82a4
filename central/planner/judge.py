"""The judge: replays every plan that a solver hands in, and keeps the best.

What it keeps is checked already, so that a plan is ready at any moment: at first the one without moves. Better is: with
a goal, reached, and then with fewer moves; else the lower objective (what copying costs included), then fewer moves.
The best only ever gets better.
"""

import time
from dataclasses import dataclass

from central.planner import checker
from central.planner.model.plan import Move, copied_mb
from central.planner.model.problem import Problem, Solution, Step
from central.planner.solvers.batches import moves_of
from fabricpilot.errors import FabricpilotError


@dataclass(frozen=True)
class Checked:
    """A plan that the checker has replayed, and by which solver it is."""

    steps: tuple[Step, ...]
    moves: tuple[Move, ...]
    report: checker.Report
    notes: tuple[str, ...]
    solver: str


class Judge:
    """The best plan heard of, and the best bound.

    Attributes:
        best: the plan without moves until another one is heard.
        heard: how many have been.
        bound: a proven lower bound on the objective, None if nobody has one.
        cost_s: what the last check took.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.heard = 0
        self.bound: float | None = None
        begun = time.monotonic()
        self.best = self._check(Solution(), "none")
        self.cost_s = time.monotonic() - begun
        active = [pm.active for pm in problem.mapping.pms]
        free_cores = sum(node.cores for pm in problem.mapping.pms if pm.active for node in pm.nodes)
        free_cores -= sum(share.cores for vm in problem.mapping.vms if active[vm.pm] for share in vm.shares)
        free_mem = sum(node.mem_mb for pm in problem.mapping.pms if pm.active for node in pm.nodes)
        free_mem -= sum(share.mem_mb for vm in problem.mapping.vms if active[vm.pm] for share in vm.shares)
        term = problem.objective.terms[0]
        used = term.cores / max(1, free_cores) if term.cores else term.mem_mb / max(1, free_mem)
        self._per_mb = problem.objective.cost_per_gb / 1024 * term.weight * term.nodes * used

    def hear(self, solution: Solution, solver: str, *, final: bool = False) -> bool:
        """Check a plan and keep it if it is the best; `final`: keep it whatever it is worth. Whether it was kept.

        Raises:
            FabricpilotError: the checker refused it: a bug, never shown as a plan.
        """
        if solution.bound is not None:
            self.bound = solution.bound if self.bound is None else max(self.bound, solution.bound)
        begun = time.monotonic()
        checked = self._check(solution, solver)
        self.cost_s = time.monotonic() - begun
        self.heard += 1
        if not final and self.heard > 1 and self._merit(checked) <= self._merit(self.best):
            return False
        self.best = checked
        return True

    def _check(self, solution: Solution, solver: str) -> Checked:
        problem = self.problem
        moves = moves_of(problem.mapping, solution.steps)
        report = checker.check(problem.mapping, moves, problem.objective, problem.limits)
        if report.violation:
            raise FabricpilotError(
                f"solver {solver} made a plan that the checker refuses ({report.violation}): please report"
            )
        return Checked(tuple(solution.steps), moves, report, solution.notes, solver)

    def _merit(self, plan: Checked) -> tuple[float, float, float]:
        rate, goal = plan.report.worths[-1].fragment_rate, self.problem.objective.goal
        if goal is not None and rate <= goal + 1e-9:
            return 1.0, -float(len(plan.moves)), -round(rate, 9)
        cost = self._per_mb * copied_mb(self.problem.mapping, plan.moves)
        return 0.0, -round(rate + cost, 9), -float(len(plan.moves))

    def met(self) -> bool:
        """Whether no plan can be better than the best one, by the bound."""
        if self.bound is None or self.problem.objective.goal is not None or self._per_mb:
            return False
        return self.best.report.worths[-1].fragment_rate <= self.bound + 1e-9
