"""A scenario made small enough for one machine: what of it stays, what is scaled, and its arrivals.

Groups, workloads, loads and their hours stay. One port stands for all ports of a group; the ports share the rate that
one machine carries; an hour lasts seconds; and the sizes of a group are scaled, all its hours by the same factor, so
that as many flows arrive per second as a generator on the same machine can start in time.

Seconds of a heavy-tailed distribution say little of its load. So an hour has exactly the flows that its load is worth,
at uniform times (Poisson arrivals, given their number), whose sizes are the means of as many equal slices of the
distribution; the seed draws times, order and senders.
"""

from dataclasses import dataclass, replace

import numpy as np

from fabricpilot.errors import UsageError
from simulator.arrays import Floats
from simulator.workloads.distribution import SizeDistribution
from testbed.flows.protocol import MIN_FLOW_BYTES
from testbed.flows.recorded import RecordedTrace
from testbed.netns.star import MAX_RECEIVERS
from testbed.scenarios.catalogue import Scenario

_RATE_BPS = 200_000_000  # of all ports: what namespaces of a small machine carry and leave it time for the rest
_FLOWS_PER_S = 200.0  # of all ports, in each group's busiest hour
_QUEUE_S = 0.01  # what a port buffers, as time on its link
_SENDERS = 4  # in all, at least two to a port
_DECISIONS = 6  # of central's per hour
_LEAST_HOUR_S = 2.0
_POINTS = 64  # of a slice of a distribution, to take its mean


@dataclass(frozen=True)
class SmallScenario:
    """A scenario as real hosts run it.

    Attributes:
        scenario: with one port per group, its rate, hours of seconds, and how often central decides.
        scales: factor on every flow size, by group.
    """

    scenario: Scenario
    scales: tuple[float, ...]

    @property
    def ports(self) -> int:
        """Receivers, one per group."""
        return len(self.scenario.groups)

    @property
    def senders(self) -> int:
        """Sending hosts; the one with number n belongs to group n modulo `ports`."""
        return max(_SENDERS, 2 * self.ports)

    @property
    def rate_bps(self) -> int:
        """Of a port."""
        return round(self.scenario.link_rate_bps)

    @property
    def buffer_bytes(self) -> int:
        """What a port queues."""
        return round(self.rate_bps / 8 * _QUEUE_S)

    @property
    def duration_s(self) -> float:
        """All hours."""
        return self.scenario.hours * self.scenario.hour_s

    def group_of(self, sender: int) -> int:
        """Number of the group that a sender belongs to."""
        return sender % self.ports


def small(scenario: Scenario, hour_s: float) -> SmallScenario:
    """The scenario with hours of `hour_s` seconds on one machine.

    Raises:
        UsageError: too many groups, or an hour too short.
    """
    ports = len(scenario.groups)
    if ports > MAX_RECEIVERS:
        raise UsageError(f"scenario '{scenario.name}' has {ports} groups; the testbed has {MAX_RECEIVERS} ports")
    if not _LEAST_HOUR_S <= hour_s <= 3600:
        raise UsageError(f"an hour of {hour_s:g} s; on the testbed it lasts {_LEAST_HOUR_S:g} to 3600 s")
    groups = tuple(replace(group, ports=1) for group in scenario.groups)
    here = replace(
        scenario, groups=groups, hour_s=hour_s, interval_s=hour_s / _DECISIONS, link_rate_bps=_RATE_BPS / ports
    )
    scales = []
    for group in groups:
        flows_per_byte = max(hour.load / SizeDistribution.load(hour.workload).mean_bytes for hour in group.hours)
        scales.append(flows_per_byte * _RATE_BPS / 8 / _FLOWS_PER_S)
    return SmallScenario(here, tuple(scales))


def trace_of(small: SmallScenario, seed: int) -> RecordedTrace:
    """All flows of all groups and hours, in order of their start; the same seed gives the same."""
    starts, sizes, senders = [], [], []
    here = small.scenario
    for number, group in enumerate(here.groups):
        members = np.arange(number, small.senders, small.ports)
        for hour, now in enumerate(group.hours):
            random = np.random.default_rng((seed, number, hour))
            workload = SizeDistribution.load(now.workload)
            mean_bytes = workload.mean_bytes * small.scales[number]
            count = max(1, round(now.load * small.rate_bps / 8 * here.hour_s / mean_bytes))
            sizes.append(random.permutation(_slices(workload, count)) * small.scales[number])
            starts.append((hour + random.random(count)) * here.hour_s)
            senders.append(random.choice(members, count))
    start_ns = np.rint(np.concatenate(starts) * 1e9).astype(np.int64)
    size_bytes = np.maximum(np.rint(np.concatenate(sizes)).astype(np.int64), MIN_FLOW_BYTES)
    order = np.argsort(start_ns, kind="stable")
    return RecordedTrace(start_ns[order], size_bytes[order], np.concatenate(senders)[order])


def _slices(workload: SizeDistribution, count: int) -> Floats:
    """Mean sizes of `count` slices of equal probability, ascending, shape (count,)."""
    at = (np.arange(count * _POINTS) + 0.5) / (count * _POINTS)
    means: Floats = workload.quantile(at).reshape(count, _POINTS).mean(axis=1)
    return means
