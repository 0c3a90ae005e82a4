"""Compiled kernels ready before any clock starts.

The exact solver's knapsacks are compiled by numba, once per machine and version; the result is kept beside the source,
or below ~/.cache where that cannot be written. An installation runs

    python -m central.planner.warm

so that nobody's first plan has to wait for the compiler.
"""

import logging
import time

log = logging.getLogger(__name__)

_warm = False


def warm_up() -> None:
    """Load the kernels in this process, compiling them if that was never done here. What it takes is no plan's time."""
    global _warm
    if _warm:
        return
    from central.planner.generator import SHAPES, generate
    from central.planner.model.cluster import Cluster
    from central.planner.model.objective import parse_objective
    from central.planner.model.problem import Deadline, Limits
    from central.planner.model.state import State, Valuation
    from central.planner.solvers.columns import Master
    from central.planner.solvers.patterns import Pricer
    from central.planner.solvers.pricing import price_all

    begun = time.monotonic()
    cluster = Cluster(generate(SHAPES["tiny"], 0))
    valuation = Valuation.of(parse_objective("fr"), cluster)
    Master(Pricer(State(cluster), valuation, Limits(mnl=2))).solve(Deadline(60.0))
    if sum(price_all.stats.cache_misses.values()):
        log.warning("kernels compiled in %.0f s, once on this machine", time.monotonic() - begun)
    _warm = True


def main() -> None:
    """Compile, and say so."""
    begun = time.monotonic()
    warm_up()
    print(f"planner: kernels are ready ({time.monotonic() - begun:.1f} s)")


if __name__ == "__main__":
    main()
