"""The exact optimiser against closed forms, an independent event simulation and brute force."""

import heapq
import itertools
import random

import numpy as np
import pytest

from central.thresholds.exact import evaluate, optimise, response_times
from central.thresholds.optimum import ascending, usable_load
from fabricpilot.errors import UsageError
from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds
from simulator.workloads.distribution import SizeDistribution, names

WEB_SEARCH = "websearch_dctcp_bytes_trafficgenerator"


def exponential(mean_bytes: float = 100_000.0) -> SizeDistribution:
    x = np.linspace(0, 30, 6001)
    return SizeDistribution("exponential", x * mean_bytes, np.append(-np.expm1(-x[:-1]), 1.0))


def one_size(size_bytes: float) -> SizeDistribution:
    return SizeDistribution("one size", np.array([size_bytes]), np.array([1.0]))


def two_sizes() -> SizeDistribution:
    return SizeDistribution("two sizes", np.array([1e4, 1e4, 1e6, 1e6]), np.array([0, 0.9, 0.9, 1.0]))


def simulate(
    sizes: list[int], load: float, mean: float, bounds: tuple[int, ...], seed: int, visible: float = 0.0
) -> list[float]:
    """Response times (in bytes of service) of an M/G/1 queue whose levels go by bytes sent and visible, flow by flow.

    Virtual time per level: the service each of its flows has got since it was created; flows wait in a heap ordered by
    the virtual time at which they leave the level, by completion or demotion.
    """
    rng = random.Random(seed)
    edges = (0, *bounds, max(sizes) + 1)
    heaps: list[list[tuple[float, int]]] = [[] for _ in edges[1:]]
    virtual = [0.0] * len(heaps)
    arrived, response = [], [0.0] * len(sizes)
    now = 0.0
    for _ in sizes:
        now += rng.expovariate(load / mean)
        arrived.append(now)

    def enter(flow: int, level: int) -> None:
        while sizes[flow] > edges[level + 1] and sent[flow] + visible >= edges[level + 1]:
            level += 1
        until = sizes[flow] if sizes[flow] <= edges[level + 1] else edges[level + 1] - visible
        heapq.heappush(heaps[level], (virtual[level] + until - sent[flow], flow))
        sent[flow] = until

    sent = [0.0] * len(sizes)
    now, coming = 0.0, 0
    while coming < len(sizes) or any(heaps):
        level = next((i for i, heap in enumerate(heaps) if heap), None)
        next_arrival = arrived[coming] if coming < len(sizes) else float("inf")
        if level is None:
            now = next_arrival
        else:
            due = now + (heaps[level][0][0] - virtual[level]) * len(heaps[level])
            if due <= next_arrival:
                virtual[level], flow = heapq.heappop(heaps[level])
                now = due
                if sizes[flow] > sent[flow]:
                    enter(flow, level + 1)
                else:
                    response[flow] = now - arrived[flow]
                continue
            virtual[level] += (next_arrival - now) / len(heaps[level])
            now = next_arrival
        enter(coming, 0)
        coming += 1
    return response


@pytest.mark.parametrize(
    ("name", "load", "bounds"),
    [
        (WEB_SEARCH, 0.7, (50_000, 1_000_000, 5_000_000)),
        (WEB_SEARCH, 0.6, (2_000_000,)),
        ("facebook_hadoop_bytes_hpcc", 0.6, (1_000, 100_000)),
    ],
)
def test_agrees_with_an_event_simulation(name: str, load: float, bounds: tuple[int, ...]) -> None:
    distribution = SizeDistribution.load(name)
    sizes = distribution.sample(np.random.default_rng(1), 100_000).tolist()
    response = simulate(sizes, load, distribution.mean_bytes, bounds, seed=1)
    # The sample's own mean stands in the arrival rate, so that luck in the drawn sizes does not count.
    drawn = SizeDistribution("drawn", np.sort(np.array(sizes, float)), np.arange(1, len(sizes) + 1) / len(sizes))
    drawn_load = load * drawn.mean_bytes / distribution.mean_bytes
    expected = evaluate(drawn, drawn_load, Thresholds(bounds))
    assert np.mean(response) == pytest.approx(expected, rel=0.05)
    edges = [0, *bounds, drawn.max_bytes]
    for low, high in itertools.pairwise(edges):
        inside = [i for i, size in enumerate(sizes) if low < size <= high]
        theory = response_times(drawn, drawn_load, Thresholds(bounds), np.array(sizes)[inside])
        assert np.mean([response[i] for i in inside]) == pytest.approx(theory.mean(), rel=0.08)


