"""Forgetting, bounded influence, and flows that still run."""

import numpy as np
import pytest

from central.windows import ENOUGH_FLOWS, ForgettingWindow, influence, running_counts, size_distribution
from fabricpilot.histogram import BINS, LogHistogram, bin_middles, bin_of


def test_the_past_fades():
    window = ForgettingWindow(60.0)
    window.add({5: 100}, 0.0)
    assert window.at(0.0)[5] == 100
    assert window.at(60.0)[5] == pytest.approx(100 / np.e, rel=1e-5)
    window.add({5: 10, 7: 1}, 60.0)
    assert window.at(60.0)[[5, 7]] == pytest.approx([100 / np.e + 10, 1], rel=1e-5)
    assert window.at(10_000.0).sum() == pytest.approx(0, abs=1e-9)


def test_a_clock_that_steps_back_changes_nothing():
    window = ForgettingWindow(60.0)
    window.add({1: 8}, 100.0)
    window.add({1: 8}, 50.0)
    assert window.at(100.0)[1] == 16


def test_quantiles():
    window = ForgettingWindow(60.0)
    assert np.isnan(window.quantile(0.5, 0.0))
    window.add({8: 3, 80: 1}, 0.0)
    assert window.quantile(0.5, 1.0) == pytest.approx(bin_middles()[8])
    assert window.quantile(0.9, 1.0) == pytest.approx(bin_middles()[80])


def test_no_host_outweighs_the_others():
    flows = np.array([100.0, 120.0, 80.0, 1e9, 0.0])
    weights = influence(flows)
    assert list(weights[[0, 1, 2, 4]]) == pytest.approx([1, 110 / 120, 1, 1])
    assert weights[3] * flows[3] == pytest.approx(110.0)
    assert list(influence(np.array([1.0, 1.0, 1.0, 10 * ENOUGH_FLOWS]))) == pytest.approx([1, 1, 1, 0.1])
    assert list(influence(np.zeros(3))) == [1, 1, 1]
    assert list(influence(np.array([5.0]))) == [1]


def test_running_flows_not_listed_count_at_the_smallest():
    listed = [4_000_000, 9_000_000]
    counts = running_counts(listed, 5)
    assert counts == {int(bin_of(4_000_000)): 4, int(bin_of(9_000_000)): 1}
    assert running_counts([], 3) == {}


def test_without_running_flows_it_is_the_histogram():
    finished = LogHistogram.of([10, 10, 500, 40_000]).counts.astype(float)
    result = size_distribution(finished, np.zeros(BINS))
    assert result.counts / result.total == pytest.approx(finished / 4)


def test_nothing_observed_is_empty():
    assert size_distribution(np.zeros(BINS), np.zeros(BINS)).total == 0


def test_the_product_limit_by_hand():
    """4 finished at bin 10, 2 running at 20, 2 finished at 30: 1/2 end at 10, the rest must reach 30."""
    finished, running = np.zeros(BINS), np.zeros(BINS)
    finished[10], running[20], finished[30] = 4, 2, 2
    result = size_distribution(finished, running)
    assert result.counts[[10, 20, 30]] / result.total == pytest.approx([0.5, 0, 0.5])
    finished[30], running[40] = 1, 1  # of the two that got to 30, one ends there and one goes on
    result = size_distribution(finished, running)
    assert result.counts[[10, 30, 40]] / result.total == pytest.approx([0.5, 0.25, 0.25])


def test_only_running_flows():
    running = np.zeros(BINS)
    running[50] = 3
    result = size_distribution(np.zeros(BINS), running)
    assert result.counts[50] == result.total


def test_censoring_brings_the_large_sizes_back():
    """Flows observed for a limited time each: the finished ones alone understate the mean, the estimate does not."""
    rng = np.random.default_rng(3)
    sizes = rng.lognormal(11, 1.5, 200_000)
    watched = rng.lognormal(13, 1.5, 200_000)  # bytes each flow gets to send before the snapshot
    ended = sizes <= watched
    finished = LogHistogram.of(sizes[ended]).counts.astype(float)
    running = LogHistogram.of(watched[~ended]).counts.astype(float)
    truth = LogHistogram.of(sizes).counts @ bin_middles() / len(sizes)
    naive = finished @ bin_middles() / finished.sum()
    estimate = size_distribution(finished, running)
    corrected = estimate.counts @ bin_middles() / estimate.total
    assert naive < 0.8 * truth
    assert corrected == pytest.approx(truth, rel=0.05)
