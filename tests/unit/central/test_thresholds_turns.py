"""Turns in the last level: the formula against the simulator, and the thresholds that go with them."""

from dataclasses import replace

import numpy as np
import pytest

from central.thresholds import exact
from central.thresholds.methods import Question, answer
from central.thresholds.simulated import trace_at
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from simulator.engine import simulate
from simulator.physics import IDEAL
from simulator.schemes import ATTAINED, WRITTEN, Scheme
from simulator.topology import star
from simulator.workloads.distribution import SizeDistribution

WEB, MINING = "websearch_dctcp_bytes_trafficgenerator", "datamining_vl2_bytes_trafficgenerator"
VISIBLE = 4e6


def simulated(sizes, load, thresholds, visible, flows=200_000, turns=True):
    """Sizes and times of all flows, in bytes the link sends meanwhile."""
    ranked = Scheme("x", thresholds=tuple(map(float, thresholds.bytes)), queue_bytes=0.0, turns=turns)
    ranked = replace(ranked, basis=WRITTEN if visible else ATTAINED, send_buffer_bytes=visible)
    found = simulate(trace_at(sizes, load, flows, seed=5), ranked, star(2, 8.0), IDEAL)
    return found.size_bytes, found.fct_s


@pytest.mark.parametrize("visible", [0.0, VISIBLE])
@pytest.mark.parametrize("name", [WEB, MINING])
def test_the_formula_agrees_with_the_simulator_for_all_and_for_the_largest(name, visible):
    sizes = SizeDistribution.load(name)
    best = exact.optimise(sizes, 0.7, 4, visible_bytes=visible, turns=True)
    size, time = simulated(sizes, 0.7, best.thresholds, visible)
    assert time.mean() == pytest.approx(best.mean, rel=0.04)
    long = size > best.thresholds.bytes[-1]
    modelled = exact.response_times(sizes, 0.7, best.thresholds, size[long], visible, turns=True)
    assert time[long].mean() == pytest.approx(modelled.mean(), rel=0.05)


def test_all_flows_in_turn_are_first_come_first_served():
    sizes = SizeDistribution.load(WEB)
    mean = sizes.mean_bytes
    second = float((sizes.quantile((np.arange(200_000) + 0.5) / 200_000) ** 2).mean())
    everything = exact.evaluate(sizes, 0.6, Thresholds((1, 2)), turns=True)
    assert everything == pytest.approx(mean + 0.6 / mean * second / (2 * 0.4), rel=1e-3)


@pytest.mark.parametrize("name", [WEB, MINING])
def test_the_largest_wait_no_longer_than_in_equal_shares_and_the_mean_falls(name):
    sizes = SizeDistribution.load(name)
    for load in (0.6, 0.8):
        shared = exact.optimise(sizes, load, 4, visible_bytes=VISIBLE)
        turns = exact.optimise(sizes, load, 4, visible_bytes=VISIBLE, turns=True)
        assert turns.mean < 0.93 * shared.mean
        largest = np.array([sizes.max_bytes])
        time = exact.response_times(sizes, load, turns.thresholds, largest, VISIBLE, turns=True)
        assert time < largest / (1 - load)


def test_the_level_before_the_last_is_free_for_the_flow_whose_turn_it_is():
    for levels in (3, 4, 8):
        found = exact.optimise(SizeDistribution.load(WEB), 0.8, levels, turns=True).thresholds
        assert found.levels == levels
        assert found.bytes[-1] - found.bytes[-2] == 1


def test_two_levels_leave_no_room_for_turns():
    sizes = SizeDistribution.load(WEB)
    assert exact.optimise(sizes, 0.8, 2, turns=True).thresholds == exact.optimise(sizes, 0.8, 2).thresholds


def test_no_pair_of_thresholds_on_a_grid_is_better():
    sizes = SizeDistribution.load(WEB)
    best = exact.optimise(sizes, 0.8, 4, visible_bytes=VISIBLE, turns=True)
    grid = np.geomspace(1e5, 2.5e7, 9).round().astype(int).tolist()
    for first in range(len(grid)):
        for second in grid[first + 1 :]:
            tried = Thresholds((grid[first], second, second + 1))
            assert exact.evaluate(sizes, 0.8, tried, visible_bytes=VISIBLE, turns=True) >= best.mean * (1 - 1e-4)


def test_sizes_that_spread_over_everything_are_not_served_in_turn():
    points = np.geomspace(1e3, 1e10, 200)
    heavy = SizeDistribution("heavy", points, 1 - (points[0] / points) ** 0.9 * (1 - np.arange(200) / 199))
    found = exact.optimise(heavy, 0.5, 3, turns=True)
    taken = exact.evaluate(heavy, 0.5, found.thresholds, turns=True)
    rest = float(1 - heavy.cdf_at(np.array([found.thresholds.bytes[-1]]))[0])
    assert taken == pytest.approx(found.mean)
    assert rest < 1e-4  # next to nobody waits for a turn


def test_only_the_exact_method_knows_turns():
    with pytest.raises(UsageError, match="in turn"):
        answer("mm1", Question(SizeDistribution.load(WEB), 0.5, 4, turns=True))
