"""The scheme that computes: thresholds with the least mean response time for the sizes and load just reported.

It changes thresholds only where the model predicts a gain worth a change: every change re-ranks the flows under way,
and estimates from a window of some hundred flows wander by themselves. On a link that is full all the time it changes
nothing: there the offered load cannot be seen, and long flows that starve make the sizes look ever more alike.
"""

from dataclasses import dataclass

from central.policy.base import Decision, GroupSummary
from central.registry import MOST_LOAD
from central.thresholds.exact import evaluate, optimise
from central.thresholds.optimum import usable_load
from simulator.workloads.distribution import SizeDistribution


@dataclass(frozen=True)
class OptimiserPolicy:
    """The exact optimiser with hysteresis.

    Attributes:
        objective: what is minimised, a key of `central.thresholds.optimum.OBJECTIVES`.
        min_flows: finished flows in the window below which nothing is decided.
        min_gain: predicted share by which the objective must fall for a change.
    """

    objective: str = "fct"
    min_flows: int = 200
    min_gain: float = 0.01
    name: str = "optimiser"

    def decide(self, summary: GroupSummary) -> Decision:
        """The best thresholds for these sizes, if they are clearly better than those in force."""
        if summary.flows < self.min_flows:
            return Decision(None, f"{summary.flows:.0f} finished flows in the window, {self.min_flows} are needed")
        settled = summary.thresholds is not None and summary.thresholds.levels == summary.levels
        if settled and summary.load >= MOST_LOAD:
            return Decision(None, f"the link is full (load {MOST_LOAD:g} or more), so what is reported says little")
        sizes = SizeDistribution.from_histogram(summary.sizes, summary.group)
        load, visible = usable_load(summary.load), summary.visible_bytes
        best = optimise(sizes, load, summary.levels, self.objective, visible_bytes=visible, turns=summary.turns)
        basis = f"{summary.flows:.0f} flows at load {load:.2f}"
        if not settled or summary.thresholds is None:
            return Decision(best.thresholds, f"first for {basis}")
        now = evaluate(sizes, load, summary.thresholds, self.objective, visible_bytes=visible, turns=summary.turns)
        gain = 1 - best.mean / now
        if gain < self.min_gain:
            return Decision(None, f"{gain:.1%} to gain for {basis}, {self.min_gain:.1%} are worth a change", gain)
        return Decision(best.thresholds, f"{gain:.1%} better for {basis}", gain)
