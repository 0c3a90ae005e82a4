"""The rule of thumb as a policy: as many of the reported flows in each level (PIAS, section 6)."""

from dataclasses import dataclass

from central.policy.base import Decision, GroupSummary
from simulator.schemes import equal_split
from simulator.workloads.distribution import SizeDistribution

_MOVED = 0.1  # share by which a threshold must have moved: estimates from some hundred flows wander by themselves


@dataclass(frozen=True)
class EqualSplitPolicy:
    """Quantiles k/K of the sizes just reported.

    Attributes:
        min_flows: finished flows in the window below which nothing is decided.
    """

    min_flows: int = 200
    name: str = "equal-split"

    def decide(self, summary: GroupSummary) -> Decision:
        """The quantiles, if one of them is clearly elsewhere than the threshold in force."""
        if summary.flows < self.min_flows:
            return Decision(None, f"{summary.flows:.0f} finished flows in the window, {self.min_flows} are needed")
        wanted = equal_split(SizeDistribution.from_histogram(summary.sizes, summary.group), summary.levels)
        now = summary.thresholds
        if now is not None and now.levels == wanted.levels:
            moved = max(abs(new / old - 1) for new, old in zip(wanted.bytes, now.bytes, strict=True))
            if moved < _MOVED:
                return Decision(None, f"no quantile moved by {_MOVED:.0%}")
        return Decision(wanted, f"equal shares of {summary.flows:.0f} flows")
