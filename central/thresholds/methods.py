"""The methods by name: one question about thresholds, answered by any of them in the same form."""

import time
from dataclasses import dataclass

from central.thresholds import equal_split, exact, mm1
from central.thresholds.optimum import Optimum, check_load, check_objective
from fabricpilot.errors import UsageError
from fabricpilot.levels import check_levels
from fabricpilot.published import published
from simulator.workloads.distribution import SizeDistribution

METHODS = {
    "exact": "least mean of multilevel processor sharing",
    "mm1": "PIAS's and AuTO's M/M/1 formulation",
    "search": "CMA-ES in the simulator; takes minutes",
    "equal-split": "as many flows in each level",
    "published": "PIAS's thresholds for web search or data mining",
}


@dataclass(frozen=True)
class Question:
    """What thresholds are asked for: arguments as in `exact.optimise`, and for the search its simulations.

    `visible_bytes` is how levels rank (`optimum.visible_bytes`). `turns`: flows of the last level are served one at a
    time (`exact` alone). `link_rate_bps` None searches the fluid alone, a rate the simulator with its physics.
    """

    sizes: SizeDistribution
    load: float
    levels: int
    objective: str = "fct"
    base_bytes: float = 0.0
    flows: int = 100_000
    evaluations: int = 300
    seed: int = 1
    link_rate_bps: float | None = None
    visible_bytes: float = 0.0
    turns: bool = False

    def __post_init__(self) -> None:
        check_load(self.load)
        check_levels(self.levels)
        check_objective(self.objective)


def answer(method: str, ask: Question) -> Optimum:
    """The thresholds of one method.

    Raises:
        UsageError: unknown method, arguments out of range, one that knows no turns, or (published) nothing was
            published for them.
    """
    if method not in METHODS:
        raise UsageError(f"method '{method}' is unknown; choose one of {', '.join(METHODS)}")
    if ask.turns and method != "exact":
        raise UsageError(f"method '{method}' knows no flows in turn; leave the turns out or use exact")
    if method == "search":
        from central.thresholds import simulated  # compiles: only where it is asked for

        link = simulated.FLUID if ask.link_rate_bps is None else simulated.Link.real(ask.link_rate_bps)
        return simulated.optimise(
            ask.sizes,
            ask.load,
            ask.levels,
            ask.objective,
            ask.flows,
            ask.evaluations,
            ask.seed,
            link,
            ask.visible_bytes,
        )
    if method == "published":
        return _published(ask)
    asked = ask.sizes, ask.load, ask.levels, ask.objective
    base, visible = ask.base_bytes, ask.visible_bytes
    if method == "exact":
        return exact.optimise(*asked, base_bytes=base, visible_bytes=visible, turns=ask.turns)
    optimise = {"mm1": mm1.optimise, "equal-split": equal_split.optimise}[method]
    return optimise(*asked, base_bytes=base, visible_bytes=visible)


def side_by_side(ask: Question) -> list[Optimum]:
    """All methods that take seconds; the published one only where there is something published for this K."""
    optima = [answer(method, ask) for method in ("exact", "mm1", "equal-split")]
    try:
        return [*optima, answer("published", ask)]
    except UsageError:
        return optima


def _published(ask: Question) -> Optimum:
    start = time.perf_counter()
    found = published(ask.sizes.name, ask.levels, ask.load)
    seconds = time.perf_counter() - start
    value, sharing = (
        exact.evaluate(
            ask.sizes,
            ask.load,
            thresholds,
            ask.objective,
            base_bytes=ask.base_bytes,
            visible_bytes=ask.visible_bytes,
        )
        for thresholds in (found.thresholds, None)
    )
    meant = "no stated load" if found.load is None else f"load {found.load:g}"
    note = f"{found.source}: {found.workload}, {meant}"
    return Optimum(
        found.thresholds, value, sharing, ask.objective, "published", ask.load, seconds, note, ask.visible_bytes
    )
