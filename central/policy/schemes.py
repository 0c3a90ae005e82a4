"""Every scheme by name: one table for `simulate --scheme`, `central run --scheme` and `testbed run`.

A scheme is three things: what a switch port does, what flows are ranked by, and what chooses the thresholds.

    simulator   ranks and ports of its own schemes in `simulator.schemes`; the others it finds here (`simulated`)
    central     `policy_of`: the ThresholdPolicy that `[policy] scheme` names
    testbed     `testbed.schemes`: puts port, agents and senders into place

A new scheme is one entry of `SCHEMES`; its policy imports what it needs when it is made, so that central stays light.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from central.policy.base import ThresholdPolicy
from central.policy.fixed import FixedPolicy, PublishedPolicy, TablePolicy, log_spaced, websearch_at_80
from fabricpilot.config import PolicySection
from fabricpilot.errors import UsageError
from fabricpilot.levels import DEFAULT_LEVELS, MAX_LEVELS, Thresholds, default_thresholds
from simulator.schemes import NAMES as SIMULATED

Port = Literal["fifo", "marked", "fair-queues", "bands"]
Rank = Literal["default", "sent", "written", "hinted"]
PolicyFactory = Callable[[PolicySection], ThresholdPolicy]


@dataclass(frozen=True)
class Scheme:
    """What a name stands for.

    Attributes:
        text: one line for people.
        port: what a switch port does: one drop-tail queue, one ECN-marked queue with DCTCP over it, a queue per flow,
            or strict bands by DSCP.
        rank: what agents rank flows by: bytes sent, bytes written, the size that senders hint at, or what
            `datapath.mode` is by default; None: there are no agents.
        policy: makes what chooses the thresholds; None: there is nothing to choose.
        adapts: the thresholds follow what hosts report.
        levels: K on the testbed.
        on_network: how packets differ from what the simulator does under this name; empty: in nothing.
        refusal: why no network can run it; empty: it can.
    """

    text: str
    port: Port = "bands"
    rank: Rank | None = "sent"
    policy: PolicyFactory | None = None
    adapts: bool = False
    levels: int = DEFAULT_LEVELS
    on_network: str = ""
    refusal: str = ""

    @property
    def described(self) -> str:
        """The line about it, with what is different on a network."""
        notes = (("on a network: ", self.on_network), ("not on a network: ", self.refusal))
        return "; ".join([self.text, *(intro + note for intro, note in notes if note)])


def policy_of(section: PolicySection) -> ThresholdPolicy:
    """The policy that `[policy] scheme` names.

    Raises:
        UsageError: no such scheme, one that has no thresholds, or thresholds that are none.
    """
    name = section.scheme
    policy = find(name).policy
    if policy is None:
        choosing = ", ".join(other for other, scheme in SCHEMES.items() if scheme.policy is not None)
        raise UsageError(f"policy.scheme = '{name}' has no thresholds for central to choose; give one of: {choosing}")
    return policy(section)


def find(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        UsageError: there is none; names all.
    """
    if name not in SCHEMES:
        raise UsageError(f"scheme '{name}' is unknown; choose from: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _configured_or(name: str, thresholds_of: Callable[[int], Thresholds]) -> PolicyFactory:
    """`policy.thresholds` where they are given, else what the table says for K."""

    def make(section: PolicySection) -> ThresholdPolicy:
        if section.thresholds:
            return FixedPolicy(Thresholds.of(section.thresholds), name)
        return TablePolicy(name, thresholds_of)

    return make


def _pias(name: str, *, mismatched: bool) -> PolicyFactory:
    def make(section: PolicySection) -> ThresholdPolicy:
        if section.thresholds:
            return FixedPolicy(Thresholds.of(section.thresholds), name)
        other = {"websearch": "datamining", "datamining": "websearch"}[section.workload]
        return PublishedPolicy(other if mismatched else section.workload, section.min_flows, name)

    return make


def _equal_split(section: PolicySection) -> ThresholdPolicy:
    from central.policy.equal_split import EqualSplitPolicy

    return EqualSplitPolicy(section.min_flows)


def _optimiser(section: PolicySection) -> ThresholdPolicy:
    from central.policy.optimiser import OptimiserPolicy

    return OptimiserPolicy(section.objective, section.min_flows, section.min_gain)


def _srla(section: PolicySection) -> ThresholdPolicy:
    from central.srla.policy import SrlaPolicy

    return SrlaPolicy.load(min_flows=section.min_flows)


def _auto(section: PolicySection) -> ThresholdPolicy:
    from central.srla import weights
    from central.srla.policy import SrlaPolicy

    return SrlaPolicy.load(weights.AUTO, section.min_flows)


_WRITTEN = "ranked by bytes written (docs/backlog.md), not by what remains, which costs real TCP more than it brings"

SCHEMES: dict[str, Scheme] = {
    "fair": Scheme(SIMULATED["fair"], "marked", None),
    "fifo": Scheme(SIMULATED["fifo"], "fifo", None),
    "fq": Scheme(SIMULATED["fq"], "fair-queues", None),
    "fcfs": Scheme(
        SIMULATED["fcfs"], "fifo", None, refusal="switches serve packets, not whole flows; 'fifo' is nearest"
    ),
    "mlfq": Scheme(SIMULATED["mlfq"], policy=_configured_or("mlfq", default_thresholds)),
    "qlas": Scheme(SIMULATED["qlas"], policy=_configured_or("qlas", websearch_at_80)),
    "qsjf": Scheme(
        SIMULATED["qsjf"],
        rank="hinted",
        policy=_configured_or("qsjf", websearch_at_80),
        on_network="senders say the size of each flow by setsockopt",
    ),
    "pias-published": Scheme(SIMULATED["pias-published"], policy=_pias("pias-published", mismatched=False)),
    "pias-mismatched": Scheme(
        "mlfq with the published thresholds of the other workload (web search, data mining)",
        policy=_pias("pias-mismatched", mismatched=True),
    ),
    "equal-split": Scheme(SIMULATED["equal-split"], policy=_equal_split, adapts=True),
    "backlog": Scheme(
        SIMULATED["backlog"], rank="written", policy=_configured_or("backlog", default_thresholds), on_network=_WRITTEN
    ),
    "written": Scheme(SIMULATED["written"], rank="written", policy=_configured_or("written", default_thresholds)),
    "las": Scheme(
        SIMULATED["las"],
        policy=_configured_or("las", log_spaced),
        levels=MAX_LEVELS,
        on_network=f"{MAX_LEVELS} levels with thresholds at equal ratios: switches have no more",
    ),
    "srpt": Scheme(
        SIMULATED["srpt"],
        "fifo",
        None,
        refusal="it needs a switch with as many priorities as there are sizes; 'qsjf' (sizes by hints) is nearest",
    ),
    "optimiser": Scheme(
        "mlfq with the thresholds that minimise the mean response time of the sizes reported",
        policy=_optimiser,
        adapts=True,
    ),
    "auto": Scheme("mlfq with the thresholds of AuTO's DDPG as published, trained here", policy=_auto, adapts=True),
    "srla": Scheme("mlfq with the thresholds of the trained sRLA (DDPG)", policy=_srla, adapts=True),
    "fabricpilot": Scheme(
        "as shipped: thresholds by the optimiser, flows ranked as datapath.mode is by default",
        rank="default",
        policy=_optimiser,
        adapts=True,
    ),
    "fabricpilot-backlog": Scheme(
        "thresholds by the optimiser, flows ranked by bytes written", rank="written", policy=_optimiser, adapts=True
    ),
}
