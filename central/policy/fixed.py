"""The scheme that never learns: thresholds from the configuration, the baseline of every comparison."""

from dataclasses import dataclass

from central.policy.base import Decision, GroupSummary
from fabricpilot.levels import Thresholds


@dataclass(frozen=True)
class FixedPolicy:
    """The same thresholds for every group with as many levels."""

    thresholds: Thresholds
    name: str = "fixed"

    def decide(self, summary: GroupSummary) -> Decision:
        """The configured thresholds, once."""
        if summary.levels != self.thresholds.levels:
            return Decision(None, f"policy.thresholds are for {self.thresholds.levels} levels, not {summary.levels}")
        if summary.thresholds == self.thresholds:
            return Decision(None, "in force")
        return Decision(self.thresholds, "fixed by configuration")
