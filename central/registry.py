"""Who is there and what they reported: hosts, their groups, and the summary of a group that a policy decides on.

Where it sits: the daemon hands every Hello and Report in, with the time; every interval it takes a `GroupSummary` per
group and K out. No socket, no clock and no thread in here. A host is described by a fixed number of bytes, whatever it
reports, and weighs in its group's estimates within bounds (`windows.py`).
"""

import math
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from central.outcomes import Experience, Experienced, experienced, outcome_of
from central.policy.base import SAMPLE_FLOWS, GroupSummary, Outcome
from central.windows import ForgettingWindow, influence, running_counts, size_distribution
from fabricpilot.config import parse_rate
from fabricpilot.histogram import BINS, LogHistogram
from fabricpilot.levels import MAX_LEVELS, MIN_LEVELS, Thresholds
from fabricpilot.wire import FlowSummary, Hello, Report

# Reports count payload; a link also carries Ethernet preamble, gap, headers: 1538 bytes for 1448 of payload.
WIRE_OVERHEAD = 1538 / 1448

# Load when no host knows its link's rate. Thresholds matter little where load is low, so assume it is not.
ASSUMED_LOAD = 0.8
LEAST_LOAD, MOST_LOAD = 0.05, 0.95  # estimates beyond say more about the estimate than about the traffic

MISSED_REPORTS = 3  # a host is lost after so many of its own intervals, or `host_timeout_s` if that is longer
FORGET_AFTER_S = 3600.0

_NS_PER_S = 1e9


@dataclass(slots=True)
class Host:
    """One host, as its last messages describe it. Times are monotonic seconds."""

    name: str
    peer: bytes  # the connection it spoke on last
    hello: Hello
    seen_s: float
    sizes: ForgettingWindow
    experience: Experience
    running: dict[int, int] = field(default_factory=dict)  # long flows by attained size, {bin: count}
    lost: bool = False
    reports: int = 0
    sequence: int = 0  # of its last report; 0: none yet
    missed: int = 0  # reports that never came
    restarts: int = 0  # times its sequence began again
    interval_s: float = 1.0
    sent_bps: float = 0.0  # payload, faded over the window
    epoch: int = 0  # of the policy in force there
    reissued: tuple[int, "InForce"] | None = (
        None  # policy sent with an epoch of its own, instead of that with epoch [0]
    )
    settled: bool = False  # it was the same at the report before: what the last one tells came of it
    active: int = 0
    long: int = 0
    usable_routes: list[int] = field(default_factory=list)  # that lead somewhere, by its last report
    told_s: float = -math.inf  # when central last sent it anything
    cluster: int = 0  # part of its group that it was found to belong to; 0: the group is not divided

    @property
    def group(self) -> str:
        """Whose policy it gets: the group it says, or a part of that."""
        return f"{self.hello.group}/{self.cluster}" if self.cluster else self.hello.group


@dataclass
class InForce:
    """The thresholds that central sent to a group's hosts with one K."""

    thresholds: Thresholds
    epoch: int
    reason: str
    since: float  # Unix seconds


@dataclass(frozen=True)
class OnTrial:
    """The thresholds that some hosts have instead, for a while."""

    policy: InForce
    hosts: frozenset[str]


@dataclass
class Group:
    """Hosts that get the same thresholds but for trials; where they differ in K, each K has its own."""

    name: str
    durations: ForgettingWindow
    sample: deque[FlowSummary] = field(default_factory=lambda: deque(maxlen=SAMPLE_FLOWS))  # finished short flows
    sampled: int = SAMPLE_FLOWS  # at most so many of one host between two decisions, so that each has its part
    given: Counter[str] = field(default_factory=Counter)  # how many each host gave since the last one
    in_force: dict[int, InForce] = field(default_factory=dict)  # K -> policy
    on_trial: dict[int, OnTrial] = field(default_factory=dict)  # K -> policy of the hosts on trial


