"""The published M/M/1 formulation and equal split."""

import itertools

import numpy as np
import pytest

from central.thresholds import exact, mm1
from central.thresholds.equal_split import optimise as optimise_equal_split
from central.thresholds.integrals import SizeIntegrals
from fabricpilot.errors import UsageError
from simulator.schemes import equal_split
from simulator.workloads.distribution import SizeDistribution, names

WEB_SEARCH = "websearch_dctcp_bytes_trafficgenerator"


def printed_objective(sizes: SizeDistribution, load: float, thresholds: tuple[int, ...]) -> float:
    """The paper's formulas one by one: queue after queue with its rho and mu; infinite where a queue is unstable."""
    edges = [0.0, *thresholds, sizes.max_bytes]
    rate, capacity, total = load / sizes.mean_bytes, 1.0, 0.0
    for low, high in itertools.pairwise(edges):
        share = 1 - float(sizes.cdf_at(low))
        arriving = rate * (high - low) * share
        if arriving >= capacity:
            return float("inf")
        total += share / (capacity - arriving)
        capacity *= 1 - arriving / capacity
    return total


def test_says_that_the_printed_problem_is_infeasible() -> None:
    found = mm1.optimise(SizeDistribution.load(WEB_SEARCH), 0.8, 4)
    assert found.note.startswith("infeasible as printed")
    assert "at least 1.4" in found.note
    assert found.thresholds.levels == 4


def test_infeasible_means_that_no_thresholds_are_stable() -> None:
    sizes = SizeDistribution.load(WEB_SEARCH)
    integrals = SizeIntegrals(sizes)
    grid = np.geomspace(1e-3, integrals.largest, 60)
    least, _ = mm1.least_bound_load(integrals, 0.8, 3, grid)
    assert least > 1
    bytes_grid = [round(x * integrals.unit_bytes) for x in grid[:-1]]
    assert all(printed_objective(sizes, 0.8, pair) == np.inf for pair in itertools.combinations(bytes_grid, 2))


def test_solves_the_printed_problem_where_it_is_feasible() -> None:
    sizes = SizeDistribution.load(WEB_SEARCH)
    found = mm1.optimise(sizes, 0.3, 3)
    assert found.note.startswith("as printed")
    grid = [round(x) for x in np.geomspace(1e4, sizes.max_bytes - 1, 60)]
    best = min(printed_objective(sizes, 0.3, pair) for pair in itertools.combinations(grid, 2))
    assert printed_objective(sizes, 0.3, found.thresholds.bytes) <= best * 1.0001


@pytest.mark.parametrize("name", names()[::3])
def test_never_better_than_exact(name: str) -> None:
    sizes = SizeDistribution.load(name)
    best = exact.optimise(sizes, 0.8, 4)
    assert mm1.optimise(sizes, 0.8, 4).mean >= best.mean * (1 - 1e-6)
    assert optimise_equal_split(sizes, 0.8, 4).mean >= best.mean * (1 - 1e-6)


def test_equal_split_is_the_published_one() -> None:
    """PIAS's equal split for web search is 24, 72 and 1448 KiB with K = 4."""
    thresholds = equal_split(SizeDistribution.load(WEB_SEARCH), 4).bytes
    assert thresholds == pytest.approx((24 * 1024, 72 * 1024, 1448 * 1024), rel=0.05)


def test_equal_split_of_one_size_still_ascends() -> None:
    assert equal_split(SizeDistribution("one", np.array([1.0]), np.array([1.0])), 8).bytes == (1, 2, 3, 4, 5, 6, 7)


def test_refuses_what_exact_refuses() -> None:
    sizes = SizeDistribution.load(WEB_SEARCH)
    for optimise in (mm1.optimise, optimise_equal_split):
        with pytest.raises(UsageError, match="load"):
            optimise(sizes, 1.0, 4)
        with pytest.raises(UsageError, match="levels"):
            optimise(sizes, 0.5, 1)
        with pytest.raises(UsageError, match="objective"):
            optimise(sizes, 0.5, 4, "p99")
