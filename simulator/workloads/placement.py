"""Which hosts flows run between: all to one, all to all, or groups of hosts with workloads of their own.

Also the mixes AuTO measures with: groups that differ in space, and workload and load that change every hour.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fabricpilot.errors import UsageError
from simulator.workloads.arrivals import mean_gap_s, poisson
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.trace import Trace


def to_one(trace: Trace, hosts: int, rng: np.random.Generator, receiver: int = 0) -> Trace:
    """Every flow to `receiver`, from a host drawn among the others.

    Raises:
        UsageError: fewer than two hosts or no such receiver.
    """
    _check_hosts(hosts)
    if not 0 <= receiver < hosts:
        raise UsageError(f"receiver {receiver} is not one of {hosts} hosts from 0")
    source = rng.integers(0, hosts - 1, len(trace))
    source += source >= receiver
    return replace(trace, source=source.astype(np.int32), destination=np.full(len(trace), receiver, np.int32))


def all_to_all(trace: Trace, hosts: int, rng: np.random.Generator) -> Trace:
    """Source and destination of every flow drawn uniformly, never the same.

    Raises:
        UsageError: fewer than two hosts.
    """
    _check_hosts(hosts)
    source = rng.integers(0, hosts, len(trace))
    destination = (source + rng.integers(1, hosts, len(trace))) % hosts
    return replace(trace, source=source.astype(np.int32), destination=destination.astype(np.int32))


@dataclass(frozen=True)
class HostGroup:
    """Hosts that receive one kind of traffic.

    Attributes:
        hosts: their numbers.
        distribution: of flow sizes.
        load: of each of these hosts' links.
    """

    hosts: tuple[int, ...]
    distribution: SizeDistribution
    load: float


def spatial_mix(
    groups: Sequence[HostGroup], rate_bps: float, hosts: int, rng: np.random.Generator, *, duration_s: float
) -> Trace:
    """Poisson traffic to the hosts of each group at its load, from any other host.

    AuTO's spatially heterogeneous scenario is four groups: web search 60 %, web search 80 %, data mining 60 % twice.

    Raises:
        UsageError: no groups, hosts out of range, or impossible loads.
    """
    if not groups:
        raise UsageError("a spatial mix of no groups; give at least one")
    _check_hosts(hosts)
    parts = []
    for group in groups:
        if not group.hosts or not 0 <= min(group.hosts) <= max(group.hosts) < hosts:
            raise UsageError(f"group of hosts {list(group.hosts)}; give hosts from 0 to {hosts - 1}")
        mean_gap_s(group.distribution, group.load, rate_bps)  # refuses impossible loads
        part = poisson(
            group.distribution,
            group.load * len(group.hosts),
            rate_bps,
            rng,
            duration_s=duration_s,
            overload=True,  # the load is of all the group's links together
        )
        destination = rng.choice(np.array(group.hosts), len(part))
        source = (destination + rng.integers(1, hosts, len(part))) % hosts
        parts.append(replace(part, source=source.astype(np.int32), destination=destination.astype(np.int32)))
    return merged(parts)


@dataclass(frozen=True)
class Phase:
    """Some time of one workload at one load on every host's link."""

    distribution: SizeDistribution
    load: float
    duration_s: float


def schedule(
    phases: Sequence[Phase], rate_bps: float, hosts: int, rng: np.random.Generator, *, part_s: float = 60.0
) -> Iterator[Trace]:
    """Traces of a changing workload, all to all, in consecutive parts of at most `part_s`: hours in bounded memory.

    Raises:
        UsageError: no phases or impossible loads.
    """
    if not phases:
        raise UsageError("a schedule of no phases; give at least one")
    _check_hosts(hosts)
    for phase in phases:
        mean_gap_s(phase.distribution, phase.load, rate_bps)  # refuse an impossible load before hours of work
    begin_s = 0.0
    for phase in phases:
        left_s = phase.duration_s
        while left_s > 0:
            span_s = min(left_s, part_s)
            part = poisson(phase.distribution, phase.load * hosts, rate_bps, rng, duration_s=span_s, overload=True)
            yield all_to_all(part.shifted(begin_s), hosts, rng)
            begin_s += span_s
            left_s -= span_s


def hourly(
    distributions: Sequence[SizeDistribution],
    loads: Sequence[float],
    hours: int,
    rng: np.random.Generator,
    hour_s: float = 3600.0,
) -> list[Phase]:
    """A seeded schedule that draws another workload and load every hour (AuTO's dynamic scenario: 8 hours).

    Raises:
        UsageError: nothing to draw from or no hours.
    """
    if not distributions or not loads or hours < 1:
        raise UsageError("an hourly schedule needs distributions, loads and at least one hour")
    phases: list[Phase] = []
    pairs = [(d, load) for d in distributions for load in loads]
    for _ in range(hours):
        others = [p for p in pairs if not phases or (p[0], p[1]) != (phases[-1].distribution, phases[-1].load)]
        distribution, load = (others or pairs)[int(rng.integers(len(others or pairs)))]
        phases.append(Phase(distribution, load, hour_s))
    return phases


def merged(parts: Sequence[Trace]) -> Trace:
    """Several traces as one, in order of start."""
    return Trace.of(
        np.concatenate([p.start_s for p in parts]),
        np.concatenate([p.size_bytes for p in parts]),
        np.concatenate([p.source for p in parts]),
        np.concatenate([p.destination for p in parts]),
    )


def _check_hosts(hosts: int) -> None:
    if hosts < 2:
        raise UsageError(f"{hosts} hosts; flows need at least 2")
