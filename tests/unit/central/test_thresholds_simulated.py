"""The exact model against the simulator, on every bundled distribution."""

import numpy as np
import pytest

from central.thresholds import exact
from central.thresholds.simulated import Link, measured, results, trace_at
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from fabricpilot.published import published
from simulator.schemes import equal_split
from simulator.workloads.distribution import SizeDistribution, names


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("load", [pytest.param(0.5, marks=pytest.mark.slow), 0.9])
def test_no_worse_than_published_and_equal_split(name: str, load: float) -> None:
    sizes = SizeDistribution.load(name)
    trace = trace_at(sizes, load, 50_000, seed=11)
    mean = measured(trace, exact.optimise(sizes, load, 8).thresholds, "fct")
    rivals: list[Thresholds | None] = [None, equal_split(sizes, 8)]
    rivals += [published(workload, 8, load).thresholds for workload in ("websearch", "datamining")]
    assert all(mean <= measured(trace, rival, "fct") for rival in rivals)


@pytest.mark.parametrize("name", ["websearch_dctcp_bytes_trafficgenerator", "facebook_hadoop_bytes_hpcc"])
@pytest.mark.parametrize("objective", ["fct", "slowdown"])
def test_prediction_agrees_with_the_simulator(name: str, objective: str) -> None:
    sizes = SizeDistribution.load(name)
    best = exact.optimise(sizes, 0.7, 4, objective)
    trace = trace_at(sizes, 0.7, 200_000, seed=5)
    assert measured(trace, best.thresholds, objective) == pytest.approx(best.mean, rel=0.04)


@pytest.mark.parametrize("visible_bytes", [4e6, float("inf")])
def test_thresholds_for_what_is_visible_are_better_where_it_is(visible_bytes: float) -> None:
    sizes = SizeDistribution.load("facebook_hadoop_bytes_hpcc")
    trace = trace_at(sizes, 0.7, 100_000, seed=5)
    best = exact.optimise(sizes, 0.7, 8, visible_bytes=visible_bytes)
    blind = exact.optimise(sizes, 0.7, 8).thresholds
    mean = measured(trace, best.thresholds, "fct", visible_bytes=visible_bytes)
    assert mean == pytest.approx(best.mean, rel=0.05)
    assert mean < 0.95 * measured(trace, blind, "fct", visible_bytes=visible_bytes)
    assert mean < measured(trace, equal_split(sizes, 8), "fct", visible_bytes=visible_bytes)


def test_one_level_shares_fairly() -> None:
    sizes = SizeDistribution("one", np.array([1000.0]), np.array([1.0]))
    trace = trace_at(sizes, 0.5, 100_000, seed=3)
    assert measured(trace, None, "fct") == pytest.approx(2000, rel=0.02)
    assert measured(trace, None, "slowdown") == pytest.approx(2, rel=0.02)
    assert measured(trace, None, "tail") > 2


def test_trace_has_the_load_asked_for() -> None:
    sizes = SizeDistribution.load("homa_w3_bytes_cdf")
    trace = trace_at(sizes, 0.8, 200_000, seed=4)
    assert trace.load(8.0) == pytest.approx(0.8, rel=0.01)
    with pytest.raises(UsageError, match="load"):
        trace_at(sizes, 1.0, 1000, seed=4)


def test_real_links_add_latency() -> None:
    sizes = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")
    link = Link.real(1e9)
    trace = trace_at(sizes, 0.5, 20_000, seed=6, link=link)
    flows = results(trace, Thresholds((100_000,)), link)
    assert flows.fct_s.min() > link.physics.base_latency_s
    assert measured(trace, Thresholds((100_000,)), "fct", link) < measured(trace, None, "fct", link)