@pytest.mark.parametrize("visible_bytes", [300_000.0, 3_000_000.0, float("inf")])
def test_what_the_send_buffer_shows_agrees_with_an_event_simulation(visible_bytes: float) -> None:
    thresholds = Thresholds((100_000, 1_000_000, 5_000_000))
    distribution = SizeDistribution.load(WEB_SEARCH)
    sizes = distribution.sample(np.random.default_rng(1), 60_000).tolist()
    bounds = tuple(threshold - 1 for threshold in thresholds.bytes)  # who shows a whole threshold is beyond it
    response = np.array(simulate(sizes, 0.7, distribution.mean_bytes, bounds, 1, visible_bytes))
    drawn = SizeDistribution("drawn", np.sort(np.array(sizes, float)), np.arange(1, len(sizes) + 1) / len(sizes))
    load = 0.7 * drawn.mean_bytes / distribution.mean_bytes
    assert response.mean() == pytest.approx(evaluate(drawn, load, thresholds, visible_bytes=visible_bytes), rel=0.05)
    for low, high in itertools.pairwise([0, *bounds, drawn.max_bytes]):
        inside = (low < np.array(sizes)) & (np.array(sizes) <= high)
        theory = response_times(drawn, load, thresholds, np.array(sizes)[inside], visible_bytes)
        assert response[inside].mean() == pytest.approx(theory.mean(), rel=0.08)


def test_the_more_is_visible_the_more_can_be_gained() -> None:
    sizes = SizeDistribution.load(WEB_SEARCH)
    blind = optimise(sizes, 0.8, 4)
    means = [blind.mean]
    for visible_bytes in (2e6, float("inf")):
        found = optimise(sizes, 0.8, 4, visible_bytes=visible_bytes)
        means.append(found.mean)
        assert found.mean < evaluate(sizes, 0.8, blind.thresholds, visible_bytes=visible_bytes)
    assert means == sorted(means, reverse=True)
    hardly, all_sizes = (
        evaluate(sizes, 0.8, blind.thresholds, visible_bytes=visible_bytes) for visible_bytes in (1e-6, sizes.max_bytes)
    )
    assert hardly == pytest.approx(blind.mean, rel=1e-3)
    assert all_sizes == pytest.approx(evaluate(sizes, 0.8, blind.thresholds, visible_bytes=float("inf")), rel=1e-9)


def test_atoms_agree_with_an_event_simulation() -> None:
    rng = np.random.default_rng(2)
    sizes = np.where(rng.random(100_000) < 0.9, 10_000, 1_000_000).tolist()
    thresholds = Thresholds((10_000, 300_000))
    mean = float(np.mean(sizes))
    response = np.array(simulate(sizes, 0.7, mean, thresholds.bytes, seed=2))
    share = float(np.mean(np.array(sizes) == 10_000))
    drawn = SizeDistribution("drawn", np.array([1e4, 1e6, 1e6]), np.array([share, share, 1.0]))
    short, long = response_times(drawn, 0.7, thresholds, [1e4, 1e6])
    assert response[np.array(sizes) == 10_000].mean() == pytest.approx(short, rel=0.03)
    assert response[np.array(sizes) == 1_000_000].mean() == pytest.approx(long, rel=0.05)


@pytest.mark.parametrize("bounds", [(10_000,), (100_000,), (5_000, 50_000, 200_000, 700_000)])
@pytest.mark.parametrize("load", [0.3, 0.8, 0.95])
def test_exponential_sizes_do_not_care_about_thresholds(bounds: tuple[int, ...], load: float) -> None:
    assert evaluate(exponential(), load, Thresholds(bounds)) == pytest.approx(100_000 / (1 - load), rel=2e-4)


@pytest.mark.parametrize("name", names())
def test_one_level_is_processor_sharing(name: str) -> None:
    sizes = SizeDistribution.load(name)
    sharing = sizes.mean_bytes / (1 - 0.7)
    assert evaluate(sizes, 0.7, None) == pytest.approx(sharing, rel=1e-9)
    assert evaluate(sizes, 0.7, Thresholds((int(sizes.max_bytes) + 1,))) == pytest.approx(sharing, rel=1e-9)
    assert evaluate(sizes, 0.7, None, "slowdown") == pytest.approx(1 / 0.3, rel=1e-6)
    assert evaluate(sizes, 0.7, None, "tail") == pytest.approx(1 / 0.3, rel=1e-6)


def test_many_levels_approach_foreground_background() -> None:
    """T(x) = l E[min(S,x)^2] / (2 (1-rho(x))^2) + x / (1-rho(x)), here by numerical integration of its own."""
    sizes, load = SizeDistribution.load(WEB_SEARCH), 0.8
    t = np.linspace(0, sizes.max_bytes, 300_001)
    survival = 1 - sizes.cdf_at(t)
    step = t[1]
    first = np.concatenate(([0.0], np.cumsum((survival[1:] + survival[:-1]) / 2 * step)))
    second = np.concatenate(([0.0], np.cumsum((t[1:] * survival[1:] + t[:-1] * survival[:-1]) * step)))
    rate = load / sizes.mean_bytes
    fb = rate * second / (2 * (1 - rate * first) ** 2) + t / (1 - rate * first)
    # A level from x(1-e) to x between two finer ones sees flows of size x as foreground-background does.
    for x in (60_000.0, 900_000.0, 7_000_000.0):
        near = Thresholds.of(round(x * factor) for factor in (0.97, 0.98, 0.99, 1.0, 1.01))
        assert response_times(sizes, load, near, [x])[0] == pytest.approx(np.interp(x, t, fb), rel=0.01)


