import numpy as np
import pytest

from fabricpilot.errors import UsageError
from simulator.workloads.arrivals import bursty, incast, poisson
from simulator.workloads.distribution import SizeDistribution

WEB = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")


def test_poisson_offers_the_load_asked_for() -> None:
    trace = poisson(WEB, 0.7, 1e9, np.random.default_rng(1), count=200_000)
    assert trace.load(1e9) == pytest.approx(0.7, rel=0.02)
    gaps = np.diff(trace.start_s)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.02)  # exponential


def test_poisson_by_duration() -> None:
    trace = poisson(WEB, 0.5, 1e9, np.random.default_rng(1), duration_s=1000)
    assert trace.start_s[-1] < 1000
    assert len(trace) == pytest.approx(1000 * 0.5 * 1e9 / 8 / WEB.mean_bytes, rel=0.03)


def test_bursty_has_the_same_load_and_more_variance() -> None:
    trace = bursty(WEB, 0.5, 1e9, np.random.default_rng(1), count=400_000, sigma=1.5)
    gaps = np.diff(trace.start_s)
    assert gaps.mean() == pytest.approx(WEB.mean_bytes * 8 / 0.5e9, rel=0.03)
    assert gaps.std() > 2 * gaps.mean()


def test_one_seed_one_trace() -> None:
    first, second = (poisson(WEB, 0.7, 1e9, np.random.default_rng(5), count=100) for _ in range(2))
    np.testing.assert_array_equal(first.start_s, second.start_s)
    np.testing.assert_array_equal(first.size_bytes, second.size_bytes)


def test_incast_rounds() -> None:
    trace = incast(8, 20_000, 0.01, 3, np.random.default_rng(0), jitter_s=1e-4)
    assert len(trace) == 24
    assert set(trace.source.tolist()) == set(range(1, 9))
    assert set(trace.destination.tolist()) == {0}
    assert 0.02 <= trace.start_s[-1] < 0.0201


@pytest.mark.parametrize("load", [0, -1, 1, 1.2, float("nan")])
def test_impossible_loads_are_refused(load: float) -> None:
    with pytest.raises(UsageError, match="load"):
        poisson(WEB, load, 1e9, np.random.default_rng(0), count=10)


def test_overload_only_when_asked_for() -> None:
    assert len(poisson(WEB, 1.2, 1e9, np.random.default_rng(0), count=10, overload=True)) == 10


def test_count_or_duration() -> None:
    for given in ({}, {"count": 1, "duration_s": 1.0}, {"count": 0}, {"duration_s": -1.0}):
        with pytest.raises(UsageError):
            poisson(WEB, 0.5, 1e9, np.random.default_rng(0), **given)  # type: ignore[arg-type]
