"""Situations drawn at random: what traffic a group of hosts may meet, for agents that are to cope with all of it.

A situation is a flow-size distribution, a load, a link rate, a number of levels and how bursty flows arrive. Sizes come
from the bundled distributions, scaled, their logarithms stretched, and two of them mixed, so that an agent learns the
relation between traffic and thresholds and not the tables.
"""

from dataclasses import dataclass

import numpy as np

from fabricpilot.levels import MAX_LEVELS, MIN_LEVELS
from simulator.workloads.arrivals import bursty, poisson
from simulator.workloads.distribution import SizeDistribution, names
from simulator.workloads.trace import Trace

# Bundled distributions nobody trains on: those of web search, Facebook's Hadoop (HPCC) and Homa's W3, with all tables
# that are the same numbers under another name. What is learned from the others is tested on these.
HELD_OUT = (
    "facebook_hadoop_bytes_hpcc",
    "homa_w3_bytes_cdf",
    "qcluster_Google_AllRPC",
    "websearch_bytes_hpcc",
    "websearch_dctcp_bytes_trafficgenerator",
    "websearch_dctcp_pkts1460_pias_ns2",
)


@dataclass(frozen=True)
class Situation:
    """Traffic of a group of hosts into one link.

    Attributes:
        sizes: of flows.
        load: payload over link rate.
        rate_bps: of the link.
        levels: K.
        sigma: of log inter-arrival times (`bursty`); 0 for Poisson arrivals.
        visible_bytes: what hosts see of a flow beyond what it has sent; 0 where they rank by bytes sent alone.
    """

    sizes: SizeDistribution
    load: float
    rate_bps: float
    levels: int
    sigma: float = 0.0
    visible_bytes: float = 0.0

    def trace(self, flows: int, random: np.random.Generator) -> Trace:
        """`flows` flows from host 0 to host 1.

        Start times are stretched by the drawn sizes' mean over the distribution's, which takes the largest part of the
        luck out of heavy-tailed sizes.
        """
        if self.sigma > 0:
            drawn = bursty(self.sizes, self.load, self.rate_bps, random, count=flows, sigma=self.sigma)
        else:
            drawn = poisson(self.sizes, self.load, self.rate_bps, random, count=flows)
        stretch = float(drawn.size_bytes.mean()) / self.sizes.mean_bytes
        return Trace.of(drawn.start_s * stretch, drawn.size_bytes, np.zeros(flows, np.int32), np.ones(flows, np.int32))


@dataclass(frozen=True)
class Range:
    """What situations are drawn from.

    Attributes:
        cdfs: flow-size distributions; empty: all bundled ones save `HELD_OUT`.
        load: lowest and highest.
        rates_gbps: link rates.
        levels: lowest and highest K.
        vary: change the distributions (scale, stretch, mix); off: as they are.
        bursty: share of situations whose arrivals are not Poisson.
        visible_bytes: of situations; nobody tells an agent which.
    """

    cdfs: tuple[str, ...] = ()
    load: tuple[float, float] = (0.3, 0.95)
    rates_gbps: tuple[float, ...] = (1.0, 10.0, 25.0, 40.0, 100.0)
    levels: tuple[int, int] = (MIN_LEVELS, MAX_LEVELS)
    vary: bool = True
    bursty: float = 0.25
    visible_bytes: tuple[float, ...] = (0.0,)


def draw(given: Range, random: np.random.Generator) -> Situation:
    """A situation out of the range."""
    tables = given.cdfs or tuple(name for name in names() if name not in HELD_OUT)
    sizes = SizeDistribution.load(str(random.choice(tables)))
    if given.vary:
        if random.random() < 0.3:
            sizes = mixed(sizes, SizeDistribution.load(str(random.choice(tables))), float(random.uniform(0.05, 0.95)))
        sizes = stretched(sizes, float(random.uniform(0.85, 1.15)), float(2.0 ** random.uniform(-2, 2)))
    levels = int(random.integers(given.levels[0], given.levels[1] + 1))
    rate_bps = float(random.choice(given.rates_gbps)) * 1e9
    sigma = float(random.uniform(1.0, 2.0)) if random.random() < given.bursty else 0.0
    load = float(random.uniform(*given.load))
    return Situation(sizes, load, rate_bps, levels, sigma, float(random.choice(given.visible_bytes)))


def mixed(first: SizeDistribution, second: SizeDistribution, share: float) -> SizeDistribution:
    """Flows of `first` with probability `share`, else of `second`."""
    sizes = np.unique(np.concatenate((first.sizes_bytes, second.sizes_bytes)))
    sizes = np.unique(np.concatenate((sizes, np.nextafter(sizes, 0))))  # atoms stay steps
    cdf = share * first.cdf_at(sizes) + (1 - share) * second.cdf_at(sizes)
    return SizeDistribution(f"{share:.2f} {first.name} + {second.name}", np.maximum(sizes, 0), cdf)


def stretched(sizes: SizeDistribution, exponent: float, factor: float) -> SizeDistribution:
    """Sizes x become factor * m * (x / m)^exponent with m the mean: above 1 the distribution is wider."""
    middle = sizes.mean_bytes
    return SizeDistribution(
        sizes.name, factor * middle * (sizes.sizes_bytes / middle) ** exponent, sizes.cdf, sizes.source
    )