class Registry:
    """All hosts and groups.

    Args:
        window_s: how much of the past counts (exponential forgetting).
        host_timeout_s: silence after which a host is lost.
        shared_rate: bottleneck that the hosts of a group share, for example "10Gbit"; empty: each host's own link.
        turns: long flows take turns, so the last level is for those that wait.
    """

    def __init__(self, window_s: float, host_timeout_s: float, shared_rate: str = "", *, turns: bool = False) -> None:
        self.hosts: dict[str, Host] = {}
        self.groups: dict[str, Group] = {}
        self._window_s = window_s
        self._timeout_s = host_timeout_s
        self._turns = turns
        self._shared_bps = parse_rate(shared_rate) if shared_rate else 0

    def hello(self, name: str, peer: bytes, hello: Hello, now_s: float) -> Host | None:
        """A host introduces itself; None if what it says of itself is impossible (its number of levels)."""
        if not MIN_LEVELS <= hello.levels <= MAX_LEVELS:
            return None
        host = self.hosts.get(name)
        if host is None:
            host = Host(name, peer, hello, now_s, ForgettingWindow(self._window_s), Experience(self._window_s))
            self.hosts[name] = host
        if hello.group != host.hello.group:
            host.cluster = 0
        host.peer, host.hello, host.seen_s, host.lost, host.epoch = peer, hello, now_s, False, hello.epoch
        self._enter_group(host)
        return host

    def report(self, name: str, peer: bytes, report: Report, now_s: float) -> Host | None:
        """A host's report; None if it has not introduced itself."""
        host = self.hosts.get(name)
        if host is None:
            return None
        self._count_sequence(host, report.sequence)
        interval_s = max(report.interval_ns / _NS_PER_S, 0.01)
        self._fade_rate(host, report.sent_bytes * 8 / interval_s, interval_s)
        host.interval_s = min(interval_s, 60.0)
        host.peer, host.seen_s, host.lost = peer, now_s, False
        host.reports += 1
        host.settled = report.epoch == host.epoch
        if not host.settled:  # what came of the thresholds before says nothing of these
            host.experience = Experience(self._window_s)
        host.epoch, host.active, host.long = report.epoch, report.active, report.long
        host.usable_routes = report.usable_routes
        host.sizes.add(report.sizes, now_s)
        host.running = running_counts([flow.size_bytes for flow in report.long_flows], report.long)
        group = self.groups[host.group]
        group.durations.add(report.durations, now_s)
        if host.settled:
            host.experience.add(self.experienced(host, report), now_s)
        self._sample(group, host, report)
        return host

    def move(self, host: Host, cluster: int) -> None:
        """Put a host into another part of its group."""
        host.cluster = cluster
        self._enter_group(host)

    def experienced(self, host: Host, report: Report) -> Experienced:
        """What the flows of the report's sample experienced."""
        return experienced(report.finished_sample, self._rate_bps(host))

    def shared_policy_of(self, host: Host) -> InForce | None:
        """What the host is to have now; None before the first decision for its group."""
        group, levels = self.groups[host.group], host.hello.levels
        on_trial = group.on_trial.get(levels)
        if on_trial is not None and host.name in on_trial.hosts:
            return on_trial.policy
        return group.in_force.get(levels)

    def policy_of(self, host: Host) -> InForce | None:
        """The same as it was sent to this host: maybe with an epoch of its own."""
        policy = self.shared_policy_of(host)
        if policy is not None and host.reissued is not None and host.reissued[0] == policy.epoch:
            return host.reissued[1]
        return policy

    def follows(self, host: Host) -> bool:
        """Whether the host's last report tells what came of what it is to have."""
        policy = self.policy_of(host)
        return host.settled and policy is not None and host.epoch == policy.epoch

    def sweep(self, now_s: float) -> list[Host]:
        """Hosts that are lost since the last call. Those lost for long are forgotten, and groups without hosts."""
        lost = []
        for host in list(self.hosts.values()):
            silent_s = now_s - host.seen_s
            if silent_s > FORGET_AFTER_S:
                del self.hosts[host.name]
            elif not host.lost and silent_s > max(self._timeout_s, MISSED_REPORTS * host.interval_s):
                host.lost = True
                lost.append(host)
        groups = {host.group for host in self.hosts.values()}
        for name in [name for name in self.groups if name not in groups]:
            del self.groups[name]
        return lost

    def members(self, group: str, levels: int) -> list[Host]:
        """Hosts of a group with K = `levels` that are not lost."""
        return [
            host
            for host in self.hosts.values()
            if host.group == group and host.hello.levels == levels and not host.lost
        ]

    def by_configured_group(self) -> dict[str, list[Host]]:
        """Hosts that are not lost, by the group they say."""
        present: dict[str, list[Host]] = defaultdict(list)
        for host in self.hosts.values():
            if not host.lost:
                present[host.hello.group].append(host)
        return present

    def summaries(self, now_s: float, group: str = "") -> Iterator[GroupSummary]:
        """One summary per group and K. Sizes and load are the whole group's: K does not shape the traffic.

        Args:
            now_s: monotonic time.
            group: the only one wanted; empty: all.
        """
        present: dict[str, list[Host]] = defaultdict(list)
        for host in self.hosts.values():
            if not host.lost and group in ("", host.group):
                present[host.group].append(host)
        for name, hosts in sorted(present.items()):
            known = self.groups[name]
            known.sampled = max(1, SAMPLE_FLOWS // len(hosts))
            known.given.clear()
            flows, sizes = self._sizes(hosts, now_s)
            load = self.load(hosts)
            for levels in sorted({host.hello.levels for host in hosts}):
                in_force = known.in_force.get(levels)
                same_levels = [host for host in hosts if host.hello.levels == levels]
                yield GroupSummary(
                    group=name,
                    levels=levels,
                    hosts=len(same_levels),
                    flows=flows,
                    load=load,
                    sizes=sizes,
                    thresholds=in_force.thresholds if in_force else None,
                    link_rate_bps=statistics.median(map(self._rate_bps, hosts)),
                    outcome=self._outcome(same_levels, in_force, now_s),
                    sample=tuple(known.sample),
                    visible_bytes=statistics.median_low(host.hello.visible_bytes for host in same_levels),
                    turns=self._turns,
                )

    def on_trial(self, summary: GroupSummary, now_s: float) -> GroupSummary | None:
        """The same of the hosts on trial: the challenger's thresholds, and what came of them; None without a trial."""
        trial = self.groups[summary.group].on_trial.get(summary.levels)
        if trial is None:
            return None
        hosts = [host for host in self.members(summary.group, summary.levels) if host.name in trial.hosts]
        return replace(
            summary,
            hosts=len(hosts),
            thresholds=trial.policy.thresholds,
            outcome=self._outcome(hosts, trial.policy, now_s),
        )

    def load(self, hosts: list[Host]) -> float:
        """Offered load of these hosts' bottleneck, a share of its rate, bounded to `LEAST_LOAD`..`MOST_LOAD`.

        What was sent stands for what was offered, which holds while the link is not full all the time. Without a
        shared rate it is the mean over the hosts that send, each against its own link.
        """
        if self._shared_bps:
            load = sum(host.sent_bps for host in hosts) * WIRE_OVERHEAD / self._shared_bps
        else:
            own = [
                min(1.0, host.sent_bps * WIRE_OVERHEAD / host.hello.link_rate_bps)
                for host in hosts
                if host.hello.link_rate_bps and host.sent_bps > 0
            ]
            load = sum(own) / len(own) if own else ASSUMED_LOAD
        return min(max(load, LEAST_LOAD), MOST_LOAD)

    def _enter_group(self, host: Host) -> None:
        if host.group not in self.groups:
            self.groups[host.group] = Group(host.group, ForgettingWindow(self._window_s))

    def _rate_bps(self, host: Host) -> float:
        """Of the narrowest link that the host's flows are known to share; 0: unknown."""
        known = [rate for rate in (host.hello.link_rate_bps, self._shared_bps) if rate]
        return min(known, default=0)

    def _sample(self, group: Group, host: Host, report: Report) -> None:
        """Keep short flows of the report, which were drawn without preference."""
        in_force = group.in_force.get(host.hello.levels)
        last_bytes = in_force.thresholds.bytes[-1] if in_force else math.inf
        short = [flow for flow in report.finished_sample if flow.size_bytes < last_bytes]
        taken = short[: max(0, group.sampled - group.given[host.name])]
        group.given[host.name] += len(taken)
        group.sample.extend(taken)

    def _outcome(self, hosts: list[Host], policy: InForce | None, now_s: float) -> Outcome | None:
        """What came of a policy on those of these hosts that follow it; of whatever they have if there is none."""
        if policy is not None:
            hosts = [host for host in hosts if self.follows(host) and self.shared_policy_of(host) is policy]
        return outcome_of([host.experience for host in hosts], now_s)

    def _sizes(self, hosts: list[Host], now_s: float) -> tuple[float, LogHistogram]:
        """Finished flows in the window, and the distribution of the sizes of all."""
        finished = np.array([host.sizes.at(now_s) for host in hosts]).reshape(-1, BINS)
        # One weight for both: running flows of a single host must not outweigh what all have finished.
        weights = influence(finished.sum(axis=1) + [float(sum(host.running.values())) for host in hosts])
        joined = weights @ finished
        running = np.zeros(BINS)
        for host, weight in zip(hosts, weights, strict=True):
            for index, count in host.running.items():
                running[index] += weight * count
        return float(joined.sum()), size_distribution(joined, running)

    def _count_sequence(self, host: Host, sequence: int) -> None:
        if host.sequence and sequence > host.sequence:
            host.missed += sequence - host.sequence - 1
        elif host.sequence:
            host.restarts += 1
        host.sequence = sequence

    def _fade_rate(self, host: Host, sent_bps: float, interval_s: float) -> None:
        """Move the rate towards the last interval's; nobody sends faster than the link."""
        if host.hello.link_rate_bps:
            sent_bps = min(sent_bps, host.hello.link_rate_bps)
        share = 1.0 if host.reports == 0 else -math.expm1(-interval_s / self._window_s)
        host.sent_bps += share * (sent_bps - host.sent_bps)
