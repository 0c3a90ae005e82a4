"""Equal split: as many flows end in each level. The rule of thumb that optimisers have to beat (PIAS, section 5)."""

import time

import numpy as np

from central.thresholds.exact import evaluate
from central.thresholds.optimum import Optimum, ascending, check_objective
from fabricpilot.levels import Thresholds, check_levels
from simulator.workloads.distribution import SizeDistribution


def equal_split(sizes: SizeDistribution, levels: int) -> Thresholds:
    """Thresholds at the quantiles 1/K, 2/K, ... of the flow sizes.

    Raises:
        UsageError: `levels` outside 2..8.
    """
    check_levels(levels)
    return ascending(list(sizes.quantile(np.arange(1, levels) / levels)))


def optimise(
    sizes: SizeDistribution, load: float, levels: int, objective: str = "fct", *, base_bytes: float = 0.0
) -> Optimum:
    """Equal split, with its value by the exact model; arguments and errors as in `exact.optimise`."""
    check_objective(objective)
    start = time.perf_counter()
    thresholds = equal_split(sizes, levels)
    seconds = time.perf_counter() - start
    value = evaluate(sizes, load, thresholds, objective, base_bytes=base_bytes)
    sharing = evaluate(sizes, load, None, objective, base_bytes=base_bytes)
    return Optimum(thresholds, value, sharing, objective, "equal-split", load, seconds)
