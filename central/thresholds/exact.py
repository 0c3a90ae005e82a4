"""Thresholds that minimise the exact mean response time of multilevel processor sharing (`mlps.py`).

Central runs this every few seconds on the flow sizes the hosts reported, so it has to take well under a second. The
criterion is a sum over the levels, and a level's term depends on its two bounds alone. So dynamic programming over a
logarithmic grid of sizes finds the best thresholds of the whole grid, without starting values or local minima;
the same on ever finer grids around the thresholds found brings them to about 1 % of a size, where the optimum is
flat. Fewer levels than K may be best (sizes that hardly differ): the thresholds left over then lie beyond the largest
size and do nothing.

Where long flows take turns (`central/lrla/turns.py`), the last level is for those that wait and the one before it for
the flow whose turn it is, so no threshold leads there: the last two are a byte apart. Turns are left out, by a last
threshold beyond the largest size, where sharing is better (sizes that differ by much more than their mean).
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from central.thresholds.grid import best_path
from central.thresholds.integrals import SizeIntegrals, Weight
from central.thresholds.mlps import (
    Criterion,
    Link,
    first_level_cost,
    last_level_in_turns,
    level_costs,
    response_in_levels,
    turns_cost,
)
from central.thresholds.optimum import Optimum, ascending, check_load, check_objective
from fabricpilot.errors import UsageError
from fabricpilot.levels import TURNS_LEVELS, Thresholds, check_levels
from simulator.workloads.distribution import SizeDistribution

Floats = npt.NDArray[np.float64]

_GRID = 56  # sizes in the first grid: a factor of about 1.3 apart for web search
_GRID_CELLS = 20  # cells per level while searching: costs within about 0.1 %, alike for neighbours
_ZOOM = 7  # candidates around each threshold
_ZOOM_ROUNDS = 3  # each three times finer
_ZOOM_CELLS = 32
_ROUNDING = 1e-9  # bounds nearer to each other are one
_LEAST_RATIO = 1.25  # between thresholds: closer ones are worth nothing and make a level nobody is in
_FINAL_CELLS = 48  # and twice as many, extrapolated: about 1e-6


def optimise(
    sizes: SizeDistribution,
    load: float,
    levels: int,
    objective: str = "fct",
    *,
    base_bytes: float = 0.0,
    visible_bytes: float = 0.0,
    turns: bool = False,
) -> Optimum:
    """The best thresholds for K levels.

    Args:
        sizes: flow sizes, published or from a histogram of reported flows.
        load: share of the link's capacity the flows need, 0 < load < 1 (`usable_load` for a measured one).
        levels: K, 2 to 8.
        objective: "fct", "slowdown" or "tail", see `OBJECTIVES`.
        base_bytes: what the link could send in the time a flow takes besides its transmission (base round trip);
            part of both times of a slowdown. With 0 it is the model's own, T(x)/x.
        visible_bytes: what a level sees of a flow beyond the bytes it has sent: 0 where it ranks by bytes sent, the
            send buffer where it counts bytes written, infinite where it ranks by size.
        turns: flows of the last level are served one at a time; takes 3 levels or more, with 2 it changes nothing.

    Raises:
        UsageError: load, levels, objective, base or visible bytes out of range.
    """
    check_levels(levels)
    problem = _Problem.of(sizes, load, objective, base_bytes, visible_bytes, turns and levels >= TURNS_LEVELS)
    start = time.perf_counter()
    chosen = problem.zoom(problem.best_on_grid(levels - problem.turns))
    waiting = problem.turns and len(chosen) > 0 and problem.takes_turns(chosen[-1:])[0]
    thresholds = _fill(chosen * problem.sizes.unit_bytes + problem.step_bytes, levels, sizes.max_bytes, bool(waiting))
    return Optimum(
        thresholds,
        problem.value(thresholds),
        problem.value(None),
        objective,
        "exact",
        load,
        time.perf_counter() - start,
        visible_bytes=visible_bytes,
        turns=problem.turns,
    )


def evaluate(
    sizes: SizeDistribution,
    load: float,
    thresholds: Thresholds | None,
    objective: str = "fct",
    *,
    base_bytes: float = 0.0,
    visible_bytes: float = 0.0,
    turns: bool = False,
) -> float:
    """Value of the objective under `thresholds` (None: one level, processor sharing); arguments as in `optimise`."""
    turns = turns and thresholds is not None and thresholds.levels >= TURNS_LEVELS
    return _Problem.of(sizes, load, objective, base_bytes, visible_bytes, turns).value(thresholds)


def response_times(
    sizes: SizeDistribution,
    load: float,
    thresholds: Thresholds,
    at_bytes: npt.ArrayLike,
    visible_bytes: float = 0.0,
    turns: bool = False,
) -> Floats:
    """T(x): mean response time of a flow of each size, in bytes the link sends meanwhile; shape of `at_bytes`.

    Raises:
        UsageError: load out of range, or a size that is not above 0 or beyond the largest.
    """
    turns = turns and thresholds.levels >= TURNS_LEVELS
    problem = _Problem.of(sizes, load, "fct", 0.0, visible_bytes, turns)
    integrals, link = problem.sizes, problem.link
    x = np.asarray(at_bytes, np.float64) / integrals.unit_bytes
    if x.size and (x.min() <= 0 or x.max() > integrals.largest * (1 + 1e-12)):
        raise UsageError(f"sizes asked for must lie above 0 and up to the largest, {sizes.max_bytes:g} bytes")
    bounds = problem.bounds(thresholds)
    first_end = np.append(bounds, integrals.largest)[:1]
    result = x / link.idle(first_end)
    upper = np.append(bounds[1:], integrals.largest)
    if len(bounds):
        curve = response_in_levels(link, bounds, upper, 2 * _FINAL_CELLS)
        for level in range(len(bounds)):
            inside = np.interp(x, curve.edges[level], curve.at[level])
            result = np.where((x > bounds[level]) & (x <= upper[level]), inside, result)
        if problem.waits(thresholds):
            constant, slope = last_level_in_turns(link, bounds[-1:])
            result = np.where(x > bounds[-1], constant + slope * x, result)
    return result * integrals.unit_bytes


@dataclass(frozen=True)
class _Problem:
    """One distribution, load and criterion; all sizes inside in units of the mean."""

    link: Link
    criterion: Criterion
    objective: str
    turns: bool

    @classmethod
    def of(
        cls,
        sizes: SizeDistribution,
        load: float,
        objective: str,
        base_bytes: float,
        visible_bytes: float,
        turns: bool,
    ) -> "_Problem":
        check_load(load)
        check_objective(objective)
        if not (np.isfinite(base_bytes) and base_bytes >= 0):
            raise UsageError(f"base_bytes = {base_bytes}; give a number of bytes, 0 or more")
        if not visible_bytes >= 0:
            raise UsageError(f"visible_bytes = {visible_bytes}; give a number of bytes, 0 or more, or infinity")
        integrals = SizeIntegrals(sizes)
        order, power = {"fct": (0, 1), "slowdown": (1, 1), "tail": (2, 2)}[objective]
        criterion = Criterion(Weight(order, base_bytes / integrals.unit_bytes), power)
        return cls(Link(integrals, load, visible_bytes / integrals.unit_bytes), criterion, objective, turns)

    @property
    def sizes(self) -> SizeIntegrals:
        return self.link.sizes

    @property
    def step_bytes(self) -> float:
        """A threshold above the largest size of the level before it: a flow that shows as much as it is beyond it.

        By bytes sent alone a flow shows its whole size only when it ends.
        """
        return 1.0 if self.link.visible > 0 else 0.0

    def bounds(self, thresholds: Thresholds | None) -> Floats:
        """The levels' bounds that some flow is beyond, in units of the mean size."""
        given = np.array(thresholds.bytes if thresholds else (), np.float64)
        given = given[np.append(np.diff(given) > 1, True)] - self.step_bytes if len(given) else given
        given = given[given > 0] / self.sizes.unit_bytes
        return given[given < self.sizes.largest]

    def waits(self, thresholds: Thresholds | None) -> bool:
        """Whether some flow gets to the last level, and flows there take turns."""
        return self.turns and thresholds is not None and thresholds.bytes[-1] < self.sizes.largest_bytes

    def costs(self, lower: Floats, upper: Floats, cells: int) -> Floats:
        """`level_costs`; of a level that ends with the largest size, those with turns if that is less."""
        cost = level_costs(self.link, lower, upper, self.criterion, cells)
        if self.turns:
            last = upper >= self.sizes.largest
            cost[last] = np.minimum(cost[last], turns_cost(self.link, lower[last], self.criterion))
        return cost

    def takes_turns(self, lower: Floats) -> npt.NDArray[np.bool_]:
        """Whether that was so, for last levels from `lower`."""
        upper = np.full_like(lower, self.sizes.largest)
        shared = level_costs(self.link, lower, upper, self.criterion, _FINAL_CELLS)
        better: npt.NDArray[np.bool_] = turns_cost(self.link, lower, self.criterion) < shared
        return better

    def value(self, thresholds: Thresholds | None) -> float:
        """The objective in its public unit."""
        bounds, waits = self.bounds(thresholds), self.waits(thresholds)
        # The cells' error falls with their square: two resolutions cancel its first term.
        coarse, fine = (self._total(bounds, cells, waits) for cells in (_FINAL_CELLS, 2 * _FINAL_CELLS))
        total = (4 * fine - coarse) / 3
        return float({"fct": total * self.sizes.unit_bytes, "slowdown": total, "tail": np.sqrt(total)}[self.objective])

    def best_on_grid(self, levels: int) -> Floats:
        """Best bounds between at most `levels` levels, on a logarithmic grid over all sizes; shape (up to K-1,)."""
        grid = self.sizes.grid(_GRID)
        lower, upper = np.triu_indices(_GRID, 1)
        apart = (grid[upper] >= grid[lower] * _LEAST_RATIO) | (upper == _GRID - 1)
        lower, upper = lower[apart], upper[apart]
        between = np.full((_GRID, _GRID), np.inf)
        between[lower, upper] = self.costs(grid[lower], grid[upper], _GRID_CELLS)
        best = first_level_cost(self.link, grid, self.criterion)  # of levels up to each grid size
        return grid[best_path(best, between, levels)]

    def zoom(self, bounds: Floats) -> Floats:
        """The same on finer and finer grids around each bound."""
        low, ratio = 1 / self.sizes.unit_bytes, self.sizes.grid_ratio(_GRID)
        for _ in range(_ZOOM_ROUNDS if len(bounds) else 0):
            around = bounds[:, None] * ratio ** np.linspace(-1, 1, _ZOOM)
            bounds = self._best_chain(np.clip(around, low, self.sizes.largest))
            ratio = ratio ** (1 / 3)
        return bounds

    def _best_chain(self, candidates: Floats) -> Floats:
        """One of the candidates, shape (bounds, n), for each bound, such that the total is smallest."""
        count, n = candidates.shape
        lower = np.repeat(candidates[:, :, None], n, axis=2)
        upper = np.repeat(np.append(candidates[1:], np.full((1, n), self.sizes.largest), axis=0)[:, None, :], n, axis=1)
        valid = upper >= lower * _LEAST_RATIO * (1 - 1e-12)
        valid[-1] = lower[-1] < upper[-1] * (1 - _ROUNDING)
        empty = ~valid[-1, :, 0]  # a last threshold at the largest size
        valid[-1, :, 1:] = False  # the last level has one upper bound
        cost = np.full((count, n, n), np.inf)
        cost[valid] = self.costs(lower[valid], upper[valid], _ZOOM_CELLS)
        cost[-1, empty, 0] = 0.0
        best = first_level_cost(self.link, candidates[0], self.criterion)
        came_from = []
        for level in range(count):
            through = best[:, None] + cost[level]
            came_from.append(through.argmin(axis=0))
            best = through.min(axis=0)
        at, chosen = 0, []
        for level in reversed(range(count)):
            at = int(came_from[level][at])
            chosen.append(candidates[level, at])
        return np.array(chosen[::-1])

    def _total(self, bounds: Floats, cells: int, waits: bool) -> float:
        """The criterion for these bounds, all below the largest size; `waits`: with turns in the last level."""
        first = bounds[:1] if len(bounds) else np.array([self.sizes.largest])
        total = first_level_cost(self.link, first, self.criterion)[0]
        if len(bounds):
            lower, upper = bounds, np.append(bounds[1:], self.sizes.largest)
            if waits:
                total += turns_cost(self.link, bounds[-1:], self.criterion)[0]
                lower, upper = lower[:-1], upper[:-1]
            total += level_costs(self.link, lower, upper, self.criterion, cells).sum()
        return float(total)


def _fill(chosen_bytes: Floats, levels: int, largest_bytes: float, waiting: bool) -> Thresholds:
    """Exactly K-1 thresholds: those chosen, then ones beyond the largest size, doubling.

    With flows that wait for their turn, ones a byte apart from the last chosen instead: beyond it is the last level.
    """
    values = list(chosen_bytes)
    beyond = max(largest_bytes, *values, 1.0) if values else max(largest_bytes, 1.0)
    missing = levels - 1 - len(values)
    if waiting:
        return ascending(values + [values[-1]] * missing)
    return ascending(values + [beyond * 2**step for step in range(missing)])
