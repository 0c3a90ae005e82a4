"""A simulated leaf-spine fabric whose long flows a scheme schedules, as central does: schemes meet and learn here.

Hosts send Poisson traffic all to all. Flows follow K levels by bytes sent and take a route by hash. Once a flow has
sent as much as the last threshold central is told of it: at the next tick the scheme is asked, and again every
`renew_s`. What it is shown is what central knows: the route only of flows that it gave one, what remains only as far as
the send buffer showed it when the flow was told of. One run is a generator of `Tick`s, so that learning sees every
decision and its cost. Which flows count as long in results does not depend on when central is told.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from central.lrla.flow_set import MAX_PRIORITIES, UNKNOWN_ROUTE, Bools, Choice, FlowSet, Ints, LongFlowScheme
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds, default_thresholds
from simulator.engine import Simulation
from simulator.longflows import on_links, told, traffic
from simulator.results import ActiveFlows, FlowResults
from simulator.schemes import scheme
from simulator.topology import Topology, leaf_spine
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.trace import Trace

# Central is told of flows from 500 KB on, and the two lowest levels are its own: by themselves flows pass the third for
# the length of a byte.
EARLY = (135_134, 499_999, 500_000)


@dataclass(frozen=True)
class Lab:
    """One kind of fabric and traffic.

    Attributes:
        cdf: flow sizes.
        load: of every host's link.
        leaves: racks.
        spines: routes between racks.
        hosts_per_leaf: hosts of a rack.
        oversubscription: of the racks' uplinks.
        rate_bps: of a host's link.
        thresholds: of the K levels, bytes.
        long_bytes: larger flows are long in results and costs.
        traffic_s: how long flows arrive; then all of them end.
        warm_up_s: flows that start before are not counted.
        tick_s: how soon a flow that has become long is decided on, at most.
        renew_s: time between two decisions on the same flow.
        delay_s: from the decision until it is in force.
        send_buffer_bytes: how much of what remains is seen.
    """

    cdf: str = "websearch_dctcp_bytes_trafficgenerator"
    load: float = 0.5
    leaves: int = 4
    spines: int = 2
    hosts_per_leaf: int = 4
    oversubscription: float = 2.0
    rate_bps: float = 1e9
    thresholds: tuple[int, ...] = default_thresholds(4).bytes
    long_bytes: float = 10e6
    traffic_s: float = 12.0
    warm_up_s: float = 2.0
    tick_s: float = 0.01
    renew_s: float = 1.0
    delay_s: float = 0.005
    send_buffer_bytes: float = 4e6

    @property
    def levels(self) -> int:
        """K."""
        return len(self.thresholds) + 1

    @property
    def hosts(self) -> int:
        """All of them."""
        return self.leaves * self.hosts_per_leaf

    def topology(self) -> Topology:
        """The fabric."""
        return leaf_spine(self.leaves, self.spines, self.hosts_per_leaf, self.rate_bps, self.oversubscription)

    def trace(self, seed: int) -> Trace:
        """The flows of one run.

        Raises:
            UsageError: there are none.
        """
        kind = SizeDistribution.load(self.cdf), self.load, self.topology(), self.rate_bps
        made = traffic(*kind, 0.0, self.traffic_s, np.random.default_rng(seed))
        if made is None:
            raise UsageError(f"no flow arrives in {self.traffic_s:g} s at load {self.load:g}; choose a longer time")
        return made


@dataclass(frozen=True)
class Tick:
    """One moment of a run.

    Attributes:
        flows: those that central was told of, as the scheme saw them.
        asked: rows it was asked for.
        choice: what it decided for them.
        ended: flows that ended since the tick before.
        ended_long: the long ones of them.
        long: long flows under way.
        short: short flows under way.
        spread: most less fewest flows that central knows of over the uplinks of a rack, mean over racks.
    """

    flows: FlowSet
    asked: Ints
    choice: Choice
    ended: FlowResults
    ended_long: FlowResults
    long: int
    short: int
    spread: float


@runtime_checkable
class Watcher(Protocol):
    """A scheme that wants to know of ended flows too; one object per run."""

    def watch(self, ended: FlowResults) -> None:
        """These flows, long ones, have ended since the tick before."""


def ticks(lab: Lab, chooser: LongFlowScheme, seed: int) -> Iterator[Tick]:
    """Run once: until the last flow has ended."""
    topology = lab.topology()
    ranks = scheme("mlfq", thresholds=Thresholds.of(lab.thresholds))
    simulation = Simulation(ranks, topology, control_delay_s=lab.delay_s)
    trace = lab.trace(seed)
    simulation.add(trace)
    memory = _Memory(len(trace))
    left, now_s = len(trace), 0.0
    while left:
        now_s += lab.tick_s
        ended = simulation.run_until(now_s)
        left -= len(ended)
        ended_long = ended.rows(np.flatnonzero(ended.size_bytes > lab.long_bytes))
        if isinstance(chooser, Watcher):
            chooser.watch(ended_long)
        active = simulation.active()
        known = told(active, lab.thresholds[-1])
        flows, due = memory.seen(lab, topology, active, known, now_s)
        choice = Choice(np.zeros(0, np.int64), np.zeros(0, np.int64))
        if len(due):
            choice = chooser.decide(flows, due)
            memory.decided(active.flow[known][due], choice, now_s)
            _give(simulation, lab, active.flow[known][due], choice)
        up = on_links(topology, active.host[known], active.destination[known], active.route[known])[0]
        spread = float((up.max(axis=1) - up.min(axis=1)).mean())
        long = int((active.attained_bytes + active.remaining_bytes > lab.long_bytes).sum())
        yield Tick(flows, due, choice, ended, ended_long, long, len(active.flow) - long, spread)


def _give(simulation: Simulation, lab: Lab, flow: Ints, choice: Choice) -> None:
    """These flows get their verdicts."""
    rates_bps = [None] * len(flow) if choice.rate is None else (choice.rate * lab.rate_bps).tolist()
    columns = flow.tolist(), choice.priority.tolist(), choice.route.tolist(), rates_bps
    for number, priority, route, rate_bps in zip(*columns, strict=True):
        level = lab.levels - 1 - priority
        simulation.set_verdict(number, level, None if route == UNKNOWN_ROUTE else route, rate_bps)


class _Memory:
    """What central remembers of each flow of a run, by flow number."""

    def __init__(self, flows: int) -> None:
        self._known_end = np.full(flows, np.nan)
        self._route = np.full(flows, UNKNOWN_ROUTE)
        self._priority = np.zeros(flows, np.int64)
        self._decided_s = np.full(flows, -np.inf)
        self._met = np.zeros(flows, np.bool_)

    def seen(
        self, lab: Lab, topology: Topology, active: ActiveFlows, known: Bools, now_s: float
    ) -> tuple[FlowSet, Ints]:
        """The flows that central was told of, as it knows them, and the rows that need a decision."""
        flow, sent = active.flow[known], active.attained_bytes[known]
        new = ~self._met[flow]
        shown = np.minimum(active.remaining_bytes[known], lab.send_buffer_bytes)
        self._known_end[flow[new]] = sent[new] + shown[new]
        self._met[flow] = True
        left = self._known_end[flow] - sent
        flows = FlowSet(
            source=active.host[known],
            destination=active.destination[known],
            source_rack=topology.leaf[active.host[known]],
            destination_rack=topology.leaf[active.destination[known]],
            attained_bytes=sent,
            known_bytes=np.where(left > 0, left, np.nan),
            age_s=now_s - active.start_s[known],
            route=self._route[flow],
            priority=self._priority[flow],
            migration=np.zeros(len(flow), np.bool_),
            usable=np.ones((len(flow), topology.routes), np.bool_),
            priorities=np.full(len(flow), min(lab.levels, MAX_PRIORITIES)),
            hosts=topology.hosts,
            racks=topology.leaves,
            rate_bps=lab.rate_bps,
        )
        due: Ints = np.flatnonzero(self._decided_s[flow] <= now_s - lab.renew_s)
        return flows, due

    def decided(self, flow: Ints, choice: Choice, now_s: float) -> None:
        """These flows have a verdict."""
        self._route[flow], self._priority[flow], self._decided_s[flow] = choice.route, choice.priority, now_s


@dataclass(frozen=True)
class Outcome:
    """What a run came to; times in microseconds."""

    long_fct_us: float
    long_flows: int
    short_fct_us: float
    all_fct_us: float
    spread: float  # mean over time
    held: float  # share of the decisions that held a flow to a rate


def run(lab: Lab, chooser: LongFlowScheme, seed: int) -> Outcome:
    """One run to its end."""
    ended, spreads = [], []
    decided = held = 0
    for tick in ticks(lab, chooser, seed):
        ended.append(tick.ended)
        if len(tick.flows):
            spreads.append(tick.spread)
        decided += len(tick.asked)
        if tick.choice.rate is not None:
            held += int(np.isfinite(tick.choice.rate).sum())
    results = FlowResults.joined(ended)
    counted = results.start_s >= lab.warm_up_s
    long = counted & (results.size_bytes > lab.long_bytes)
    short = counted & ~long
    return Outcome(
        long_fct_us=float(results.fct_s[long].mean()) * 1e6,
        long_flows=int(long.sum()),
        short_fct_us=float(results.fct_s[short].mean()) * 1e6,
        all_fct_us=float(results.fct_s[counted].mean()) * 1e6,
        spread=float(np.mean(spreads)),
        held=held / max(decided, 1),
    )
