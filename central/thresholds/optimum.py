"""What every optimiser of thresholds returns, and the objectives they share."""

import math
from dataclasses import dataclass

from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds

OBJECTIVES = {
    "fct": "mean completion time, in bytes the link sends meanwhile (divide by its rate for seconds)",
    "slowdown": "mean of completion time over the time of the same flow alone",
    "tail": "root mean square over all flows of the mean slowdown of their size, which the most delayed sizes dominate",
}

RANKINGS = {
    "attained": "by bytes sent",
    "backlog": "by bytes sent and those that wait in the send buffer",
    "size": "by the size, known in advance",
}

MAX_LOAD = (
    0.99  # what `usable_load` lets through: beyond it response times say more about the estimate than the traffic
)


@dataclass(frozen=True)
class Optimum:
    """Thresholds and what they are worth by the criterion they were chosen for.

    Attributes:
        thresholds: K-1 byte counts, strictly ascending.
        mean: value of the objective under `thresholds`; unit as in `OBJECTIVES`. NaN where infeasible.
        processor_sharing: the same with one level only (fair sharing), for comparison.
        objective: a key of `OBJECTIVES`.
        method: exact, mm1, search, equal-split or published.
        load: the load the thresholds are for.
        seconds: time the optimiser took.
        note: what a reader must know of this result; empty if nothing.
        visible_bytes: what a level sees of a flow beyond the bytes it has sent, as in `visible_bytes`.
        turns: flows of the last level are served one at a time.
    """

    thresholds: Thresholds
    mean: float
    processor_sharing: float
    objective: str
    method: str
    load: float
    seconds: float
    note: str = ""
    visible_bytes: float = 0.0
    turns: bool = False

    @property
    def gain(self) -> float:
        """Share by which `mean` is below `processor_sharing`."""
        return 1 - self.mean / self.processor_sharing


def check_load(load: float) -> None:
    """Raise `UsageError` unless 0 < load < 1: at 1 and beyond no mean response time exists."""
    if not (math.isfinite(load) and 0 < load < 1):
        raise UsageError(f"load = {load}; thresholds are optimised for a load above 0 and below 1, for example 0.8")


def check_objective(objective: str) -> None:
    """Raise `UsageError` unless `objective` is a key of `OBJECTIVES`."""
    if objective not in OBJECTIVES:
        raise UsageError(f"objective '{objective}' is unknown; choose one of {', '.join(OBJECTIVES)}")


def visible_bytes(ranking: str, send_buffer_bytes: float) -> float:
    """What a level sees of a flow beyond the bytes it has sent: the parameter in which the rankings differ.

    Raises:
        UsageError: the ranking is not a key of `RANKINGS`, or the send buffer is not above 0.
    """
    if ranking not in RANKINGS:
        raise UsageError(f"ranking '{ranking}' is unknown; choose one of {', '.join(RANKINGS)}")
    if not (math.isfinite(send_buffer_bytes) and send_buffer_bytes > 0):
        raise UsageError(f"send buffer of {send_buffer_bytes:g} bytes; it must be above 0")
    return {"attained": 0.0, "backlog": send_buffer_bytes, "size": math.inf}[ranking]


def usable_load(measured: float) -> float:
    """A measured load brought into what the optimisers take: 0.01 to `MAX_LOAD`; not a number counts as 0.01."""
    return min(max(measured, 0.01), MAX_LOAD) if math.isfinite(measured) else (MAX_LOAD if measured > 0 else 0.01)


def ascending(values: list[float]) -> Thresholds:
    """Whole-byte thresholds nearest to `values` (ascending) that are positive and strictly ascending."""
    whole: list[int] = []
    for value in values:
        whole.append(max(round(value), whole[-1] + 1 if whole else 1))
    return Thresholds.of(whole)
