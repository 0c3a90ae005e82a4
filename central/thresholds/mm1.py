"""Thresholds by the M/M/1 tandem of PIAS and AuTO, as published; kept for the record and for comparison.

Source: Bai et al., PIAS (NSDI 2015), section 4.2, and Chen et al., AuTO (SIGCOMM 2018), equations 5 to 7. With F the
CDF of the flow sizes, thresholds a[1] < ... < a[K-1], a[0] = 0, a[K] the largest size, and flows arriving at rate l:

    minimise the sum over i of  T[i] (1 - F(a[i-1]))
    T[i] = 1 / (mu[i] - l[i]),    mu[i] = mu * prod over j < i of (1 - rho[j]),    rho[j] = l[j] / mu[j]
    l[i] = l E[L[i]],    E[L[i]] <= (a[i] - a[i-1]) (1 - F(a[i-1]))

where L[i] is what a flow brings into queue i. Put together, mu[i] is mu less all l[j] before it.

Two things are wrong with it, which is why `exact.py` exists. The printed bound stands in for E[L[i]]: it overstates the
traffic so much that for common workloads at 60 to 80 % load no thresholds keep every queue stable. This file then says
so, and solves the same problem with the exact E[L[i]], the integral of 1 - F. And T[i] counts one delay per queue,
however many packets a flow has there.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from central.thresholds.exact import evaluate
from central.thresholds.grid import best_path
from central.thresholds.integrals import SizeIntegrals
from central.thresholds.optimum import Optimum, ascending, check_load, check_objective
from fabricpilot.levels import Thresholds, check_levels
from simulator.workloads.distribution import SizeDistribution

Floats = npt.NDArray[np.float64]

_GRID = 240  # sizes: a factor of 1.06 apart for web search
_GENERATIONS = 200  # of differential evolution; it has settled long before


def optimise(
    sizes: SizeDistribution,
    load: float,
    levels: int,
    objective: str = "fct",
    *,
    base_bytes: float = 0.0,
    visible_bytes: float = 0.0,
    seed: int = 0,
) -> Optimum:
    """Thresholds by the published formulation; the objective is only what they are then judged by.

    Args:
        sizes: flow sizes.
        load: 0 < load < 1.
        levels: K, 2 to 8.
        objective: unit of the result's values (by the exact model); the formulation itself knows one objective.
        base_bytes: as in `exact.optimise`.
        visible_bytes: as there; the formulation knows bytes sent only.
        seed: of the search, where the printed bound is feasible.

    Returns:
        The note says which of the two problems was solved, and how far the printed one was from feasible.

    Raises:
        UsageError: load, levels or objective out of range.
    """
    check_levels(levels)
    check_load(load)
    check_objective(objective)
    start = time.perf_counter()
    integrals = SizeIntegrals(sizes)
    grid = integrals.grid(_GRID)
    least, widest = least_bound_load(integrals, load, levels, grid)
    if least < 1:
        bounds = _solve_as_printed(integrals, load, widest, seed)
        note = f"as printed: the bound makes the load {_bound_load(integrals, load, bounds):.2f}"
    else:
        bounds = _solve_with_mean_traffic(integrals, load, levels, grid)
        note = (
            f"infeasible as printed: whatever the thresholds, the bound on E[L] makes the load at least {least:.2f}; "
            "solved with the exact E[L] instead"
        )
    thresholds = _whole(bounds * integrals.unit_bytes, levels, sizes.max_bytes)
    seconds = time.perf_counter() - start
    value = evaluate(sizes, load, thresholds, objective, base_bytes=base_bytes, visible_bytes=visible_bytes)
    sharing = evaluate(sizes, load, None, objective, base_bytes=base_bytes)
    return Optimum(thresholds, value, sharing, objective, "mm1", load, seconds, note, visible_bytes)


def least_bound_load(sizes: SizeIntegrals, load: float, levels: int, grid: Floats) -> tuple[float, Floats]:
    """The smallest total load the printed bound allows, over all thresholds on the grid, and those thresholds.

    The bound is an upper Riemann sum of the integral of 1 - F, so its minimum is found by dynamic programming. At 1 or
    above the published problem has no feasible point.
    """
    survival = sizes.survival(grid)
    width = grid[None, :] - grid[:, None]
    between = np.where(width > 0, load * width * survival[:, None], np.inf)
    bounds = grid[best_path(load * grid, between, levels)]
    return _bound_load(sizes, load, bounds), bounds


def _bound_load(sizes: SizeIntegrals, load: float, bounds: Floats) -> float:
    return float(_bound_traffic(sizes, load, bounds[None, :])[0].sum())


def _bound_traffic(sizes: SizeIntegrals, load: float, bounds: Floats) -> Floats:
    """l[i] by the printed bound, in shares of the link, for rows of bounds (n, K-1); shape (n, K)."""
    rows = len(bounds)
    edges = np.concatenate((np.zeros((rows, 1)), bounds, np.full((rows, 1), sizes.largest)), axis=1)
    traffic: Floats = load * np.diff(edges, axis=1) * sizes.survival(edges[:, :-1])
    return traffic


def _solve_as_printed(sizes: SizeIntegrals, load: float, feasible: Floats, seed: int) -> Floats:
    """Differential evolution over log sizes, started around a feasible point."""
    from scipy.optimize import Bounds, differential_evolution

    def cost(columns: Floats, /) -> Any:  # one value per column; the library's types know only single points
        bounds = np.sort(np.exp(columns.T), axis=1)
        traffic = _bound_traffic(sizes, load, bounds)
        slack = 1 - np.cumsum(traffic, axis=1)
        weight = sizes.survival(np.concatenate((np.zeros((len(bounds), 1)), bounds), axis=1))
        worst = slack.min(axis=1)
        value = (weight / np.where(slack > 0, slack, 1.0)).sum(axis=1)
        return np.where(worst > 0, value, 1e9 * (1 - worst))

    lowest = np.full(len(feasible), np.log(sizes.grid(2)[0]))
    span = Bounds(lowest, np.full(len(feasible), np.log(sizes.largest)))
    found = differential_evolution(
        cost,
        span,
        x0=np.log(feasible),
        rng=seed,
        vectorized=True,
        updating="deferred",
        maxiter=_GENERATIONS,
        polish=False,
    )
    bounds: Floats = np.sort(np.exp(found.x))
    return bounds


def _solve_with_mean_traffic(sizes: SizeIntegrals, load: float, levels: int, grid: Floats) -> Floats:
    """With the exact E[L] the slack after queue i is 1 - rho(a[i]): a sum over the levels, so dynamic programming."""
    slack = 1 - load * (1 - sizes.tail(grid))
    between = np.where(grid[None, :] > grid[:, None], sizes.survival(grid)[:, None] / slack[None, :], np.inf)
    return grid[best_path(1 / slack, between, levels)]


def _whole(bounds_bytes: Floats, levels: int, largest_bytes: float) -> Thresholds:
    """Exactly K-1 thresholds; those the formulation has no use for lie beyond the largest size."""
    values = list(bounds_bytes)
    return ascending(values + [2.0**step * max(largest_bytes, 1) for step in range(levels - 1 - len(values))])
