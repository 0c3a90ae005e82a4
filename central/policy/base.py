"""One interface for every scheme that chooses thresholds: what it is told of a group, and what it answers.

Fixed thresholds, the optimiser and learned policies all get a `GroupSummary` and answer with a `Decision`, so that
central runs any of them and comparisons run them side by side. None keeps a socket or a clock: they run in central's
worker process. A `Learner` only proposes; the guard decides what hosts get.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds
from fabricpilot.wire import FlowSummary

SAMPLE_FLOWS = 100  # of a group's finished short flows; as many as AuTO's state holds


@dataclass(frozen=True)
class Outcome:
    """What finished flows lately experienced. One host moves these numbers within bounds only (`central/outcomes.py`).

    Completion times are the hosts' (first to last packet, plus the base latency that a sender does not see).

    Attributes:
        flows: finished flows behind the numbers (faded ones count in part).
        shares: of the flows per size bucket (`simulator.statistics.BUCKETS`), shape (5,); sums to 1.
        slowdown: mean slowdown per bucket, shape (5,); 0 where no flow finished.
        mean_fct_s: mean completion time.
        mean_slowdown: mean of completion time over the time of the same flow alone on the host's link.
        p99_slowdown: its 99th percentile.
    """

    flows: float
    shares: tuple[float, ...]
    slowdown: tuple[float, ...]
    mean_fct_s: float
    mean_slowdown: float
    p99_slowdown: float


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
        link_rate_bps: of the bottleneck: what the hosts share, or the median host's own link; 0: unknown.
        outcome: what flows experienced under `thresholds`; None before any finished.
        sample: the latest finished short flows, at most `SAMPLE_FLOWS`, oldest first.
        visible_bytes: what hosts' ranking sees of a flow beyond the bytes it has sent (the send buffer); 0: they rank
            by bytes sent alone. Of the median host.
        turns: flows of the last level are served one at a time (`long_flows.scheme = "in-turn"`).
    """

    group: str
    levels: int
    hosts: int
    flows: float
    load: float
    sizes: LogHistogram
    thresholds: Thresholds | None
    link_rate_bps: float = 0.0
    outcome: Outcome | None = None
    sample: tuple[FlowSummary, ...] = ()
    visible_bytes: float = 0.0
    turns: bool = False


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


@dataclass(frozen=True)
class LearnStats:
    """How learning goes, for `central status`.

    Attributes:
        transitions: learned from so far.
        updates: gradient steps so far.
        reward: of the latest transition; None before the first.
        noise: standard deviation of the exploration noise now, in units of the action.
    """

    transitions: int
    updates: int
    reward: float | None
    noise: float


class ThresholdPolicy(Protocol):
    """A scheme that chooses thresholds."""

    @property
    def name(self) -> str:
        """What the configuration and the status call it."""

    def decide(self, summary: GroupSummary) -> Decision:
        """The thresholds for a group."""


class Learner(Protocol):
    """A scheme that proposes thresholds and learns from what came of them.

    It is constructed with the `PolicySection` alone, in the worker process. All groups share one learner; the order of
    calls in a round is `learn` and then `propose`, group by group. Whatever it raises, and whatever it proposes, the
    guard keeps from the hosts.
    """

    @property
    def name(self) -> str:
        """What the status calls it."""

    def propose(self, summary: GroupSummary) -> Decision:
        """Thresholds worth a trial; `summary.thresholds` is what the hosts use now."""

    def learn(self, summary: GroupSummary) -> LearnStats:
        """One observation: hosts of this group used `summary.thresholds`, and `summary.outcome` came of it.

        During a trial this is called twice, for the hosts that try the challenger and for the others; `thresholds`
        tells which. The same group's observations come in the order of time.
        """

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to go on exactly, as one file at `path`."""

    def load(self, path: Path) -> None:
        """Go on where `save` left off.

        Raises:
            UsageError: no checkpoint of this learner.
        """
