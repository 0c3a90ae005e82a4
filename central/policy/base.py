"""One interface for every scheme that chooses thresholds: what it is told of a group, and what it answers.

Fixed thresholds, the optimiser and learned policies all implement `ThresholdPolicy`, so that central runs any of them
and comparisons run them side by side. A policy keeps no socket and no clock: it maps a summary to a decision, in
central's worker process.
"""

from dataclasses import dataclass
from typing import Protocol

from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds


@dataclass(frozen=True)
class GroupSummary:
    """What the hosts of one group, with the same K, reported lately.

    Attributes:
        group: its name.
        levels: K.
        hosts: how many report.
        flows: finished flows in the window (faded ones count in part).
        load: offered load, a share of the link's rate; bounded to sane values.
        sizes: shape of the flow-size distribution, bytes; its total is no number of flows.
        thresholds: in force, as central sent them; None before its first decision.
    """

    group: str
    levels: int
    hosts: int
    flows: float
    load: float
    sizes: LogHistogram
    thresholds: Thresholds | None


@dataclass(frozen=True)
class Decision:
    """What to do, and why.

    Attributes:
        thresholds: to use from now on; None: leave them as they are.
        reason: one line for the log and for `central status`.
        gain: share by which the objective is predicted to fall; None if not predicted.
    """

    thresholds: Thresholds | None
    reason: str
    gain: float | None = None


class ThresholdPolicy(Protocol):
    """A scheme that chooses thresholds."""

    @property
    def name(self) -> str:
        """What the configuration and the status call it."""

    def decide(self, summary: GroupSummary) -> Decision:
        """The thresholds for a group."""
