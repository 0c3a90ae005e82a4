"""One congested port in simulation, and the report its host would send: what an agent counts, from simulated flows.

The traffic of a cell depends on the seed, the group and the port alone, so that all schemes meet the same flows.
"""

from dataclasses import dataclass

import numpy as np

from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds
from fabricpilot.wire import MAX_FINISHED_SAMPLE, MAX_LONG_FLOWS, FlowSummary, Hello, Report
from simulator.engine import Simulation
from simulator.results import ActiveFlows, FlowResults
from simulator.schemes import BACKLOG, WRITTEN, Scheme
from simulator.topology import star
from simulator.workloads.arrivals import poisson
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.placement import to_one
from testbed.scenarios.catalogue import PortGroup

HOSTS = 16  # senders and the receiver; AuTO's testbed had 32, PIAS's 16
_TCP = 6
_SERVICE_PORT = 5001


@dataclass(frozen=True)
class CellPlace:
    """Which port of which group, under which seed."""

    seed: int
    group: int
    port: int

    @property
    def name(self) -> str:
        """As the host that reports is called."""
        return f"g{self.group}p{self.port}"


class Cell:
    """A port with its senders under one scheme.

    Args:
        place: decides about all random draws.
        group: what arrives.
        hour_s: length of an hour.
        rate_bps: of the link.
        ranking: how flows are ranked.
    """

    def __init__(self, place: CellPlace, group: PortGroup, hour_s: float, rate_bps: float, ranking: Scheme) -> None:
        self.place = place
        self._group, self._hour_s, self._rate_bps = group, hour_s, rate_bps
        self._simulation = Simulation(ranking, star(HOSTS, rate_bps), receiver=0)
        self._rng = np.random.default_rng((place.seed, place.group, place.port))
        self._thresholds: Thresholds | None = None
        self._sequence = 0
        self._sent = 0.0  # payload bytes that had left by the last report

    def begin_hour(self, hour: int) -> None:
        """Add the flows that arrive in this hour (0, 1, ...)."""
        now = self._group.hours[hour]
        sizes = SizeDistribution.load(now.workload)
        flows = poisson(sizes, now.load, self._rate_bps, self._rng, duration_s=self._hour_s, overload=True)
        self._simulation.add(to_one(flows.shifted(hour * self._hour_s), HOSTS, self._rng))

    def run_until(self, time_s: float) -> FlowResults:
        """Flows that end by then."""
        return self._simulation.run_until(time_s)

    def set_thresholds(self, thresholds: Thresholds) -> None:
        """New thresholds at all senders of this port."""
        self._thresholds = thresholds
        self._simulation.set_thresholds(thresholds)

    def hello(self, levels: int) -> Hello:
        """How this port's host introduces itself."""
        group = f"{self.place.group}-{self._group.name}"
        ranking = self._simulation.scheme
        return Hello(
            host=self.place.name,
            group=group,
            levels=levels,
            backend="simulated",
            queues="simulated",
            link_rate_bps=int(self._rate_bps),
            epoch=0,
            thresholds=list(self._thresholds.bytes) if self._thresholds else [],
            version="",
            visible_bytes=round(ranking.send_buffer_bytes) if ranking.basis in (BACKLOG, WRITTEN) else 0,
        )

    def report(self, ended: FlowResults, interval_s: float) -> Report:
        """What an agent says of an interval in which these flows ended."""
        active = self._simulation.active()
        last = self._thresholds.bytes[-1] if self._thresholds else 0
        long = np.flatnonzero(active.attained_bytes >= last)
        long = long[np.argsort(-active.attained_bytes[long], kind="stable")]
        still = float(active.attained_bytes.sum())
        sent = still + float(ended.size_bytes.sum()) - self._sent
        self._sent = still
        self._sequence += 1
        sample = range(max(len(ended) - MAX_FINISHED_SAMPLE, 0), len(ended))
        return Report(
            host=self.place.name,
            sequence=self._sequence,
            interval_ns=int(interval_s * 1e9),
            epoch=0,
            sent_bytes=max(int(sent), 0),
            sizes=LogHistogram.of(ended.size_bytes).sparse(),
            durations=LogHistogram.of(ended.fct_s * 1e6).sparse(),
            finished=len(ended),
            finished_sample=[self._finished(ended, i) for i in sample],
            long=len(long),
            long_flows=[self._running(active, int(i)) for i in long[:MAX_LONG_FLOWS]],
            active=len(active.flow),
            counters={},
        )

    def _finished(self, ended: FlowResults, i: int) -> FlowSummary:
        size = int(ended.size_bytes[i])
        return self._summary(int(ended.host[i]), int(ended.flow[i]), size, float(ended.fct_s[i]), size)

    def _running(self, active: ActiveFlows, i: int) -> FlowSummary:
        age_s = self._simulation.now_s - float(active.start_s[i])
        sent = int(active.attained_bytes[i])
        return self._summary(int(active.host[i]), int(active.flow[i]), sent, age_s, sent)

    def _summary(self, host: int, flow: int, size_bytes: int, duration_s: float, attained: int) -> FlowSummary:
        return FlowSummary(
            source=f"10.{self.place.group}.{self.place.port}.{host + 1}",
            destination=f"10.{self.place.group}.{self.place.port}.1",
            source_port=32_768 + flow * 7919 % 28_232,  # as a kernel draws ephemeral ports: of no meaning
            destination_port=_SERVICE_PORT,
            protocol=_TCP,
            size_bytes=size_bytes,
            duration_us=round(duration_s * 1e6),
            level=self._thresholds.level_of(attained) if self._thresholds else 0,
        )
