"""What an agent for long flows meets: the same in the environment `LongFlows` and in the laboratory where lRLA learns.

Traffic between all hosts of a fabric; which flows the agent is told of; how many of them are on which uplink; and the
paper's reward. How an agent sees flows and what it may choose is each one's own.
"""

import numpy as np
import numpy.typing as npt

from simulator.arrays import Bools, Floats, Ints
from simulator.results import ActiveFlows, FlowResults
from simulator.topology import Topology
from simulator.workloads.arrivals import mean_gap_s
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.placement import all_to_all
from simulator.workloads.trace import Trace


def traffic(
    sizes: SizeDistribution,
    load: float,
    topology: Topology,
    rate_bps: float,
    begin_s: float,
    span_s: float,
    rng: np.random.Generator,
) -> Trace | None:
    """Poisson arrivals of `span_s` from `begin_s` on, from all hosts to all; None if nothing arrives.

    Args:
        sizes: of the flows.
        load: of every host's link of `rate_bps`.
        topology: its hosts.
        rate_bps: of a host's link.
        begin_s: earliest start.
        span_s: seconds of traffic.
        rng: draws number, starts, sizes and hosts.
    """
    n = int(rng.poisson(span_s / mean_gap_s(sizes, load * topology.hosts, rate_bps, overload=True)))
    if n == 0:
        return None
    starts = begin_s + np.sort(rng.uniform(0, span_s, n))  # given their number, Poisson arrivals are uniform
    return all_to_all(Trace.of(starts, sizes.sample(rng, n)), topology.hosts, rng)


def told(active: ActiveFlows, last_threshold_bytes: float) -> Bools:
    """The flows under way that an agent is told of: those that have reached the last threshold."""
    reached: Bools = active.attained_bytes >= last_threshold_bytes
    return reached


def on_links(topology: Topology, source: Ints, destination: Ints, route: Ints) -> npt.NDArray[np.int64]:
    """How many of these flows are on the way up from each leaf and down to each, by route: shape (2, leaves, R)."""
    leaf = topology.leaf
    far = leaf[source] != leaf[destination]
    counts = np.zeros((2, topology.leaves, topology.routes), np.int64)
    np.add.at(counts[0], (leaf[source[far]], route[far]), 1)
    np.add.at(counts[1], (leaf[destination[far]], route[far]), 1)
    return counts


def throughputs(ended: FlowResults, hosts: int) -> Floats:
    """Sum of size over completion time of the flows that ended, by sender: bytes per second, shape (hosts,)."""
    summed: Floats = np.bincount(ended.host, ended.size_bytes / ended.fct_s, hosts).astype(np.float64)  # also of none
    return summed


def paper_reward(before: npt.ArrayLike, after: npt.ArrayLike, cap: float) -> Floats:
    """AuTO's: throughput of a step over that of the step before, at most `cap`; 1 where the step before has none."""
    past = np.asarray(before, np.float64)
    return np.where(past > 0, np.minimum(np.asarray(after) / np.where(past > 0, past, 1.0), cap), 1.0)
