"""What thresholds are worth in the simulator, and the search that asks it.

Poisson arrivals on one link. Without a link rate it is the fluid alone: the situation of the exact model, whose answers
can be checked so. With a rate, headers, round trips and queues count too (`simulator.physics`).
"""

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from central.thresholds import exact
from central.thresholds.optimum import Optimum, check_objective
from central.thresholds.search import search
from fabricpilot.errors import UsageError
from fabricpilot.levels import MIN_LEVELS, Thresholds, check_levels
from simulator.engine import simulate
from simulator.physics import IDEAL, Physics
from simulator.results import FlowResults
from simulator.schemes import SIZE, WRITTEN, Scheme, equal_split
from simulator.topology import star
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.situations import Situation
from simulator.workloads.trace import Trace

_FEWEST_FLOWS = 1000


@dataclass(frozen=True)
class Link:
    """The link the flows share: its rate, and the physics of hosts and transport."""

    rate_bps: float = 8.0  # one byte per second: times are bytes the link sends meanwhile
    physics: Physics = IDEAL

    @classmethod
    def real(cls, rate_bps: float) -> "Link":
        """A link of that rate between real hosts."""
        return cls(rate_bps, Physics())


FLUID = Link()


def optimise(
    sizes: SizeDistribution,
    load: float,
    levels: int,
    objective: str = "fct",
    flows: int = 100_000,
    evaluations: int = 300,
    seed: int = 1,
    link: Link = FLUID,
    visible_bytes: float = 0.0,
) -> Optimum:
    """Search the simulator for thresholds, half of the time from the exact model's and half from equal split.

    The result's values are simulated, on flows the search has not seen (the next seed).

    Args:
        sizes: flow sizes.
        load: 0 < load < 1.
        levels: K, 2 to 8.
        objective: a key of `OBJECTIVES`.
        flows: flows per simulation.
        evaluations: simulations at most.
        seed: of flows and search.
        link: what the flows share.
        visible_bytes: how levels rank, as in `exact.optimise`.

    Raises:
        UsageError: an argument out of range.
    """
    check_levels(levels)
    check_objective(objective)
    if flows < _FEWEST_FLOWS:
        raise UsageError(f"{flows} flows per simulation say nothing about thresholds; give at least {_FEWEST_FLOWS}")
    start = time.perf_counter()
    seen = trace_at(sizes, load, flows, seed, link)
    begin = exact.optimise(sizes, load, levels, objective, visible_bytes=visible_bytes).thresholds
    # From two places, so that the search is no mere echo of the exact model.
    found, other = (
        search(
            lambda thresholds: measured(seen, thresholds, objective, link, visible_bytes),
            place,
            sizes.max_bytes,
            evaluations=evaluations // 2,
            seed=seed,
        )
        for place in (begin, equal_split(sizes, levels))
    )
    best = min(found, other, key=lambda one: one.value)
    seconds = time.perf_counter() - start
    unseen = trace_at(sizes, load, flows, seed + 1, link)
    there, before, sharing = (
        measured(unseen, thresholds, objective, link, visible_bytes) for thresholds in (best.thresholds, begin, None)
    )
    note = (
        f"{found.evaluations + other.evaluations} simulations of {flows} flows; against exact "
        f"{1 - best.value / found.start_value:.2%} better on these flows, {1 - there / before:.2%} on {flows} others"
    )
    return Optimum(best.thresholds, there, sharing, objective, "search", load, seconds, note, visible_bytes)


def trace_at(sizes: SizeDistribution, load: float, flows: int, seed: int, link: Link = FLUID) -> Trace:
    """Poisson arrivals at `load` of the link with the sizes drawn, all from host 0 to host 1 (`Situation.trace`)."""
    return Situation(sizes, load, link.rate_bps, MIN_LEVELS).trace(flows, np.random.default_rng(seed))


def results(trace: Trace, thresholds: Thresholds | None, link: Link = FLUID, visible_bytes: float = 0.0) -> FlowResults:
    """Every flow's completion under `thresholds` (None: one level), in trace order."""
    scheme = Scheme("mlfq", thresholds=tuple(map(float, thresholds.bytes)) if thresholds else ())
    if math.isinf(visible_bytes):
        scheme = replace(scheme, basis=SIZE)
    elif visible_bytes > 0:
        scheme = replace(scheme, basis=WRITTEN, send_buffer_bytes=float(round(visible_bytes)))
    if link.physics is IDEAL:
        scheme = replace(scheme, queue_bytes=0.0)
    return simulate(trace, scheme, star(2, link.rate_bps), link.physics)


def measured(
    trace: Trace, thresholds: Thresholds | None, objective: str, link: Link = FLUID, visible_bytes: float = 0.0
) -> float:
    """The objective over simulated flows.

    "tail" is the root mean square slowdown of the flows themselves: here, unlike in the exact model, flows of one size
    differ, so it is the larger of the two.
    """
    flows = results(trace, thresholds, link, visible_bytes)
    if objective == "fct":
        return float(flows.fct_s.mean()) * link.rate_bps / 8
    return float(flows.slowdown.mean() if objective == "slowdown" else np.sqrt((flows.slowdown**2).mean()))
