"""Trained sRLA as a scheme like any other: thresholds from what a group reported, with no noise and no learning."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from central.policy.base import Decision, GroupSummary
from central.srla import weights
from central.srla.ddpg import Ddpg
from central.srla.encoding import Encoding, mask_of
from fabricpilot.levels import Thresholds

_SAME = 0.05  # thresholds that all lie nearer than this share to those in force are no change worth making


@dataclass(frozen=True, eq=False)
class SrlaPolicy:
    """The actor of `weights`; `SrlaPolicy.load(weights.AUTO)` is AuTO as published.

    Attributes:
        agent: the trained networks.
        encoding: how they see and act.
        min_flows: finished flows in the window below which nothing is decided.
        name: what configuration and status call it.
    """

    agent: Ddpg
    encoding: Encoding
    min_flows: int = 200
    name: str = "srla"

    @classmethod
    def load(cls, path: Path = weights.DEFAULT, min_flows: int = 200) -> "SrlaPolicy":
        """The policy of a weights file.

        Raises:
            UsageError: as `weights.load`.
        """
        agent, encoding, _ = weights.load(path)
        return cls(agent, encoding, min_flows, "auto" if encoding.kind == "paper" else "srla")

    def thresholds(self, summary: GroupSummary) -> Thresholds:
        """What the actor says for these sizes, load, K, link rate, thresholds in force and outcome.

        Raises:
            UsageError: no flow sizes.
        """
        base = self.encoding.base_for(summary)
        state = self.encoding.state_of(summary, base)
        action = self.agent.act(state[None], mask_of(summary.levels)[None])[0]
        return self.encoding.thresholds_at(base, action)

    def decide(self, summary: GroupSummary) -> Decision:
        """The actor's thresholds, if they differ from those in force."""
        if summary.flows < self.min_flows:
            return Decision(None, f"{summary.flows:.0f} finished flows in the window, {self.min_flows} are needed")
        chosen = self.thresholds(summary)
        if alike(chosen, summary.thresholds):
            return Decision(None, f"in force, within {_SAME:.0%}")
        return Decision(chosen, f"learned, for {summary.flows:.0f} flows at load {summary.load:.2f}")


def alike(one: Thresholds, other: Thresholds | None) -> bool:
    """Whether no threshold differs by more than 5 %."""
    if other is None or other.levels != one.levels:
        return False
    return bool(np.abs(np.log(np.array(one.bytes) / np.array(other.bytes))).max() <= np.log1p(_SAME))
