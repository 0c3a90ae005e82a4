"""Thresholds by trial: CMA-ES over a measured objective, such as a simulated mean completion time.

The formulas of `exact.py` know one link, Poisson arrivals and fluid sharing. This search knows whatever its measure
knows (several links, bursts, latency), at the price of some hundred simulations. It works on log sizes, on which
completion times vary smoothly, and starts from thresholds that are good already. All candidates are measured on the
same flows, so that they differ by their thresholds and not by luck; what it finds is therefore a little too good for
those flows, and is to be judged on others.

Source: N. Hansen, "The CMA evolution strategy: a tutorial" (2016); the library is its author's `cma`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from central.thresholds.optimum import ascending
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds

_SPREAD = 0.5  # first standard deviation, in log size: thresholds are tried within a factor of about 1.6
_SETTLED = 1e-3  # ends when a generation's thresholds differ by less than this share


@dataclass(frozen=True)
class Found:
    """Best thresholds measured, their value, the value at the start, and how many vectors were measured."""

    thresholds: Thresholds
    value: float
    start_value: float
    evaluations: int


def search(
    measure: Callable[[Thresholds], float],
    start: Thresholds,
    largest_bytes: float,
    *,
    evaluations: int = 300,
    seed: int = 1,
) -> Found:
    """Minimise `measure` over thresholds of as many levels as `start` has.

    Args:
        measure: the objective, lower is better; deterministic.
        start: where to begin; the result is never worse.
        largest_bytes: thresholds are kept between 1 byte and this.
        evaluations: how many vectors to measure at most, `start` included.
        seed: same seed, same search.

    Raises:
        UsageError: fewer than 2 evaluations, a largest size below 2, or a measure that is not a finite number.
    """
    if evaluations < 2 or not largest_bytes >= 2:
        raise UsageError(f"{evaluations} evaluations up to {largest_bytes:g} bytes; a search needs at least 2 of each")
    import cma

    def value_of(thresholds: Thresholds) -> float:
        value = float(measure(thresholds))
        if not math.isfinite(value):
            raise UsageError(f"the measure of thresholds {list(thresholds.bytes)} is {value}, not a finite number")
        return value

    high = math.log(largest_bytes)
    best, best_value = start, value_of(start)
    start_value, used = best_value, 1
    middle = np.minimum(np.log(np.array(start.bytes, float)), high)
    # The library has no one-dimensional strategy: K = 2 gets a second coordinate that nothing depends on.
    padded = np.append(middle, 0.0) if len(middle) == 1 else middle
    options = {"bounds": [0.0, high], "seed": seed, "verbose": -9, "tolx": _SETTLED}
    strategy = cma.CMAEvolutionStrategy(padded, _SPREAD, options)
    while not strategy.stop() and used + strategy.popsize <= evaluations:
        asked = strategy.ask()
        values = []
        for point in asked:
            candidate = ascending(sorted(np.exp(point[: len(middle)])))
            values.append(value_of(candidate))
            if values[-1] < best_value:
                best, best_value = candidate, values[-1]
        strategy.tell(asked, values)
        used += len(asked)
    return Found(best, best_value, start_value, used)
