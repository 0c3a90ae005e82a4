"""Rewards as pure functions of the flows that ended in a step; larger is better.

`KINDS` names those of the threshold environment. Flows of different steps differ in size, so all but the paper's own
are relative to what the same flows would take alone.
"""

from collections.abc import Callable

import numpy as np

from simulator.results import FlowResults, p99


def ratio(before: float, now: float, cap: float) -> float:
    """AuTO's form: the objective of the step before over this one's (smaller objectives are better), at most `cap`.

    Above 1 the step was better than the one before. 1 where either is missing (0 or less).
    """
    return min(before / now, cap) if before > 0 and now > 0 else 1.0


def mean_fct(results: FlowResults) -> float:
    """Minus the log of mean FCT over the mean FCT of the same flows alone; 0 at best."""
    return -float(np.log(results.fct_s.mean() / results.ideal_s.mean())) if len(results) else 0.0


def mean_slowdown(results: FlowResults) -> float:
    """Minus the log of the mean slowdown; 0 at best."""
    return -float(np.log(results.slowdown.mean())) if len(results) else 0.0


def p99_slowdown(results: FlowResults) -> float:
    """Minus the log of the 99th percentile of slowdown; 0 at best."""
    return -float(np.log(p99(results.slowdown))) if len(results) else 0.0


KINDS: dict[str, Callable[[FlowResults], float]] = {
    "mean_fct": mean_fct,
    "slowdown": mean_slowdown,
    "p99": p99_slowdown,
}
