"""Schemes that never learn: thresholds from the configuration or from a table, the baselines of every comparison."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from central.policy.base import Decision, GroupSummary
from fabricpilot.levels import Thresholds
from fabricpilot.published import published

# Least attained service with K levels: as far apart by ratio, over the sizes at which flows of most workloads differ.
_LAS_BYTES = (10_000, 10_000_000)


@dataclass(frozen=True)
class FixedPolicy:
    """The same thresholds for every group with as many levels."""

    thresholds: Thresholds
    name: str = "mlfq"

    def decide(self, summary: GroupSummary) -> Decision:
        """The configured thresholds, once."""
        if summary.levels != self.thresholds.levels:
            return Decision(None, f"policy.thresholds are for {self.thresholds.levels} levels, not {summary.levels}")
        if summary.thresholds == self.thresholds:
            return Decision(None, "in force")
        return Decision(self.thresholds, "fixed by configuration")


@dataclass(frozen=True)
class TablePolicy:
    """What a table says for K, once: `thresholds_of` maps K to thresholds."""

    name: str
    thresholds_of: Callable[[int], Thresholds]

    def decide(self, summary: GroupSummary) -> Decision:
        """The table's thresholds; a `UsageError` of the table where it has none for K."""
        wanted = self.thresholds_of(summary.levels)
        return Decision(None, "in force") if summary.thresholds == wanted else Decision(wanted, f"fixed: {self.name}")


@dataclass(frozen=True)
class PublishedPolicy:
    """PIAS's published thresholds of a workload, for the load that is nearest when the first decision falls."""

    workload: str
    min_flows: int
    name: str = "pias-published"

    def decide(self, summary: GroupSummary) -> Decision:
        """The published thresholds, once the load is known; a `UsageError` where none are published for K."""
        if summary.thresholds is not None and summary.thresholds.levels == summary.levels:
            return Decision(None, "in force")
        if summary.flows < self.min_flows:
            return Decision(None, f"{summary.flows:.0f} finished flows in the window, {self.min_flows} are needed")
        found = published(self.workload, summary.levels, summary.load)
        return Decision(found.thresholds, f"{found.source}: {self.workload}, nearest to load {summary.load:.2f}")


def log_spaced(levels: int) -> Thresholds:
    """Thresholds of K levels whose ratios are equal: least attained service as well as K levels can do it."""
    low, high = _LAS_BYTES
    return Thresholds.of(round(float(value)) for value in np.geomspace(low, high, levels + 1)[1:-1])


def websearch_at_80(levels: int) -> Thresholds:
    """AuTO's baselines QLAS and QSJF: thresholds for web search at load 0.8, whatever the traffic is."""
    return published("websearch", levels, 0.8).thresholds
