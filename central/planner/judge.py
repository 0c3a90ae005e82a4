"""The judge: every plan is replayed by the checker before anybody sees it, and the best is kept.

A solver's process checks what it hands in itself, by `check`, so that the process that waits for it has nothing to do;
`Judge` compares what was checked. Better is: with a goal, reached, and then with fewer moves; else the lower objective
(what copying costs included), then fewer moves. The best only ever gets better; at first it is the plan without moves.
"""

from dataclasses import dataclass

from central.planner import checker
from central.planner.model.plan import Move, Worth, copied_mb
from central.planner.model.problem import Problem, Solution, Step
from central.planner.solvers.batches import moves_of
from fabricpilot.errors import FabricpilotError


@dataclass(frozen=True)
class Checked:
    """A plan that the checker has replayed. `worths[0]` is before the first move; `merit` grows with the plan."""

    steps: tuple[Step, ...]
    moves: tuple[Move, ...]
    worths: tuple[Worth, ...]
    merit: tuple[float, float, float]
    solver: str
    bound: float | None = None
    notes: tuple[str, ...] = ()


class Judge:
    """The best plan heard of, and the best bound.

    Attributes:
        best: the plan without moves until another one is heard.
        heard: how many have been.
        bound: a proven lower bound on the objective, None if nobody has one.
        impossible: somebody has proven that the goal is out of reach.
    """

    def __init__(self, problem: Problem) -> None:
        self._by_rate = problem.objective.goal is None and not problem.objective.cost_per_gb
        self.best = check(problem, Solution(), "none")
        self.heard = 0
        self.bound: float | None = None
        self.impossible = False

    def hear(self, plan: Checked, *, final: bool = False) -> None:
        """Keep the plan if it is the best; `final`: whatever it is worth."""
        if plan.bound is not None:
            self.bound = plan.bound if self.bound is None else max(self.bound, plan.bound)
        self.heard += 1
        if final or self.heard == 1 or plan.merit > self.best.merit:
            self.best = plan

    def met(self) -> bool:
        """Whether no plan can be better than the best one, by the bound."""
        return self._by_rate and self.bound is not None and self.best.worths[-1].fragment_rate <= self.bound + 1e-9


def check(problem: Problem, solution: Solution, solver: str) -> Checked:
    """Replay a solution.

    Raises:
        FabricpilotError: the checker refuses it: a bug, never shown as a plan.
    """
    moves = moves_of(problem.mapping, solution.steps)
    report = checker.check(problem.mapping, moves, problem.objective, problem.limits)
    if report.violation:
        raise FabricpilotError(
            f"solver {solver} made a plan that the checker refuses ({report.violation}): please report"
        )
    merit = _merit(problem, moves, report.worths[-1])
    return Checked(solution.steps, moves, report.worths, merit, solver, solution.bound, solution.notes)


def _merit(problem: Problem, moves: tuple[Move, ...], worth: Worth) -> tuple[float, float, float]:
    rate, objective = worth.fragment_rate, problem.objective
    if objective.goal is not None and rate <= objective.goal + 1e-9:
        return 1.0, -float(len(moves)), -round(rate, 9)
    cost = 0.0
    if objective.cost_per_gb:
        cost = objective.cost_per_gb * copied_mb(problem.mapping, moves) / 1024 * _rate_per_slot(problem)
    return 0.0, -round(rate + cost, 9), -float(len(moves))


def _rate_per_slot(problem: Problem) -> float:
    """What one slot of the first term takes off the objective."""
    mapping, term = problem.mapping, problem.objective.terms[0]
    free_cores = free_mem_mb = 0
    for pm in mapping.pms:
        if pm.active:
            free_cores += sum(node.cores for node in pm.nodes)
            free_mem_mb += sum(node.mem_mb for node in pm.nodes)
    for vm in mapping.vms:
        if mapping.pms[vm.pm].active:
            free_cores -= vm.cores
            free_mem_mb -= vm.mem_mb
    share = term.cores / max(1, free_cores) if term.cores else term.mem_mb / max(1, free_mem_mb)
    return term.weight * term.nodes * share
