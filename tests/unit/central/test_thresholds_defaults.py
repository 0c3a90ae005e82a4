"""A host that was told nothing uses the optimiser's thresholds: the table in fabricpilot/levels.py is what it gives."""

import pytest

from central.thresholds.exact import evaluate, optimise
from fabricpilot.levels import default_thresholds
from simulator.workloads.distribution import SizeDistribution

WEB_SEARCH = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")


@pytest.mark.parametrize("levels", [2, 4, 8])
def test_defaults_are_the_optimum_for_web_search(levels):
    best = optimise(WEB_SEARCH, 0.8, levels, "slowdown")
    assert evaluate(WEB_SEARCH, 0.8, default_thresholds(levels), "slowdown") == pytest.approx(best.mean, rel=1e-3)
