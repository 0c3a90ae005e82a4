"""Equal split: as many flows end in each level. The rule of thumb that optimisers have to beat (PIAS, section 5)."""

import time

from central.thresholds.exact import evaluate
from central.thresholds.optimum import Optimum, check_objective
from simulator.schemes import equal_split
from simulator.workloads.distribution import SizeDistribution


def optimise(
    sizes: SizeDistribution,
    load: float,
    levels: int,
    objective: str = "fct",
    *,
    base_bytes: float = 0.0,
    visible_bytes: float = 0.0,
) -> Optimum:
    """Equal split, with its value by the exact model; arguments and errors as in `exact.optimise`."""
    check_objective(objective)
    start = time.perf_counter()
    thresholds = equal_split(sizes, levels)
    seconds = time.perf_counter() - start
    value = evaluate(sizes, load, thresholds, objective, base_bytes=base_bytes, visible_bytes=visible_bytes)
    sharing = evaluate(sizes, load, None, objective, base_bytes=base_bytes)
    return Optimum(thresholds, value, sharing, objective, "equal-split", load, seconds, visible_bytes=visible_bytes)
