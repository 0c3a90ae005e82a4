"""The schemes behind the one interface: what they decide, and when they leave things alone."""

import numpy as np
import pytest

from central.policy import policy_of
from central.policy.base import GroupSummary
from central.policy.fixed import FixedPolicy
from central.policy.optimiser import OptimiserPolicy
from central.thresholds.exact import evaluate
from fabricpilot.config import CentralConfig, PolicySection, load
from fabricpilot.errors import UsageError
from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds
from simulator.workloads.distribution import SizeDistribution


def summary(workload="websearch_bytes_hpcc", **fields):
    sizes = LogHistogram.of(SizeDistribution.load(workload).sample(np.random.default_rng(1), 20_000))
    given = {"group": "web", "levels": 4, "hosts": 3, "flows": 20_000.0, "load": 0.7, "sizes": sizes}
    return GroupSummary(**(given | {"thresholds": None} | fields))


def test_the_optimiser_settles():
    policy = OptimiserPolicy()
    first = policy.decide(summary())
    assert first.thresholds is not None
    again = policy.decide(summary(thresholds=first.thresholds))
    assert again.thresholds is None
    assert again.gain < 0.01
    assert "worth a change" in again.reason


def test_the_optimiser_moves_for_a_clear_gain():
    bad = Thresholds((100, 200, 300))
    told = summary(thresholds=bad)
    decision = OptimiserPolicy().decide(told)
    sizes = SizeDistribution.from_histogram(told.sizes, "web")
    before, after = (evaluate(sizes, 0.7, thresholds) for thresholds in (bad, decision.thresholds))
    assert decision.gain == pytest.approx(1 - after / before, rel=1e-6)
    assert decision.gain > 0.01
    assert "better for 20000 flows at load 0.70" in decision.reason


def test_too_few_flows_decide_nothing():
    decision = OptimiserPolicy(min_flows=200).decide(summary(flows=199.0))
    assert decision.thresholds is None
    assert decision.reason == "199 finished flows in the window, 200 are needed"


@pytest.mark.parametrize("levels", [2, 3, 8])
def test_every_k(levels):
    assert OptimiserPolicy().decide(summary(levels=levels)).thresholds.levels == levels


def test_fixed_thresholds_are_sent_once():
    policy = FixedPolicy(Thresholds((1, 2, 3)))
    assert policy.decide(summary()).thresholds == Thresholds((1, 2, 3))
    assert policy.decide(summary(thresholds=Thresholds((1, 2, 3)))).thresholds is None
    wrong = policy.decide(summary(levels=8))
    assert wrong.thresholds is None
    assert "4 levels, not 8" in wrong.reason


def test_the_configuration_names_the_scheme():
    assert policy_of(PolicySection(scheme="fixed", thresholds=[5, 6])) == FixedPolicy(Thresholds((5, 6)))
    assert policy_of(PolicySection(min_flows=7, min_gain=0.5)) == OptimiserPolicy("fct", 7, 0.5)
    with pytest.raises(UsageError, match=r"needs policy\.thresholds"):
        policy_of(PolicySection(scheme="fixed"))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("policy.thresholds", "3,2,1", "ascend"),
        ("policy.min_gain", "2", "0 to 1"),
        ("policy.shared_rate", "fast", "rate 'fast'"),
        ("policy.scheme", "magic", "policy.scheme"),
        ("policy.objective", "magic", "policy.objective"),
    ],
)
def test_wrong_configuration(key, value, match):
    with pytest.raises(UsageError, match=match):
        load(CentralConfig, None, {key: value}, {})