def test_optimum_beats_brute_force_over_a_grid() -> None:
    sizes = SizeDistribution.load(WEB_SEARCH)
    grid = [round(x) for x in np.geomspace(5e3, 2e7, 10)]
    for objective in ("fct", "slowdown", "tail"):
        best = min(evaluate(sizes, 0.8, Thresholds(chosen), objective) for chosen in itertools.combinations(grid, 2))
        found = optimise(sizes, 0.8, 3, objective)
        assert found.mean <= best * (1 + 1e-5)
        assert found.mean == pytest.approx(evaluate(sizes, 0.8, found.thresholds, objective))


@pytest.mark.parametrize("objective", ["fct", "slowdown", "tail"])
def test_optimum_is_a_local_minimum_and_more_levels_help(objective: str) -> None:
    sizes = SizeDistribution.load("homa_w3_bytes_cdf")
    previous = evaluate(sizes, 0.8, None, objective)
    for levels in (2, 3, 5, 8):
        found = optimise(sizes, 0.8, levels, objective)
        assert found.thresholds.levels == levels
        assert found.mean < previous
        assert 0 < found.gain < 1
        previous = found.mean
        for at, factor in itertools.product(range(levels - 1), (0.8, 1.25)):
            moved = list(found.thresholds.bytes)
            moved[at] = round(moved[at] * factor)
            if moved == sorted(set(moved)):
                assert evaluate(sizes, 0.8, Thresholds.of(moved), objective) > found.mean * (1 - 1e-4)


def test_base_latency_dilutes_slowdown_and_adds_to_completion_time() -> None:
    sizes, thresholds = SizeDistribution.load(WEB_SEARCH), Thresholds((100_000, 2_000_000))
    with_base = evaluate(sizes, 0.8, thresholds, "slowdown", base_bytes=30_000)
    assert 1 < with_base < evaluate(sizes, 0.8, thresholds, "slowdown")
    assert with_base < evaluate(sizes, 0.8, thresholds, "tail", base_bytes=30_000)
    plain = evaluate(sizes, 0.8, thresholds)
    assert evaluate(sizes, 0.8, thresholds, base_bytes=30_000) == pytest.approx(plain + 30_000)


@pytest.mark.parametrize("levels", [2, 8])
@pytest.mark.parametrize("load", [0.01, 0.99])
@pytest.mark.parametrize(
    "sizes",
    [one_size(1), one_size(2), one_size(1460), one_size(1e12), two_sizes()],
    ids=["1 B", "2 B", "1460 B", "1 TB", "two sizes"],
)
def test_degenerate_sizes_still_give_valid_thresholds(sizes: SizeDistribution, levels: int, load: float) -> None:
    for objective in ("fct", "slowdown", "tail"):
        found = optimise(sizes, load, levels, objective)
        assert found.thresholds.levels == levels
        assert np.isfinite(found.mean)
        assert found.mean <= found.processor_sharing * (1 + 1e-6)


def test_two_sizes_are_separated() -> None:
    found = optimise(two_sizes(), 0.8, 2)
    assert 10_000 <= found.thresholds.bytes[0] < 1_000_000
    assert found.gain > 0.05
    assert evaluate(two_sizes(), 0.8, Thresholds((5_000,))) > found.mean  # holds the short flows up as well


@pytest.mark.parametrize("values", [[700], [700, 701, 90_000], [1] * 50 + [10**9]])
def test_histograms_of_few_flows(values: list[int]) -> None:
    sizes = SizeDistribution.from_histogram(LogHistogram.of(values), "reported")
    for levels in (2, 8):
        found = optimise(sizes, 0.8, levels)
        assert found.thresholds.levels == levels
        assert np.isfinite(found.mean)


@pytest.mark.parametrize("load", [0, -1, 1, 1.2, float("nan"), float("inf")])
def test_refuses_loads_without_a_mean(load: float) -> None:
    with pytest.raises(UsageError, match="load"):
        optimise(exponential(), load, 4)


def test_refuses_other_bad_arguments() -> None:
    with pytest.raises(UsageError, match="levels"):
        optimise(exponential(), 0.5, 9)
    with pytest.raises(UsageError, match="objective"):
        optimise(exponential(), 0.5, 4, "p99")
    with pytest.raises(UsageError, match="base_bytes"):
        optimise(exponential(), 0.5, 4, base_bytes=-1)
    with pytest.raises(UsageError, match="largest"):
        response_times(exponential(), 0.5, Thresholds((1000,)), [0.0])


def test_measured_loads_become_usable() -> None:
    assert [usable_load(x) for x in (0.0, 0.5, 1.3, float("inf"))] == [0.01, 0.5, 0.99, 0.99]
    assert usable_load(float("nan")) == 0.01


def test_ascending_repairs_rounding() -> None:
    assert ascending([0.2, 0.3, 2.0, 2.1]).bytes == (1, 2, 3, 4)
