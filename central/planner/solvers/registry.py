"""The solvers by name. Each is imported only when it is asked for: some bring heavy libraries."""

from collections.abc import Callable
from importlib import import_module

from central.planner.model.problem import Deadline, Problem, Solution
from fabricpilot.errors import UsageError

Solver = Callable[[Problem, Deadline, int], Solution]

BESIDE = "beside auto"  # what `auto` runs on a second core

# name: (module below central.planner, function, one line for --help)
SOLVERS = {
    "auto": ("solvers.portfolio", "auto", "anytime portfolio: the best checked plan of all under the deadline"),
    "exact": ("solvers.exact", "exact", "optimum with proof: column generation by PM, or the grouped integer program"),
    "greedy": ("solvers.greedy", "greedy", "filter-and-score: the best single move, again and again"),
    "swap": ("solvers.swap", "swap", "greedy that gathers fragments, swaps VMs and prepares"),
    "packing": ("solvers.packing", "packing", "vector bin packing by alignment"),
    "learned": ("learned.solver", "learned", "two-stage policy, several trajectories, the best is deployed"),
    "lns": ("solvers.neighbourhood", "neighbourhood", "large-neighbourhood search, every VM a variable of its own"),
    "beam": ("learned.beam", "beam", "beam search guided by the policy"),
    "guided": ("learned.guided", "guided", "large-neighbourhood search on the PMs that the policy picks"),
    "pop": ("solvers.pop", "pop", "random partitions, each solved exactly"),
}


def solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in SOLVERS:
        raise UsageError(f"solver {name!r} is unknown: expected one of {', '.join(SOLVERS)}")
    module, function, _ = SOLVERS[name]
    found: Solver = getattr(import_module(f"central.planner.{module}"), function)
    return found


def lanes_of(name: str) -> list[tuple[str, Solver]]:
    """What runs side by side for the solver of that name, the most important first.

    Raises:
        UsageError: there is none.
    """
    lanes = [(name, solver(name))]
    if name == "auto":
        beside: Solver = import_module("central.planner.solvers.portfolio").beside
        lanes.append((BESIDE, beside))
    return lanes
