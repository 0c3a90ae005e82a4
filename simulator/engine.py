"""The engine: flows in, time forward, finished flows out, and decisions that take effect on the way.

    sim = Simulation(scheme("mlfq"), star(16, 1e9), receiver=0)
    sim.add(trace)
    finished = sim.run_until(10.0)          # flows that ended by then
    sim.set_thresholds(Thresholds.of(...))  # in force `control_delay_s` later
    finished = sim.run()                    # to the end

It picks the kernel (`star` where all flows go to one receiver, else `fabric`), feeds it, splits time where a decision
comes into force, and turns the fluid's times into completion times (`physics`). Nothing here is random: a run depends
on its inputs only.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from simulator import kernels
from simulator.arrays import ACTIVE, HOPS, NEXT, ONE_LINK, Arrivals, Finished, Ints, Rule
from simulator.kernels import FabricKernel, Kernel, StarKernel
from simulator.physics import Physics, completion_s, ideal_s
from simulator.results import ActiveFlows, FlowResults
from simulator.schemes import FIRST_COME, REMAINING, SHARED, SHORTEST, Scheme, fine_thresholds
from simulator.sharing import MAX_FABRIC_LEVELS
from simulator.topology import Topology
from simulator.workloads.trace import Trace

_OUTPUT = 65_536  # finished flows between two visits of the kernel


class Simulation:
    """One run of a scheme on a fabric.

    Args:
        scheme: how flows are ranked.
        topology: hosts and links.
        physics: constants of hosts and links.
        receiver: all flows go to this host, whose link is the only bottleneck (fast). None: between any hosts.
        control_delay_s: a decision is in force this long after it was made.

    Raises:
        UsageError: the scheme cannot run on this fabric, or `receiver` is not its narrowest point.
    """

    def __init__(
        self,
        scheme: Scheme,
        topology: Topology,
        physics: Physics | None = None,
        *,
        receiver: int | None = None,
        control_delay_s: float = 0.0,
    ) -> None:
        if not (math.isfinite(control_delay_s) and control_delay_s >= 0):
            raise UsageError(f"control delay {control_delay_s} s must be 0 or more")
        self.physics = physics or Physics()
        self.topology = topology
        self.control_delay_s = control_delay_s
        self._receiver = receiver
        self.scheme = scheme if receiver is not None else _on_fabric(scheme)
        rule, capacity = _rule(self.scheme, topology.hosts), self.physics.goodput(1.0) * topology.link_bps
        self._kernel: Kernel
        if receiver is not None:
            _check_receiver(topology, receiver)
            self._kernel = StarKernel(rule, self.scheme.levels, float(capacity[topology.hosts + receiver]))
        else:
            self._kernel = FabricKernel(rule, self.scheme.levels, capacity)
        self._arrivals = Arrivals.none(hops=HOPS)
        self._added = 0
        self._latest_s = 0.0
        self._out = Finished.room(_OUTPUT)
        self._decisions: list[tuple[float, int, Callable[[], None]]] = []
        self._decided = 0

    @property
    def now_s(self) -> float:
        """Time of the simulation."""
        return float(self._kernel.state.now[0])

    @property
    def events(self) -> int:
        """Arrivals, ends and changes of level so far."""
        return kernels.events(self._kernel)

    @property
    def peak_flows(self) -> int:
        """Most flows that were active at once."""
        return kernels.peak(self._kernel)

    @property
    def state_bytes(self) -> int:
        """Memory of the kernel's state."""
        return self._kernel.state_bytes

    def add(self, trace: Trace, route: Ints | None = None) -> None:
        """Add flows; may be called again with later ones.

        Args:
            trace: flows that start no earlier than those added before, and not in the past.
            route: route of each, shape (n,); by hash where not given.

        Raises:
            UsageError: flows in the past, hosts the fabric does not have, or another receiver than the one announced.
        """
        if trace.start_s[0] < max(self._latest_s, self.now_s):
            raise UsageError(
                f"flows added from {trace.start_s[0]:g} s on, but the simulation is at "
                f"{max(self._latest_s, self.now_s):g} s; add flows in order of start"
            )
        n, hosts = len(trace), self.topology.hosts
        if int(trace.source.max()) >= hosts:
            raise UsageError(
                f"the trace sends from host {int(trace.source.max())}; the fabric has {hosts} hosts from 0"
            )
        flow = np.arange(self._added, self._added + n)
        if self._receiver is None:
            routes = self.topology.hashed_route(flow) if route is None else route
            path = self.topology.paths(trace.source, trace.destination, routes)
        else:
            if (trace.destination != self._receiver).any():
                raise UsageError(f"a flow does not go to host {self._receiver}, the only receiver of this run")
            path = np.tile(ONE_LINK, (n, 1))
        done = kernels.consumed(self._kernel)
        old = self._arrivals
        self._arrivals = Arrivals(
            np.concatenate([old.start[done:], trace.start_s]),
            np.concatenate([old.size[done:], trace.size_bytes.astype(np.float64)]),
            np.concatenate([old.host[done:], trace.source.astype(np.int64)]),
            np.concatenate([old.destination[done:], trace.destination.astype(np.int64)]),
            np.concatenate([old.path[done:], path]),
            self._added - (len(old.start) - done),
        )
        self._kernel.state.counters[NEXT] = 0
        self._added += n
        self._latest_s = float(trace.start_s[-1])

    def run(self) -> FlowResults:
        """Run until every flow has ended."""
        return self.run_until(math.inf)

    def run_until(self, time_s: float) -> FlowResults:
        """Run to `time_s` and return the flows that ended on the way."""
        parts: list[FlowResults] = []
        while self._decisions and self._decisions[0][0] <= time_s:
            at_s, _, decision = self._decisions[0]
            if math.isinf(time_s) and not self._has_work():
                break
            parts += self._advance(at_s)
            heapq.heappop(self._decisions)
            decision()
        parts += self._advance(time_s)
        return FlowResults.joined(parts)

    def set_thresholds(self, thresholds: Thresholds, hosts: Sequence[int] | None = None) -> None:
        """New thresholds for the flows sent by `hosts` (all by default), those under way included.

        Raises:
            UsageError: another number of levels than the scheme has, or no such host.
        """
        if thresholds.levels != self.scheme.levels:
            raise UsageError(f"thresholds for {thresholds.levels} levels; the scheme has {self.scheme.levels}")
        rows = np.arange(self.topology.hosts) if hosts is None else np.asarray(hosts, np.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.topology.hosts:
            raise UsageError(
                f"host {int(rows.max())} is not in the fabric, which has {self.topology.hosts} hosts from 0"
            )

        def decision() -> None:
            self._kernel.settle()
            self._kernel.rule.thresholds[rows] = thresholds.bytes
            self._kernel.rank_all()

        self._decide(decision)

    def set_verdict(
        self, flow: int, level: int | None = None, route: int | None = None, rate_bps: float | None = None
    ) -> None:
        """Fix level, route and/or highest rate of one flow for the rest of its life; None: as it is.

        Nothing happens if the flow has ended by then. From the first rate on, one bottleneck is simulated flow by flow.

        Args:
            flow: its number.
            level: 0 is served first.
            route: a spine.
            rate_bps: bit/s on the wire, as links' rates are given; infinite: no cap.

        Raises:
            UsageError: no such level or route, a route where all flows share one link, a rate that is not above 0, or
                one under a scheme that serves one flow at a time.
        """
        if level is not None and not 0 <= level < self.scheme.levels:
            raise UsageError(f"level {level} for flow {flow}; the scheme has levels 0 to {self.scheme.levels - 1}")
        if route is not None and (self._receiver is not None or not 0 <= route < self.topology.routes):
            raise UsageError(f"route {route} for flow {flow}; the fabric has {self.topology.routes} routes from 0")
        if rate_bps is not None and not rate_bps > 0:
            raise UsageError(f"rate {rate_bps:g} bit/s for flow {flow}; it must be above 0")
        if rate_bps is not None and (self.scheme.order != SHARED or self.scheme.levels > MAX_FABRIC_LEVELS):
            raise UsageError(f"a rate for flow {flow}: {self.scheme.name} does not share a link among flows; mlfq does")

        def decision() -> None:
            slots = self._kernel.active_slots()
            if flow not in self._kernel.state.flow[slots]:
                return
            self._kernel.settle()
            if rate_bps is not None:
                self._kernel = kernel = self._kernel.by_flow()
                slots = kernel.active_slots()
                kernel.sharing.cap[slots[kernel.state.flow[slots] == flow]] = self.physics.goodput(rate_bps)
            slot, state, path = int(slots[self._kernel.state.flow[slots] == flow][0]), self._kernel.state, None
            if level is not None:
                state.fixed[slot] = level
            if route is not None:
                path = self.topology.paths([state.host[slot]], [state.destination[slot]], [route])[0]
            self._kernel.move(slot, path)

        self._decide(decision)

    def active(self) -> ActiveFlows:
        """The flows under way now."""
        self._kernel.settle()
        s = self._kernel.state
        slots = self._kernel.active_slots()
        slots = slots[np.argsort(s.flow[slots])]
        remaining = s.remaining[slots]
        shown = self.scheme.send_buffer_bytes or math.inf
        paths = self._kernel.paths_of(slots)
        return ActiveFlows(
            flow=s.flow[slots],
            host=s.host[slots],
            destination=s.destination[slots],
            start_s=s.start[slots],
            attained_bytes=s.size[slots] - remaining,
            backlog_bytes=np.minimum(remaining, shown),
            remaining_bytes=remaining,
            level=self._kernel.levels_of(slots),
            route=np.zeros(len(slots), np.int64) if paths is None else self.topology.route_of(paths),
        )

    def _decide(self, decision: Callable[[], None]) -> None:
        if self.control_delay_s == 0:
            decision()
            return
        heapq.heappush(self._decisions, (self.now_s + self.control_delay_s, self._decided, decision))
        self._decided += 1

    def _advance(self, until: float) -> list[FlowResults]:
        parts, done = [], False
        while not done:
            done = self._kernel.advance(self._arrivals, until, self._out)
            parts.append(self._results(kernels.take_output(self._kernel)))
        return parts

    def _results(self, n: int) -> FlowResults:
        out = self._out
        size, host, destination = out.size[:n].copy(), out.host[:n].copy(), out.destination[:n].copy()
        hosts, rates = self.topology.hosts, self.topology.link_bps
        goodput = self.physics.goodput(1.0) * np.minimum(rates[host], rates[hosts + destination])
        fct_s = completion_s(self.physics, out.fct[:n], size, out.peers[:n], out.queued[:n], goodput)
        alone_s = ideal_s(self.physics, size, goodput)
        return FlowResults(out.flow[:n].copy(), size, out.start[:n].copy(), fct_s, alone_s, host, destination)

    def _has_work(self) -> bool:
        waiting = len(self._arrivals.start) > kernels.consumed(self._kernel)
        return waiting or bool(self._kernel.state.counters[ACTIVE])


def simulate(
    trace: Trace,
    scheme: Scheme,
    topology: Topology,
    physics: Physics | None = None,
) -> FlowResults:
    """Run a whole trace; results in order of start.

    Uses the fast kernel where all flows go to one receiver whose link is the narrowest.
    """
    receiver = int(trace.destination[0])
    alone = bool((trace.destination == receiver).all()) and is_only_bottleneck(topology, receiver)
    simulation = Simulation(scheme, topology, physics, receiver=receiver if alone else None)
    simulation.add(trace)
    return simulation.run().in_order_of_start()


def _rule(scheme: Scheme, hosts: int) -> Rule:
    rows = np.repeat(np.array(scheme.thresholds, np.float64).reshape(1, -1), hosts, axis=0)
    turns = scheme.levels - 1 if scheme.turns else scheme.levels
    return Rule(scheme.order, scheme.basis, rows, float(scheme.send_buffer_bytes), float(scheme.queue_bytes), turns)


def _on_fabric(scheme: Scheme) -> Scheme:
    """The scheme as the fabric kernel can run it: sharing inside levels, at most 64 of them."""
    if scheme.order == FIRST_COME or scheme.turns:
        raise UsageError(f"{scheme.name} needs one bottleneck: all flows to one receiver")
    if scheme.order == SHORTEST:
        return replace(scheme, basis=REMAINING, order=SHARED, thresholds=fine_thresholds())
    if scheme.levels > MAX_FABRIC_LEVELS:
        raise UsageError(f"{scheme.levels} levels; a fabric has at most {MAX_FABRIC_LEVELS}")
    return scheme


def is_only_bottleneck(topology: Topology, receiver: int) -> bool:
    """Whether flows to `receiver` can only be held back by its own link: a star with no slower sender."""
    hosts, rates = topology.hosts, topology.link_bps
    if topology.spines or not 0 <= receiver < hosts:
        return False
    others = np.delete(rates[:hosts], receiver)
    return bool((others >= rates[hosts + receiver]).all())


def _check_receiver(topology: Topology, receiver: int) -> None:
    if not is_only_bottleneck(topology, receiver):
        raise UsageError(
            f"host {receiver} cannot be the only bottleneck: it takes a star where no sender's link is slower than its"
        )
