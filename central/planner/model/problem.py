"""A planning problem: a mapping, an objective and limits; the clock it has; what a solver hands back.

A solver is a function `(Problem, Deadline, seed) -> Solution`. Its moves are in executable order, and are checked by
code that did not make them before anybody sees them. With the deadline comes a board: a solver leaves there what it has
so far, because it may be abandoned when its time is over, and finds there what others have found.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from central.planner.model.mapping import Mapping
from central.planner.model.objective import Objective
from central.planner.model.plan import Place
from fabricpilot.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """What a plan may do. None means no limit."""

    mnl: int  # moves in all, those through a spare place included
    max_bytes: int | None = None  # memory copied in all
    per_pm: int | None = None  # moves into or out of one PM, counted together
    per_tenant: int | None = None  # moves of one tenant's VMs
    fixed: frozenset[int] = frozenset()  # VMs that must stay: cool-down, or the operator's wish


@dataclass(frozen=True)
class Problem:
    """What is to be planned."""

    mapping: Mapping
    objective: Objective
    limits: Limits


@dataclass(frozen=True)
class Step:
    """One move as a solver proposes it: VM `vm` to `target`; where it comes from follows from the moves before."""

    vm: int
    target: Place


@dataclass(frozen=True)
class Solution:
    """Moves in executable order, and a proven lower bound on the objective if the solver has one."""

    steps: tuple[Step, ...] = ()
    bound: float | None = None
    notes: tuple[str, ...] = ()
    proven: bool = False  # no plan within the limits is better
    impossible: bool = False  # proven: no plan within the limits reaches the goal


class Board:
    """Where plans are left before a solver is done. This one is nobody's: what is left here is gone."""

    def post(self, solution: Solution) -> None:
        """Leave a plan that may be handed out if nothing better comes."""

    def sketch(self, steps: Sequence[Step]) -> None:
        """Leave the moves made so far; cheap enough to be called after every move."""

    def latest(self) -> tuple[Step, ...]:
        """The best plan that others have left since this was asked last; no moves if there is none."""
        return ()


@dataclass(frozen=True)
class Deadline:
    """A moment on the monotonic clock after which a solver must come back with what it has; the board until then."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    started: float = -1.0  # by that clock; now, if not given
    board: Board = field(default_factory=Board)

    def __post_init__(self) -> None:
        if self.started < 0.0:
            object.__setattr__(self, "started", self.clock())

    @property
    def left_s(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.seconds - self.elapsed_s)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    @property
    def over(self) -> bool:
        """Whether time is up."""
        return self.left_s <= 0.0

    def part(self, share: float) -> "Deadline":
        """A deadline that ends after `share` of what is left."""
        return Deadline(self.left_s * share, self.clock, board=self.board)


def check_limits(limits: Limits, vms: Sequence[object]) -> None:
    """Refuse limits nobody can mean.

    Raises:
        UsageError: a negative number.
    """
    for name, value in (
        ("--mnl", limits.mnl),
        ("--max-bytes", limits.max_bytes),
        ("--cap-per-pm", limits.per_pm),
        ("--cap-per-tenant", limits.per_tenant),
    ):
        if value is not None and value < 0:
            raise UsageError(f"{name} {value}: expected 0 or more")
    if any(vm >= len(vms) for vm in limits.fixed):
        raise UsageError("a VM that must stay is not in the mapping")
