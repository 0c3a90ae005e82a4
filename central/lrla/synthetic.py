"""Long flows made up at random: for benchmarks and tests of schemes, where no fabric is simulated."""

import numpy as np

from central.lrla.flow_set import MAX_PRIORITIES, FlowSet


def random_flows(
    n: int, rng: np.random.Generator, *, hosts: int = 64, racks: int = 8, routes: int = 4, rate_bps: float = 1e10
) -> FlowSet:
    """N flows between hosts that are spread evenly over the racks; about half have a route already."""
    source, destination = rng.integers(hosts, size=n), rng.integers(hosts, size=n)
    destination = np.where(destination == source, (destination + 1) % hosts, destination)
    return FlowSet(
        source=source,
        destination=destination,
        source_rack=source * racks // hosts,
        destination_rack=destination * racks // hosts,
        attained_bytes=10 ** rng.uniform(7, 9, n),
        known_bytes=np.where(rng.random(n) < 0.5, 10 ** rng.uniform(4, 7, n), np.nan),
        age_s=10 ** rng.uniform(-2, 1, n),
        route=np.where(rng.random(n) < 0.5, rng.integers(routes, size=n), -1),
        priority=rng.integers(MAX_PRIORITIES, size=n),
        migration=rng.random(n) < 0.05,
        usable=np.ones((n, routes), np.bool_),
        priorities=np.full(n, MAX_PRIORITIES),
        hosts=hosts,
        racks=racks,
        rate_bps=rate_bps,
    )
